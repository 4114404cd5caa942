from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from picollm.config.schema import RunConfig
from picollm.data.importer import import_paths
from picollm.errors import ConfigError, MissingArtifact
from picollm.files import write_json
from picollm.run_dir import RunDir, run_named
from picollm.tokenizer import stage as stage_module
from picollm.tokenizer.stage import train_stage
from picollm.tokenizer.tokenizer import Tokenizer

WORDS = ["river", "stone", "window", "garden", "letter", "morning", "paper", "silver", "winter", "answer"]


@pytest.fixture
def notes(tmp_path: Path) -> str:
    lines = []
    for i in range(120):
        text = " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(30))
        lines.append(json.dumps({"text": f"Note {i}. {text}."}))
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(lines) + "\n")
    import_paths("notes", [path])
    return "notes"


def config(dataset: str, **tokenizer: int) -> RunConfig:
    return RunConfig(data={"dataset": dataset}, tokenizer={"vocab_size": 300, **tokenizer})


@pytest.fixture
def run() -> RunDir:
    return run_named("r")


def test_trains_once(run: RunDir, notes: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    record = train_stage(run, config(notes), on_progress=lambda done, total: seen.append((done, total)))
    tokenizer = Tokenizer.load(run.tokenizer)
    assert record == json.loads((run.tokenizer / "STAGE.json").read_text())
    assert record["result"]["vocab_size"] == tokenizer.vocab_size == 300
    assert record["result"]["sha256"] == tokenizer.sha256
    assert seen[-1] == (record["result"]["chars"],) * 2
    assert set(record["outputs"]) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "token_bytes.json",
    }

    def must_not_train(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(stage_module, "train", must_not_train)
    assert train_stage(run, config(notes)) == record


def test_reads_only_the_training_split_and_obeys_the_caps(run: RunDir, notes: str):
    from picollm.data.datasets import Dataset

    whole = train_stage(run, config(notes))
    dataset = Dataset.open(notes)
    assert whole["result"]["documents"] == dataset.rows("train") < 120
    assert whole["result"]["chars"] == dataset.chars("train")
    capped = train_stage(run_named("capped"), config(notes, max_chars=1000, doc_chars=150))
    assert (capped["result"]["chars"], capped["result"]["documents"]) == (1000, 7)


def test_same_run_twice_is_the_same_bytes(notes: str):
    first, second = run_named("a"), run_named("b")
    train_stage(first, config(notes))
    train_stage(second, config(notes))
    for path in first.tokenizer.iterdir():
        other = (second.tokenizer / path.name).read_bytes()
        assert path.read_bytes() == other, path.name


@pytest.mark.parametrize("name", ["tokenizer.json", "token_bytes.json"])
@pytest.mark.parametrize("damage", ["torn", "changed", "gone"])
def test_damage_is_repaired_and_nothing_is_lost(run: RunDir, notes: str, name: str, damage: str):
    record = train_stage(run, config(notes))
    path = run.tokenizer / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:100] if damage == "torn" else data[:-2] + b" \n")
    assert train_stage(run, config(notes)) == record
    assert path.read_bytes() == data
    assert len(list((run.path / "old").iterdir())) == 1


def test_other_settings_make_another_tokenizer(run: RunDir, notes: str):
    first = train_stage(run, config(notes))
    second = train_stage(run, config(notes, vocab_size=290))
    assert second["result"]["vocab_size"] == 290
    (old,) = (run.path / "old").iterdir()
    assert json.loads((old / "STAGE.json").read_text()) == first


def test_two_digits_are_another_tokenizer(run: RunDir, notes: str):
    first = train_stage(run, config(notes))
    assert first["result"]["digits"] == 1
    second = train_stage(run, config(notes, digits=2))
    assert second["result"]["digits"] == Tokenizer.load(run.tokenizer).digits == 2
    assert second["result"]["sha256"] != first["result"]["sha256"]
    assert len(list((run.path / "old").iterdir())) == 1
    # One digit a token is what a recipe without the word means: tokenizers made before there was a choice stay.
    assert train_stage(run, config(notes, digits=1))["inputs"]["recipe"] == first["inputs"]["recipe"]


def test_documents_come_in_the_datasets_order(run: RunDir, notes: str, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    real = stage_module.train

    def listening(texts: Iterator[str], vocab_size: int, **rest: object) -> Tokenizer:
        read.extend(texts)
        return real(iter(read), vocab_size, **rest)

    monkeypatch.setattr(stage_module, "train", listening)
    train_stage(run, config(notes, max_chars=3000, doc_chars=100))
    from picollm.data.datasets import Dataset

    every = list(Dataset.open(notes).documents("train"))
    assert len(read) == 30 and read == [text[:100] for text in every[:30]]


def test_killed_before_the_record_starts_again(run: RunDir, notes: str):
    record = train_stage(run, config(notes))
    (run.tokenizer / "STAGE.json").unlink()
    (run.tokenizer / "tokenizer.json").write_bytes(b"half")
    assert train_stage(run, config(notes)) == record


def test_toy_world_reads_the_conversations_too(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    real = stage_module.train

    def listening(texts: Iterator[str], vocab_size: int, **rest: object) -> Tokenizer:
        read.extend(texts)
        return real(iter(read), vocab_size, **rest)

    monkeypatch.setattr(stage_module, "train", listening)
    record = train_stage(run, config("toy-world", max_chars=100_000))
    assert record["result"]["chars"] == 100_000
    from picollm.data.datasets import Dataset

    said = {
        "\n".join(part.text for message in conversation.messages for part in message.parts)
        for conversation in Dataset.open("toy-world-chat").conversations("train")
    }
    assert 0.3 < sum(text in said for text in read) / len(read) < 0.7


def test_unknown_dataset(run: RunDir):
    with pytest.raises(MissingArtifact):
        train_stage(run, config("nothing-here"))
    assert not run.tokenizer.exists()


def test_dataset_of_conversations(run: RunDir, tmp_path: Path):
    line = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    other = line.replace('"a"', '"c"')
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{line}\n{other}\n")
    import_paths("chats", [path])
    with pytest.raises(ConfigError, match="not text"):
        train_stage(run, config("chats"))


def test_dataset_without_text(run: RunDir, notes: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage_module.Dataset, "chars", lambda self, split=None: 0)
    with pytest.raises(ConfigError, match="no text"):
        train_stage(run, config(notes))
    assert not run.tokenizer.exists()


def test_a_trained_model_keeps_its_tokenizer(run: RunDir, notes: str):
    train_stage(run, config(notes))
    before = (run.tokenizer / "tokenizer.json").read_bytes()
    write_json(run.stage("pretrain").checkpoints / "step_000010" / "meta.json", {"schema": 1, "step": 10})
    with pytest.raises(ConfigError) as caught:
        train_stage(run, config(notes, vocab_size=310))
    assert "--force tokenizer" in (caught.value.hint or "")
    assert (run.tokenizer / "tokenizer.json").read_bytes() == before and not (run.path / "old").exists()
    # A damaged one is made again: from the same text it is the same.
    (run.tokenizer / "tokenizer.json").write_bytes(before[:-1])
    train_stage(run, config(notes))
    assert (run.tokenizer / "tokenizer.json").read_bytes() == before


def test_a_mixture_is_read_in_its_shares(run: RunDir, notes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} long text" + " goes on and on" * 80}) + "\n" for i in range(60)))
    import_paths("long", [path])
    read: list[str] = []
    real = stage_module.train

    def listening(texts: Iterator[str], vocab_size: int, **rest: object) -> Tokenizer:
        read.extend(texts)
        return real(iter(read), vocab_size, **rest)

    monkeypatch.setattr(stage_module, "train", listening)
    mixed = RunConfig(data={"mix": {notes: 1, "long": 3}}, tokenizer={"vocab_size": 300, "max_chars": 40_000})
    train_stage(run, mixed)
    assert sum(len(text) for text in read if "long text" in text) / 40_000 == pytest.approx(0.75, abs=0.05)
    again = RunConfig(data={"mix": {notes: 2, "long": 3}}, tokenizer={"vocab_size": 300, "max_chars": 40_000})
    assert train_stage(run, again) != train_stage(run, mixed), "the weights are part of what it is made from"
