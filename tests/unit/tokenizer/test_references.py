"""Published tokenizers beside ours, from small files in their formats; nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from picollm.errors import ConfigError, MissingArtifact
from picollm.tokenizer import references
from picollm.tokenizer.quality import evaluate
from picollm.tokenizer.references import PUBLISHED, find_references, open_reference
from picollm.tokenizer.tokenizer import Tokenizer, byte_alphabet

MERGED = (b"th", b"the", b" the", b"at", b"cat", b" c", b" cat", b"12", b"123")


def ranks(merged: tuple[bytes, ...] = MERGED) -> bytes:
    """A `.tiktoken` file: the single bytes in GPT-2's order, then what was merged."""
    tokens = [*(bytes([byte]) for byte in byte_alphabet().values()), *merged]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture
def caches(tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "hf"), "TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}


@pytest.fixture
def in_tiktokens_cache(caches: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small ranks where tiktoken would have left GPT-4's."""
    published = PUBLISHED["GPT-4"]
    path = Path(caches["TIKTOKEN_CACHE_DIR"]) / published.cache_key
    path.parent.mkdir()
    path.write_bytes(ranks())
    known = replace(published, sha256=hashlib.sha256(ranks()).hexdigest())
    monkeypatch.setitem(references.PUBLISHED, "GPT-4", known)
    return path


def test_nothing_here(caches: dict[str, str]):
    found, absent = find_references(caches)
    assert found == []
    assert list(absent) == ["GPT-2", "GPT-4"]
    assert "caches" in absent["GPT-2"]


def test_ranks_of_tiktokens_cache(caches: dict[str, str], in_tiktokens_cache: Path):
    (found,), absent = find_references(caches)
    assert (found.name, found.path, found.vocab_size) == ("GPT-4", in_tiktokens_cache, 256 + len(MERGED))
    assert list(absent) == ["GPT-2"]
    # " the" and " cat" whole; three digits a piece, so 12345 is 123|45 and 45 is no token.
    assert found.count(["the cat", " the cat"]) == 2 + 2
    assert found.count(["12345"]) == 3
    assert found.count(["ca"]) == 2
    assert found.count(["日"]) == 3
    assert found.count([]) == 0


def test_damaged_ranks_count_as_absent(caches: dict[str, str], in_tiktokens_cache: Path):
    in_tiktokens_cache.write_bytes(ranks()[:-4])
    found, absent = find_references(caches)
    assert found == []
    assert f"`{in_tiktokens_cache}` is damaged" in absent["GPT-4"]


@pytest.mark.parametrize(
    "data", [b"YQ== 0\nYQ 1\n", b"YQ==\n", b"YQ== x\n", ranks((b"the",))], ids=["base64", "torn", "rank", "merge"]
)
def test_ranks_that_are_no_bpe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches: dict[str, str], data: bytes):
    path = tmp_path / "tiktoken" / PUBLISHED["GPT-2"].cache_key
    path.parent.mkdir()
    path.write_bytes(data)
    known = replace(PUBLISHED["GPT-2"], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(references.PUBLISHED, "GPT-2", known)
    found, absent = find_references(caches)
    assert found == [] and "damaged" in absent["GPT-2"]


@pytest.mark.parametrize("hub_name", PUBLISHED["GPT-2"].hub_names)
def test_tokenizer_of_the_hubs_cache(caches: dict[str, str], tokenizer: Tokenizer, hub_name: str):
    folder = Path(caches["HF_HOME"]) / "hub" / f"models--{hub_name.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(tokenizer.json)
    (found,), absent = find_references(caches)
    assert (found.name, found.path) == ("GPT-2", folder / "tokenizer.json")
    assert found.count(["The cat sat.", "x"]) == len(tokenizer.encode("The cat sat.")) + 1
    assert list(absent) == ["GPT-4"]
    # The hub's cache has a variable of its own, which goes before.
    elsewhere = caches | {"HF_HUB_CACHE": str(folder.parents[2])}
    assert len(find_references(elsewhere | {"HF_HOME": "/nowhere"})[0]) == 1


def test_a_damaged_snapshot_gives_way_to_the_next_file(caches: dict[str, str], in_tiktokens_cache: Path):
    folder = Path(caches["HF_HOME"]) / "hub/models--Xenova--gpt-4/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{")
    (found,), _ = find_references(caches)
    assert found.path == in_tiktokens_cache


def test_files_that_the_user_names(tmp_path: Path, in_tiktokens_cache: Path):
    words = tmp_path / "other.json"
    tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(words))
    assert open_reference(words).name == "other.json"
    assert open_reference(in_tiktokens_cache).name == "GPT-4"
    with pytest.raises(MissingArtifact, match="there is no tokenizer"):
        open_reference(tmp_path / "gone.json")
    with pytest.raises(MissingArtifact):
        open_reference(tmp_path)
    other = tmp_path / "other.tiktoken"
    other.write_bytes(ranks((b"ab",)))  # ranks of an encoding whose regex nobody has told us
    with pytest.raises(ConfigError, match="can be measured"):
        open_reference(other)
    other.write_text(json.dumps({"hello": 1}))
    with pytest.raises(ConfigError):
        open_reference(other)


def test_long_runs_of_spaces_are_cut_for_them_too(in_tiktokens_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("picollm.tokenizer.tokenizer.MAX_SPACE_RUN", 3)
    assert open_reference(in_tiktokens_cache).count([" " * 10]) == 10


def test_bytes_per_token_beside_ours(in_tiktokens_cache: Path, caches: dict[str, str], tokenizer: Tokenizer):
    found, _ = find_references(caches)
    quality = evaluate(tokenizer, {"validation": iter([" the cat"] * 300), "empty": []}, found)
    assert list(quality.beside) == ["GPT-4"]
    assert list(quality.beside["GPT-4"]) == list(quality.kinds)
    assert quality.beside["GPT-4"]["validation"] == 4.0  # eight bytes in two tokens
    assert 1 <= quality.beside["GPT-4"]["other scripts"] < 1.5
