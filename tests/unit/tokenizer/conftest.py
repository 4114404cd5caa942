"""One small tokenizer for all tests of the folder, and the strings that break careless ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from picollm.tokenizer.tokenizer import Tokenizer
from picollm.tokenizer.train import train

GOLDEN = Path(__file__).parents[2] / "golden"
TEXT = (
    "The cat sat on the mat. The cats sat on the mats, and they'll sit there all day.\n\n",
    "What is 7 plus 5? 7 plus 5 is 12. The answer is 12. Who are you? I am picollm.\n",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, 1))\n",
    "Привет, мир! 你好,世界。 naïve café 👍🏽 don't DON'T\r\n",
)


@pytest.fixture(scope="session")
def nasty() -> list[str]:
    entries = json.loads((GOLDEN / "nasty_strings.json").read_text(encoding="utf-8"))["strings"]
    return [entry["text"] for entry in entries]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(iter(TEXT * 3), 400)


@pytest.fixture(scope="session")
def two_digits() -> Tokenizer:
    """The other pipeline, with numbers in its text so that pairs of digits become tokens."""
    return train(iter((*TEXT, "1999 2024 12 12 2024 12.5\n") * 3), 420, digits=2)
