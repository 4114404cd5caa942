from __future__ import annotations

import json
import random

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from picollm.errors import IntegrityError, MissingArtifact
from picollm.run_dir import StageDir
from picollm.tokenizer.chat_format import CHAT_TEMPLATE
from picollm.tokenizer.special import SPECIALS
from picollm.tokenizer.tokenizer import StreamDecoder, Tokenizer, byte_alphabet, cut_space_runs
from picollm.tokenizer.train import train


def test_byte_alphabet_is_the_librarys():
    table = byte_alphabet()
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    two_bytes = {byte: character for character, byte in table.items()}
    for character in "aé \n\x00ÿĀ日":
        tokens = [two_bytes[byte] for byte in character.encode()]
        assert decoders.ByteLevel().decode(tokens) == character


def test_fixture_is_nasty_enough(nasty: list[str]):
    assert len(nasty) >= 100
    assert len(set(nasty)) == len(nasty)


def test_nasty_strings_come_back(tokenizer: Tokenizer, nasty: list[str]):
    for text in nasty:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.token_bytes[i] for i in ids) == len(text.encode())
        assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.encode_batch(nasty) == [tokenizer.encode(text) for text in nasty]


def test_agrees_with_the_library_on_plain_text(tokenizer: Tokenizer, nasty: list[str]):
    library = tokenizers.Tokenizer.from_str(tokenizer._json.decode())
    for text in nasty:
        if "<|" not in text:
            ids = library.encode(text).ids
            assert tokenizer.encode(text) == ids
            assert library.decode(ids) == tokenizer.decode(ids)


# Text of every kind, and text in which digits, marks of special tokens and white space meet more often than by chance.
TEXTS = st.text() | st.lists(
    st.sampled_from(["7", "12", "2024", "٣٤", "½", " ", "\n", "\r\n", "'s", "a", "é", "你", *SPECIALS, "<|", "|>"])
).map("".join)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, two_digits: Tokenizer, text: str):
    for each in (tokenizer, two_digits):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert sum(each.token_bytes[i] for i in ids) == len(text.encode())
        assert not set(ids) & set(each.special.values())
        decoder = StreamDecoder(each)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == text


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, max_size=5))
def test_a_batch_is_its_texts(two_digits: Tokenizer, texts: list[str]):
    assert two_digits.encode_batch(texts) == [two_digits.encode(text) for text in texts]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_no_token_of_text_holds_more_digits_than_promised(tokenizer: Tokenizer, two_digits: Tokenizer, text: str):
    for each in (tokenizer, two_digits):
        for i in each.encode(text):
            assert sum(48 <= byte < 58 for byte in each.id_to_bytes(i)) <= each.digits


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), length=st.integers(0, 40))
def test_streaming_any_ids_equals_decoding_them(tokenizer: Tokenizer, seed: int, length: int):
    ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=length)
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_half_a_character_is_held_back(tokenizer: Tokenizer):
    single = {tokenizer.id_to_bytes(i): i for i in range(256)}
    decoder = StreamDecoder(tokenizer)
    pushed = [decoder.push(single[bytes([byte])]) for byte in "a€".encode()]
    assert pushed == ["a", "", "", "€"]
    assert decoder.push(single[b"\xe2"]) == ""
    assert decoder.push(single[b"a"]) == "\ufffda"  # certain now that it was no character
    assert decoder.push(single[b"\xf0"]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_special_tokens_are_silent(tokenizer: Tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode("hi"), tokenizer.special["<|assistant_end|>"]]
    assert tokenizer.decode(ids) == "hi"
    assert StreamDecoder(tokenizer).push(tokenizer.bos) == ""
    assert [tokenizer.token_bytes[i] for i in tokenizer.special.values()] == [0] * 9


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_unknown_ids_are_refused(tokenizer: Tokenizer, bad: int):
    with pytest.raises(IndexError):
        tokenizer.decode([bad])


def test_lone_surrogate_is_a_value_error(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer.encode("a\ud800")


def test_cut_space_runs_loses_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("picollm.tokenizer.tokenizer.MAX_SPACE_RUN", 3)
    assert list(cut_space_runs("a" + " " * 7 + "b")) == ["a   ", "   ", " b"]
    assert list(cut_space_runs("a   b")) == ["a   b"]
    assert list(cut_space_runs("      ")) == ["   ", "   "]
    assert list(cut_space_runs("")) == [""]


# -- files ------------------------------------------------------------------------------------------------------------


def test_save_and_load(tokenizer: Tokenizer, tmp_path):
    folder = tmp_path / "runs" / "r" / "tokenizer"
    files = tokenizer.save(folder)
    names = ["chat_template.jinja", "token_bytes.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in files) == names == sorted(path.name for path in folder.iterdir())
    again = Tokenizer.load(folder)
    assert (again.sha256, again.vocab_size, again.special) == (tokenizer.sha256, 400, tokenizer.special)
    lengths = json.loads((folder / "token_bytes.json").read_text())
    assert lengths == [len(tokenizer.id_to_bytes(i)) for i in range(400)]
    assert lengths[-9:] == [0] * 9
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_missing_tokenizer_names_the_command(tmp_path):
    with pytest.raises(MissingArtifact) as caught:
        Tokenizer.load(tmp_path / "runs" / "d12" / "tokenizer")
    assert caught.value.message == "no tokenizer in run `d12`"
    assert caught.value.hint == "make it with `picollm tokenizer train --run d12`"


def test_torn_file(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="not a tokenizer of picollm"):
        Tokenizer.load(tmp_path)


def test_changed_bytes_against_the_record(tokenizer: Tokenizer, tmp_path):
    folder = tmp_path / "runs" / "r" / "tokenizer"
    files = tokenizer.save(folder)
    StageDir(folder).write_record({"recipe": "x"}, files, {})
    Tokenizer.load(folder)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")  # still a perfect tokenizer, but not the recorded one
    with pytest.raises(IntegrityError, match="not the file that was recorded") as caught:
        Tokenizer.load(folder)
    assert "picollm tokenizer train --run r" in caught.value.hint


def test_foreign_tokenizers_are_refused(tokenizer: Tokenizer, tmp_path):
    data = json.loads(tokenizer._json)
    data["added_tokens"] = data["added_tokens"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError) as caught:
        Tokenizer.load(tmp_path)
    assert "nine special tokens" in caught.value.cause


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFC"}},
        {"regex": r"\p{N}{1,3}"},
        {"regex": r"\p{N}{2}"},
    ],
)
def test_other_ways_to_split_text_are_refused(two_digits: Tokenizer, tmp_path, change: dict):
    data = json.loads(two_digits._json)
    if regex := change.get("regex"):
        pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,2}", regex)
    else:
        data |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(IntegrityError) as caught:
        Tokenizer.load(tmp_path)
    assert "two regexes" in caught.value.cause


def test_digits_are_part_of_the_file(tokenizer: Tokenizer, two_digits: Tokenizer, tmp_path):
    two_digits.save(tmp_path)
    assert Tokenizer.load(tmp_path).digits == 2 and tokenizer.digits == 1
    # Nothing but the regex need differ for it to be another tokenizer.
    one = train(iter(["a cat", "a cat"]), 270)
    two = train(iter(["a cat", "a cat"]), 270, digits=2)
    assert one.encode("a cat") == two.encode("a cat") and one.sha256 != two.sha256


def test_raw_bytes_of_every_id(tokenizer: Tokenizer, two_digits: Tokenizer):
    for each in (tokenizer, two_digits):
        # Of a part of a character, too: decoded alone it would be U+FFFD and count as three bytes.
        assert [len(each.id_to_bytes(i)) for i in range(each.vocab_size)] == each.token_bytes
        assert sorted(each.id_to_bytes(i) for i in range(each.vocab_size) if each.token_bytes[i] == 1) == [
            bytes([byte]) for byte in range(256)
        ]


def test_specials_tuple_is_complete(tokenizer: Tokenizer):
    assert tuple(tokenizer.special) == SPECIALS
    assert tokenizer.bos == 391
