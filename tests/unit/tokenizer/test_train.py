from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from picollm.errors import ConfigError, IntegrityError
from picollm.tokenizer.special import SPECIALS, SPLIT_PATTERNS, Digits
from picollm.tokenizer.train import capped, train

TEXT = ["the cat sat on the mat and the other cat sat too", "once upon a time there was a cat"]


@pytest.mark.parametrize("digits", [1, 2])
def test_file_has_exactly_the_promised_pipeline(digits: Digits):
    data = json.loads(train(iter(TEXT * 2), 300, digits=digits)._json)
    assert data["normalizer"] is None
    assert data["post_processor"] is None
    assert data["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT_PATTERNS[digits]}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }
    assert data["decoder"]["type"] == "ByteLevel"
    model = data["model"]
    assert (model["type"], model["ignore_merges"], model["byte_fallback"]) == ("BPE", False, False)
    assert (model["unk_token"], model["dropout"]) == (None, None)
    size = len(model["vocab"])
    assert [(token["content"], token["id"]) for token in data["added_tokens"]] == [
        (text, size + i) for i, text in enumerate(SPECIALS)
    ]
    assert all(token["special"] and not token["normalized"] for token in data["added_tokens"])
    assert len(model["merges"]) == size - 256


def test_split_pattern_is_the_one_llama_cpp_knows():
    # Written out once more on purpose: a change of this string silently ends GGUF parity.
    one = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert {1: one, 2: one.replace(r"|\p{N}| ", r"|\p{N}{1,2}| ")} == SPLIT_PATTERNS


def test_vocab_size_counts_the_specials():
    tokenizer = train(iter(TEXT * 20), 270)
    assert tokenizer.vocab_size == 270
    assert list(tokenizer.special.values()) == list(range(261, 270))


def test_little_text_gives_a_smaller_vocabulary():
    tokenizer = train(iter(["abab"]), 5000)
    assert tokenizer.vocab_size == 256 + 9 + 1  # `ab` occurs twice, `abab` once
    assert tokenizer.encode("abab") == [256, 256]


def test_every_digit_stands_alone():
    tokenizer = train(iter(["2024 2024 2024 1999"] * 50), 400)
    assert all(len(tokenizer.id_to_bytes(i)) == 1 for i in tokenizer.encode("20241999"))


def test_two_digits_may_stand_together():
    tokenizer = train(iter(["2024 2024 2024 1999"] * 50), 400, digits=2)
    assert tokenizer.digits == 2
    assert [tokenizer.id_to_bytes(i) for i in tokenizer.encode("20241999")] == [b"20", b"24", b"19", b"99"]
    # From the left, as the regex says, whatever stands before or behind.
    assert [tokenizer.id_to_bytes(i) for i in tokenizer.encode("a202")] == [b"a", b"20", b"2"]
    assert train(iter(["2024"] * 50), 400).digits == 1


@pytest.mark.parametrize("digits", [1, 2])
def test_specials_in_the_text_never_become_ordinary_tokens(digits: Digits):
    tokenizer = train(iter(["<|bos|><|assistant_start|>"] * 500), 1000, digits=digits)
    ordinary = {tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size - 9)}
    assert not ordinary & {text.encode() for text in SPECIALS}


def test_same_text_same_bytes_in_other_processes_and_with_other_threads():
    program = textwrap.dedent(
        """
        from picollm.tokenizer.train import train
        words = [f"w{i % 97}x{i % 31} y{i % 13} the of" for i in range(2000)]
        print(train(iter(words), 500).sha256)
        """
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | extra, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({"PYTHONHASHSEED": "1"}, {"RAYON_NUM_THREADS": "1"}, {"TOKENIZERS_PARALLELISM": "false"})
    }
    assert len(found) == 1


def test_capped_counts_characters():
    assert list(capped(["abcdef", "", "ghi", "jkl", "mno"], max_chars=9, doc_chars=4)) == ["abcd", "ghi", "jk"]


def test_capped_reads_no_more_than_it_needs():
    read = []

    def texts():
        for i in range(10):
            read.append(i)
            yield "xxxx"

    assert list(capped(texts(), max_chars=8, doc_chars=100)) == ["xxxx", "xxxx"]
    assert read == [0, 1]


def test_progress_comes_on_the_callers_thread_and_ends_at_the_total():
    seen: list[tuple[int, bool]] = []
    train(
        iter(TEXT), 300, on_progress=lambda n: seen.append((n, threading.current_thread() is threading.main_thread()))
    )
    assert seen[-1] == (sum(map(len, TEXT)), True)
    assert all(main for _, main in seen)


def test_no_text():
    with pytest.raises(ConfigError, match="no text"):
        train(iter([]), 300)


def test_vocabulary_without_room():
    with pytest.raises(ConfigError, match="vocab_size"):
        train(iter(TEXT), 264)


def test_errors_of_the_texts_arrive_whole():
    def texts():
        yield "a few words"
        raise IntegrityError("shard is torn", hint="do this")

    with pytest.raises(IntegrityError) as caught:
        train(texts(), 300)
    assert caught.value.hint == "do this"


def test_ctrl_c_stops_while_texts_are_read():
    given = 0

    def endless():
        nonlocal given
        while True:
            given += 1
            if given == 2000:
                os.kill(os.getpid(), signal.SIGINT)
            yield "some text that never ends"

    with pytest.raises(KeyboardInterrupt):
        train(endless(), 300)
    alive = [thread for thread in threading.enumerate() if thread.name == "tokenizer-training" and thread.is_alive()]
    assert not alive


@pytest.mark.parametrize("character", [" ", "a", "="])
def test_very_long_words_do_not_take_hours(character: str):
    text = character * 300_000
    tokenizer = train(iter([text, "ab ab"]), 300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_runs_of_white_space_that_the_regex_engine_gives_up_on():
    text = "a" + " " * 11_000_000 + "b"
    tokenizer = train(iter(["a b a b"]), 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(["x", text])[1] == ids
