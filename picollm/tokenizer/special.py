"""The nine special tokens and the split regexes: what every file and every exporter must agree on."""

from __future__ import annotations

from typing import Literal

Digits = Literal[1, 2]

BOS = "<|bos|>"
USER_START = "<|user_start|>"
USER_END = "<|user_end|>"
ASSISTANT_START = "<|assistant_start|>"
ASSISTANT_END = "<|assistant_end|>"
PYTHON_START = "<|python_start|>"
PYTHON_END = "<|python_end|>"
OUTPUT_START = "<|output_start|>"
OUTPUT_END = "<|output_end|>"

# In the order of their ids, which are the last of the vocabulary: a base model and its chat model share all others.
SPECIALS = (
    BOS,
    USER_START,
    USER_END,
    ASSISTANT_START,
    ASSISTANT_END,
    PYTHON_START,
    PYTHON_END,
    OUTPUT_START,
    OUTPUT_END,
)


def _split_pattern(digits: str) -> str:
    return (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    )


# Digits that may stand in one token -> the regex that splits text before BPE; the only ones a tokenizer may have.
# llama.cpp's `tokenizer.ggml.pre = "qwen2"` splits text in exactly the first way; it has no name for the second.
# Both keep the text `<|bos|>` from ever being one pre-token, so no merge can spell a special token.
SPLIT_PATTERNS: dict[Digits, str] = {1: _split_pattern(r"\p{N}"), 2: _split_pattern(r"\p{N}{1,2}")}
