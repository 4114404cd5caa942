"""Over a hundred short texts on which tokenizers like to disagree: what every export's tokenizer must get right."""

from __future__ import annotations

from picollm.tokenizer.samples import NASTY, SAMPLES
from picollm.tokenizer.special import SPECIALS

_SCRIPTS = (
    "Ünïcödé çedilla ñandú Øresund Łódź ęąśćż", "Þetta er íslenska", "Tiếng Việt có dấu",
    "İstanbul ıI iİ ǆ ǅ", "Привет, мир! ёЁ їґ", "Γειά σου Κόσμε ς σ", "Հայերեն տեքստ", "ქართული ენა",
    "עברית עם ניקוד שָׁלוֹם", "العربية مع تشكيل مَرْحَبًا", "فارسی می‌خواهم", "اردو زبان",
    "हिन्दी क्षत्रिय", "বাংলা ভাষা", "தமிழ் மொழி", "తెలుగు భాష", "ಕನ್ನಡ", "മലയാളം", "සිංහල",
    "ไทยไม่มีช่องว่าง", "ພາສາລາວ", "བོད་ཡིག", "မြန်မာဘာသာ", "ភាសាខ្មែរ", "አማርኛ", "ᏣᎳᎩ", "ᐃᓄᒃᑎᑐᑦ", "ᚠᚢᚦᚨᚱᚲ",
    "中文没有空格", "繁體中文", "日本語のカナ混じり文", "ｱｲｳ ＡＢＣ １２３", "한국어 띄어쓰기", "ⵜⴰⵎⴰⵣⵉⵖⵜ",
    "ߒߞߏ", "𐌰𐌱𐌲 𒀀𒀁 𓀀", "ꦗꦮ", "ᬩᬮᬶ",
)  # fmt: skip
_SYMBOLS = (
    "😀😃😄", "👨\u200d💻👩🏾\u200d🚀", "❤️ ❤ ♥︎", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "1️⃣2️⃣#️⃣", "🧑🏻\u200d🤝\u200d🧑🏿", "→ ⇒ ∀x∈ℝ: x²≥0",
    "€£¥₹₿¢", "½ ⅓ ¾ ① Ⅳ ㊿ ²³¹", "“quotes” ‘single’ «guillemets» „low“", "em—dash en–dash minus− hyphen-",
    "…⋯···", "†‡§¶•◦‣", "♔♕♖ ♠♥ ☯", "a\u0300a\u0301a\u0302\u0303\u0304", "Z͑ͫa̴l̷g̶o̸",
    "\u202ertl override\u202c", "soft\u00adhyphen", "\u2028line\u2029para",
)  # fmt: skip
_NUMBERS = (
    "7", "42", "007", "1000000", "12345678901234567890", "3.14", "-1.5e+10", "1,234,567.89", "0xDEADBEEF",
    "1/2 3:4", "v1.2.3-rc4", "2026-11-21T14:50:00+01:00", "١٢٣٤٥", "१२३४", "一二三", "abc123def456",
    "1st 2nd 3rd", "50%off", "€9.99",
)  # fmt: skip
_CODE = (
    "def f(x):\n    return x ** 2  # square\n", "int main(void) { return 0; }\n", "for(;;){i++;--j;}",
    "a->b.c[d]::e<f>", "<div class=\"x\">&amp;</div>", "SELECT * FROM t WHERE a='b';",
    "{\"k\": [1, 2.5, null]}", "```python\nprint()\n```", "\tif\t(x)\n\t\ty();\r\n", "#!/bin/sh\nset -eu\n",
    "$HOME/${x:-y} `cmd` \\n \\t", "x = y if z else w", "λ x → x",
    "camelCaseIdentifier snake_case_name SCREAMING_CASE kebab-case", "_ __ ___ __init__",
    "a=b==c!=d<=e>=f&&g||h", "/* c */ // c -- c ; c % c",
)  # fmt: skip
_SPACES = (
    "  two", "two  ", "a  b   c    d", "\t", "\t\tx", "\n", "\nx", "x\n", "x\n\n\ny", " \n ", "\r",
    "a\r\nb", "\u00a0", " \u00a0 ", "\u3000全角", "\u2009thin", "\u200b", "a\u200db", "x \t\n\r y", "\v\f",
    "\x1b[31mred", "\u0085next",
)  # fmt: skip
_CONTRACTIONS = (
    "I'm you're he's we'll they'd I've don't", "I'M YOU'RE HE'S WE'LL THEY'D I'VE DON'T", "'s's's",
    "’s curly don’t", "o'clock 'tis rock'n'roll", "' '' ''' x'y", "'ſ 'K",
)  # fmt: skip
_SPECIAL_TEXT = (
    *SPECIALS, "<|bos|", "|bos|>", "<|BOS|>", "<|bos |>", "a<|bos|>b", " <|assistant_end|> ",
    "<|user_start|><|user_end|>", "<s></s><unk><pad>", "<|im_start|>user", "<|endoftext|>",
    "[INST] [/INST]", "<0x0A>",
)  # fmt: skip

STRINGS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *NASTY, *(text for texts in SAMPLES.values() for text in texts), *_SCRIPTS, *_SYMBOLS, *_NUMBERS, *_CODE,
            *_SPACES, *_CONTRACTIONS, *_SPECIAL_TEXT,
        )
    )
)  # fmt: skip
# Ordinary English, for logits on what a model is made for.
PROMPTS: tuple[str, ...] = SAMPLES["prose"] + SAMPLES["code"] + SAMPLES["numbers"]


def has_special(text: str) -> bool:
    """True when a runtime that looks for special tokens in text would find one."""
    return any(special in text for special in SPECIALS)
