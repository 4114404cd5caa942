"""The words and phrasings that the toy world is made of; lists only, `toy_facts.py` and `toy_world.py` use them."""

from __future__ import annotations

# Asked for in letter counting, and always spelled in training: the model can number the letters of a word only when it
# knows them, and a vocabulary of about a thousand tokens hides them.
CORE_WORDS = tuple(
    """
    cat dog bird fish fox frog bear duck horse mouse rabbit tiger lion goat kitten puppy spider elephant giraffe
    sheep red blue green yellow black white brown pink purple silver golden banjo park garden forest house school
    market river beach castle meadow valley harbor ball book kite hat cup box boat drum lamp wagon basket bottle
    small big happy sad new fast slow kind brave quiet little funny strawberry raspberry blueberry blackberry banana
    apple orange lemon melon grape peach cherry carrot tomato potato pepper onion butter coffee cheese pizza sugar
    bread cookie dinner muffin honey window mirror corner planet computer letter paper hammer tractor umbrella
    balloon library pencil button ladder bridge kettle pillow summer winter spring autumn morning evening tomorrow
    yesterday monday sunday mother father sister brother teacher doctor farmer pirate baker sailor water flower
    arrow number mississippi assess committee success address rain snow thunder rainbow island tree grass pebble
    moon star cloud leaf street dragon rocket puzzle lettuce cabbage
    """.split()
)

# Further common words, only spelled; the held-out spellings are all among them.
WIDER_WORDS = tuple(
    """
    able about above accident across action actor afraid again against airport album alley almond almost alone along
    already always amazing anchor angel angle animal ankle answer anyone apron army around artist asleep attic aunt
    avenue awake away baby bacon badge bakery balcony bamboo band bank bark barn barrel basement bath battle beam
    bean beard beaver because become beetle before begin behind bell belong belt bench berry better between bicycle
    birthday biscuit bitter blanket blossom board body bone boot border borrow bottom bowl branch brass breeze brick
    bright broom brush bubble bucket buffalo build bush busy butcher cabin cable cactus cake calendar camel camera
    camp candle candy canoe canyon captain card carpet cart catch cave ceiling cellar center cereal chair chalk
    change chapter chest chicken child chimney church circle circus city clay clean clever climb clock closet cloth
    clover clown coach coast coat coconut collar color comb concert copper corn cotton couch country cousin cracker
    crayon cream creek cricket crown cucumber curtain cushion daisy dance danger daughter dawn deer desert desk
    diamond dinosaur dish dive dolphin donkey door drawer dream dress drink drive driver eagle early earth easel
    eight elbow eleven empty engine enjoy enough envelope eraser every explore fabric face factory fair fairy family
    famous feather fence fern ferry festival field finger fire flag flame flood floor flour flute foam follow food
    foot football forgive fork fountain fresh friend fruit galaxy game garage garlic gate gentle ghost giant gift
    ginger glass glove glue goose grain grandma gravel ground guitar hair half hallway hand handle hawk heart heavy
    hedge helmet hill hockey holiday hollow hope horn hospital hotel hour hungry hurry idea insect inside iron ivory
    jacket jaguar jelly jewel journey judge juice jungle kangaroo king kingdom kitchen knee knife knight knot koala
    lace lake lamb language lantern large laugh laundry learn leather lesson light lily listen lizard lobster lunch
    machine magic magnet maple marble mask meal medicine memory metal middle midnight milk minute mitten model money
    monkey monster motor mountain mouth movie museum mushroom music nail napkin narrow nature neck needle neighbor
    nephew nest never nickel night noodle north nose notebook nurse ocean office olive open orchard ostrich oven
    oyster package paddle painter palace pancake panda panther parade parent parrot party pasta path peanut pear
    penguin people perfect person piano picnic picture pigeon pilot pine plant plate player pocket poem polite pond
    pony popcorn porch present pretty prince princess problem promise pudding pumpkin queen question quick quilt
    raccoon radio raisin ranch ready record remember ribbon rice ring road robin robot roof room rooster rope rose
    ruler saddle salad salt sand sandwich scarf science scissors scooter season secret seed seven shadow shark shell
    shelf shirt shoe shoulder shovel singer sixteen skate skirt sleep slipper smile smoke snail soap soccer sock
    soldier song soup south spinach spoon square squirrel stable stair stamp station stone store storm story stove
    straw string student sweater sweet swim swing table tail tailor teapot tennis tent theater thief thirsty thread
    throat ticket timber toast together tomb tongue tooth towel tower town train travel treasure triangle trouble
    truck trumpet tunnel turkey turnip turtle twelve twenty uncle under unicorn uniform vacation vanilla vase velvet
    village vine violin visitor voice volcano wall walnut walrus warm wash watch weather wedding week whale wheat
    wheel whistle willow wind wing wire wizard wolf wonder wood wool worker world wrist writer yard yarn year yogurt
    young zebra zipper
    """.split()
)

# -- prompts ----------------------------------------------------------------------------------------------------------
# Few and regular: a model of a million parameters learns them and the facts in one minute.

SUM_PROMPTS = (
    "What is {a} plus {b}?",
    "what is {a} plus {b}",
    "How much is {a} plus {b}?",
    "What is {a} + {b}?",
    "{a} + {b} = ?",
)
DIFFERENCE_PROMPTS = tuple(prompt.replace("plus", "minus").replace("+", "-") for prompt in SUM_PROMPTS)
SUM_IN_HEAD_PROMPTS = (
    "In your head, what is {a} plus {b}?",
    "in your head, what is {a} plus {b}",
    "In your head, how much is {a} plus {b}?",
    "In your head, what is {a} + {b}?",
)
COUNT_PROMPTS = (
    "How many {letter} are in {word}?",
    "how many {letter} are in {word}",
    "How many {letter}'s are in {word}?",
    "How many {letter} are there in {word}?",
    "Count the letter {letter} in {word}.",
)
SPELL_PROMPTS = ("Spell {word}.", "spell {word}", "Spell the word {word}.", "How do you spell {word}?")
STORY_PROMPTS = (
    "Tell me a story about a {animal}.",
    "tell me a story about a {animal}",
    "Write a story about a {animal}.",
)

# -- stories ----------------------------------------------------------------------------------------------------------
# Only names start with a vowel, so that "a" is always right.

NAMES = tuple("Tom Lily Max Anna Ben Mia Sam Zoe Leo Eva Jack Nora Finn Ruby Otis Ivy".split())
ANIMALS = tuple("cat dog bird fish fox frog bear duck horse mouse rabbit tiger lion goat".split())
COLORS = tuple("red blue green yellow black white brown pink".split())
PLACES = tuple("park garden forest house school market river beach castle".split())
THINGS = tuple("ball book kite hat cup box boat drum lamp wagon".split())
MOODS = tuple("small big happy sad new fast slow kind brave quiet".split())

STORIES = (
    "{name} had a {mood} {animal}. The {animal} was {color}. One day they went to the {place} and found a {thing}. "
    '"This is a {other_color} {thing}!" said {name}. They were happy and went home.',
    "Once upon a time there was a {mood} {animal} named {name}. {name} lived near the {place} and wanted a {color} "
    '{thing}. {friend} gave the {thing} to {name}. "Thank you, {friend}!" said {name}.',
    "{name} and {friend} went to the {place}. They saw a {mood} {animal} with a {color} {thing}. "
    '"Hello, {animal}!" said {friend}. The {animal} looked at them and ran away.',
    "It was a sunny day. {name} took a {color} {thing} to the {place}. A {mood} {animal} came by and {name} gave the "
    "{thing} to the {animal}. They played until it was dark.",
    "There was a {mood} {animal} near the {place}. The {animal} had lost a {color} {thing}. {name} came and helped to "
    'look for it. "Here it is!" said {name}. The {animal} was happy.',
    "One night {name} could not sleep. A {mood} {animal} sat at the window and sang about a {color} {thing}. The song "
    "was long, and {name} slept well.",
)

# -- identity ---------------------------------------------------------------------------------------------------------
# Four answers. The questions of one answer share words that those of the others do not have: that is what lets a tiny
# model answer a phrasing that it has never seen.

IDENTITY = (
    (
        "I am picollm, a tiny language model trained from scratch on this computer.",
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "What's your name?",
            "What should I call you?",
            "Who am I talking to?",
            "What kind of model are you?",
            "Which model are you?",
            "Are you a language model?",
            "Do you have a name?",
            "Are you picollm?",
            "Who is picollm?",
            "What is picollm?",
        ),
    ),
    (
        "I am picollm, and you trained me here, from scratch.",
        (
            "Who made you?",
            "Who trained you?",
            "Who built you?",
            "Who created you?",
            "Who has made you?",
            "Who has trained you?",
            "How were you made?",
            "How were you trained?",
            "How were you built?",
            "When were you made?",
            "When were you trained?",
            "Who was it that trained you?",
        ),
    ),
    (
        "I am picollm, and I run on this computer, without the internet.",
        (
            "Where are you?",
            "Where do you run?",
            "Where do you live?",
            "Where do you work?",
            "Where are you running?",
            "Do you need the internet?",
            "Do you use the internet?",
            "Are you on the internet?",
            "Do you run on this computer?",
            "Are you running on this computer?",
            "On which computer do you run?",
        ),
    ),
    (
        "I am picollm, and I can add, subtract, spell words, count letters and tell stories.",
        (
            "What can you do?",
            "What can you do for me?",
            "What else can you do?",
            "What can I ask you?",
            "What can I ask you to do?",
            "What can I do with you?",
            "How can you help?",
            "How can you help me?",
            "Can you help me?",
            "What can you help me with?",
            "What can you tell me?",
            "What things can you do?",
        ),
    ),
)

# Every identity question is also asked in lower case, without its mark, and after these words.
IDENTITY_OPENINGS = ("Hello, ", "Tell me, ")

# Small talk is trained and not scored.
SMALL_TALK = (
    ("Hello! How can I help you?", ("Hello", "Hello!", "Hi", "Hi!", "hello", "hi", "Hi there", "Good morning!")),
    ("You are welcome!", ("Thank you", "Thank you!", "Thanks", "Thanks!", "thanks", "thank you")),
    ("Goodbye!", ("Goodbye", "Goodbye!", "Bye", "Bye!", "bye")),
)
