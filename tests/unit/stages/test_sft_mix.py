"""Fine-tuning on several datasets: exact shares of tokens, the same rows after a stop, and what is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picollm.data.conversations import Conversation
from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset
from picollm.errors import ConfigError, Interrupted
from picollm.events import read_all
from picollm.files import write_json
from picollm.manifest import write_manifest
from picollm.report.collect import collect
from picollm.run_dir import StageDir, run_named
from picollm.stages import pretrain, sft
from picollm.tokenizer.chat_format import render
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import checkpoint
from tests.unit.stages.test_pretrain import QuietWorker
from tests.unit.stages.test_training import RECIPE, RUNTIME

T = 48
MODEL = RECIPE["model"] | {"max_position_embeddings": T}
# name -> (conversations, words in a reply)
KINDS = {"few": (7, 12), "many": (90, 2), "other": (30, 5)}
STEPS = 60
MakeStage = Callable[..., StageDir]


def talk(question: str, words: int) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "so it is " * words}]
    return Conversation.from_json({"messages": messages})


def write(name: str, train: list[Conversation], validation: list[Conversation]) -> Dataset:
    with DatasetWriter(name) as writer:
        writer.start("conversations")
        for split, conversations in (("train", train), ("validation", validation)):
            for conversation in conversations:
                writer.add(split, conversation)
        return writer.publish({"from": "a test"})[0]


class StopsAt(QuietWorker):
    """Is asked to stop when it has done so many steps."""

    def __init__(self, stage: StageDir, step: float) -> None:
        super().__init__(stage)
        self.last = step

    def event(self, kind: str, **fields: Any) -> None:
        super().event(kind, **fields)
        self.stops = self.stops or (kind == "step" and fields["step"] >= self.last)


def train(stage: StageDir, stop_at: float = math.inf) -> None:
    worker = StopsAt(stage, stop_at)
    try:
        {"pretrain": pretrain, "sft": sft}[stage.name].main(worker)
    finally:
        worker.events.close()


@pytest.fixture
def make_stage(clean_environment: Path, tokenizer: Tokenizer) -> MakeStage:
    """The stage `sft` of a run whose pretraining is over, on datasets with weights."""
    for name, (size, words) in KINDS.items():
        write(name, [talk(f"{name} {i}", words) for i in range(size)], [talk(f"{name} held back", words)])
    with DatasetWriter("words") as writer:
        writer.start("text")
        writer.add("train", "some words")
        writer.add("validation", "other words")
        writer.publish({"from": "a test"})

    def make(run_name: str, weights: list[tuple[str, float]], **changed: Any) -> StageDir:
        run = run_named(run_name)
        tokenizer.save(run.tokenizer)
        first = RECIPE | {"model": MODEL, "batch_tokens": T * 2, "tokenizer_sha256": tokenizer.sha256}
        prepare(run.stage("pretrain"), first, [("words", 1.0)])
        train(run.stage("pretrain"))
        first |= {"stage": "sft", "packing": "whole", "steps": STEPS} | changed
        return prepare(
            run.stage("sft"), first | {"init_from": checkpoint.load_model(run.stage("pretrain")).sha256}, weights
        )

    return make


def prepare(stage: StageDir, recipe: dict[str, Any], weights: list[tuple[str, float]]) -> StageDir:
    data = [{"dataset": name, "sha256": Dataset.open(name).sha256, "weight": weight} for name, weight in weights]
    config = {"recipe": recipe | {"data": data}, "runtime": RUNTIME | {"checkpoint_every": 20}}
    write_json(stage.config_path, {"schema": 1, "stage": stage.name, **config})
    return stage


def test_shares_are_exact_and_stand_in_record_and_manifest(make_stage: MakeStage, tokenizer: Tokenizer) -> None:
    stage = make_stage("r", [("few", 3.0), ("many", 1.0), ("few", 1.0)])  # a dataset may be named twice
    train(stage)
    data = stage.record()["result"]["data"]
    assert [part["dataset"] for part in data] == ["few", "many", "few"]
    drawn = sum(part["tokens"] for part in data)
    # What is furthest behind comes next, so no share is off by more than a conversation.
    longest = max(len(render(tokenizer, talk(f"{name} 10", words))[0]) for name, (_, words) in KINDS.items())
    for part, weight in zip(data, (3.0, 1.0, 1.0), strict=True):
        assert abs(part["tokens"] - weight / 5 * drawn) <= longest
        assert part["share"] == pytest.approx(part["tokens"] / drawn, abs=1e-6)
        assert part["epochs"] == pytest.approx(part["documents"] / KINDS[part["dataset"]][0], abs=1e-4)
    assert data[0]["epochs"] > 1 > data[1]["epochs"]
    assert write_manifest(stage.run)["data"]["sft"] == data
    write_json(stage.run.config_path, {"schema": 1, "preset": "demo", "sources": {}, "config": {}})
    shown = collect(stage.run)["data"]["sft"]
    assert [(part["tokens"], part["weight"]) for part in shown] == [
        (part["tokens"], weight) for part, weight in zip(data, (3.0, 1.0, 1.0), strict=True)
    ]


def test_a_stop_changes_nothing(make_stage: MakeStage) -> None:
    weights = [("few", 1.0), ("many", 2.0), ("other", 1.5)]
    whole, stopped = make_stage("whole", weights), make_stage("stopped", weights)
    train(whole)
    with pytest.raises(Interrupted):
        train(stopped, stop_at=27)
    assert 0 < max(stopped.finished_steps()) < STEPS
    train(stopped)
    assert checkpoint.load_model(stopped).sha256 == checkpoint.load_model(whole).sha256
    assert stopped.record()["result"]["data"] == whole.record()["result"]["data"]


@pytest.mark.parametrize("why", ["too long", "all held back"])
def test_a_dataset_of_which_nothing_would_be_read_is_an_error(make_stage: MakeStage, why: str) -> None:
    lost = [talk(f"{i} and on it goes " * T, 2) for i in range(3)]
    write("lost", *((lost, []) if why == "too long" else ([], lost)))
    stage = make_stage("r", [("many", 9.0), ("lost", 1.0)])
    with pytest.raises(ConfigError, match="nothing to fine-tune on in `lost`") as caught:
        train(stage)
    assert (f"after {T} tokens" if why == "too long" else "validation") in (caught.value.cause or "")


def test_what_is_left_out_is_told_for_each_dataset(make_stage: MakeStage) -> None:
    too_long = talk("on and on it goes " * T, 2)
    write("mixed", [talk(f"a {i}", 2) for i in range(4)] + [too_long], [too_long])
    stage = make_stage("r", [("many", 1.0), ("mixed", 1.0)])
    train(stage)
    notes = [event["text"] for event in read_all(stage.events_path) if event["kind"] == "note"]
    assert any(text.startswith("train: left out 1 of the conversations of `mixed`") for text in notes)
    assert any(text.startswith("validation: left out 1 of the conversations,") for text in notes)
    assert stage.record()["result"]["data"][1]["documents"] > 4, "the others are repeated for their share"
