"""How a conversation becomes tokens: one renderer for ids and loss mask, and the same rules as a Jinja template.

    <|bos|><|user_start|>system⏎⏎text<|user_end|><|assistant_start|>text<|python_start|>7+5<|python_end|>
    <|output_start|>12<|output_end|>text<|assistant_end|><|user_start|>…

The loss is on for all that the assistant says after `<|assistant_start|>`, the tool's output included: a runtime
without the calculator (llama.cpp) then guesses the result instead of derailing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from picollm.data.conversations import Conversation, Message
from picollm.tokenizer.special import (
    ASSISTANT_END,
    ASSISTANT_START,
    BOS,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    USER_END,
    USER_START,
)
from picollm.tokenizer.tokenizer import Tokenizer

# Every tag trims the white space around itself, because transformers and llama.cpp disagree on what else would; no
# text of a message is trimmed. `content` is a string or a list of parts, as in a dataset of conversations.
CHAT_TEMPLATE = f"""\
{{{{- bos_token -}}}}
{{%- set ns = namespace(system='') -%}}
{{%- for message in messages -%}}
    {{%- if message['content'] is string -%}}
        {{%- set parts = [{{'type': 'text', 'text': message['content']}}] -%}}
    {{%- else -%}}
        {{%- set parts = message['content'] -%}}
    {{%- endif -%}}
    {{%- if message['role'] == 'system' -%}}
        {{%- for part in parts -%}}
            {{%- set ns.system = ns.system + part['text'] -%}}
        {{%- endfor -%}}
        {{%- set ns.system = ns.system + '\\n\\n' -%}}
    {{%- elif message['role'] == 'user' -%}}
        {{{{- '{USER_START}' + ns.system -}}}}
        {{%- for part in parts -%}}
            {{{{- part['text'] -}}}}
        {{%- endfor -%}}
        {{{{- '{USER_END}' -}}}}
        {{%- set ns.system = '' -%}}
    {{%- elif message['role'] == 'assistant' -%}}
        {{{{- '{ASSISTANT_START}' -}}}}
        {{%- for part in parts -%}}
            {{%- if part['type'] == 'python' -%}}
                {{{{- '{PYTHON_START}' + part['text'] + '{PYTHON_END}' -}}}}
            {{%- elif part['type'] == 'python_output' -%}}
                {{{{- '{OUTPUT_START}' + part['text'] + '{OUTPUT_END}' -}}}}
            {{%- else -%}}
                {{{{- part['text'] -}}}}
            {{%- endif -%}}
        {{%- endfor -%}}
        {{{{- '{ASSISTANT_END}' -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
    {{{{- '{ASSISTANT_START}' -}}}}
{{%- endif -%}}
"""

_BLOCKS = {"python": (PYTHON_START, PYTHON_END), "output": (OUTPUT_START, OUTPUT_END)}


def render(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Ids of a whole conversation and, for each, 1 where the loss counts it as a target and 0 elsewhere.

    1 on the assistant's text, expressions, tool output, the four block marks and `<|assistant_end|>`; 0 on bos, user
    turns and `<|assistant_start|>`. Both lists have the same length.
    """
    ids: list[int] = []
    mask: list[int] = []
    for text, is_special, is_target in _pieces(conversation.messages):
        piece = [tokenizer.special[text]] if is_special else tokenizer.encode(text)
        ids += piece
        mask += [int(is_target)] * len(piece)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to and including `<|assistant_start|>` of the reply that is wanted.

    Raises:
        ValueError: the messages are not an optional system message, then user and assistant in turn, user last.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    wanted = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if [message.role for message in turns] != wanted or len(turns) % 2 == 0:
        raise ValueError("messages must be an optional system message, then user and assistant in turn, user last")
    ids: list[int] = []
    for text, is_special, _ in _pieces(messages):
        ids += [tokenizer.special[text]] if is_special else tokenizer.encode(text)
    return [*ids, tokenizer.special[ASSISTANT_START]]


def has_target(tokenizer: Tokenizer, conversation: Conversation, length: int) -> bool:
    """Whether training sees a token that carries loss when it reads at most T = `length` tokens behind the bos.

    False when all that comes before the first reply fills the row already. Most conversations are judged by their
    bytes, of which no text has fewer than tokens.
    """
    before = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        before.append(message)
    # Of the marks, bos lies before the row; `<|user_start|>`, `<|user_end|>`, `<|assistant_start|>` and the blank line
    # after a system message are in it, and so must be one token of the reply.
    marks = 4 + 2 * (len(before) - 1)
    if sum(len(message.text.encode()) for message in before) + marks <= length:
        return True
    return len(render_prompt(tokenizer, before)) <= length


def _pieces(messages: Sequence[Message]) -> Iterator[tuple[str, bool, bool]]:
    """(text, is it a special token, is it a target). Text between two specials is one piece, as BPE must see it."""
    yield BOS, True, False
    system = ""
    for message in messages:
        if message.role == "system":
            system = message.text + "\n\n"
        elif message.role == "user":
            yield USER_START, True, False
            yield system + message.text, False, False
            yield USER_END, True, False
            system = ""
        else:
            yield ASSISTANT_START, True, False
            for kind, parts in groupby(message.parts, key=lambda part: part.kind):
                if kind == "text":
                    yield "".join(part.text for part in parts), False, True
                    continue
                start, end = _BLOCKS[kind]
                for part in parts:
                    yield start, True, True
                    yield part.text, False, True
                    yield end, True, True
            yield ASSISTANT_END, True, True
