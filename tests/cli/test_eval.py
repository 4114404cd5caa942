from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from picollm.errors import ConfigError, IntegrityError, Interrupted, MissingArtifact
from picollm.events import read_all
from picollm.files import sha256_file, sha256_json
from picollm.run_dir import RunDir, StageDir
from picollm_cli.main import app


def evaluate(*arguments: str):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["eval", *arguments], prog_name="picollm", standalone_mode=False)


def test_bpb_is_scored_once(tiny_run: Path) -> None:
    first = evaluate("--suite", "bpb", "--json")
    assert first.exception is None, first.exception
    *events, last = [json.loads(line) for line in first.stdout.splitlines()]
    assert [event["kind"] for event in events] == ["stage_start", "step", "eval", "stage_end"]
    assert (last["run"], last["stage"], last["step"]) == ("tiny", "sft", 10)
    score = last["suites"]["bpb"]["validation"]
    assert score["n"] == 12 and score["score"] > 1 and score["stderr"] > 0
    # Progress ends where it said that it would.
    assert events[0]["total_steps"] == events[1]["step"] == score["n"]
    assert events[2]["value"] == score["score"] and events[2]["n"] == 12
    folder = tiny_run / "eval/sft-bpb"
    record = json.loads((folder / "STAGE.json").read_text())
    assert set(record["outputs"]) == {"results.json"} and set(record["inputs"]) == {"recipe"}

    written = (folder / "events.jsonl").read_bytes()
    again = evaluate("--suite", "bpb", "--json")
    assert again.stdout.splitlines() == [json.dumps(last, ensure_ascii=False)]
    assert (folder / "events.jsonl").read_bytes() == written

    shown = evaluate("--suite", "bpb")
    assert "bits per byte" in shown.stdout and f"{score['score']:.4f}" in shown.stdout and "12" in shown.stdout


def test_what_does_not_apply(tiny_run: Path) -> None:
    chat = evaluate("--stage", "pretrain", "--suite", "chat").exception
    assert isinstance(chat, ConfigError) and "`bpb`" in chat.hint
    unknown = evaluate("--suite", "bbp").exception
    assert isinstance(unknown, ConfigError)
    assert isinstance(evaluate("--stage", "rl").exception, MissingArtifact)
    assert isinstance(evaluate("--stage", "stf").exception, ConfigError)
    assert isinstance(evaluate("--run", "other").exception, MissingArtifact)
    assert not (tiny_run / "eval").exists()


@pytest.mark.parametrize("setting", ["eval.questons=3", "eval.questions=0"])
def test_bad_settings(tiny_run: Path, setting: str) -> None:
    before = (tiny_run / "config.json").read_bytes()
    assert isinstance(evaluate("--set", setting).exception, ConfigError)
    assert (tiny_run / "config.json").read_bytes() == before


# -- the worker, in this process --------------------------------------------------------------------------------------


@pytest.fixture
def work() -> Iterator[Callable[[Path, str], StageDir]]:
    """Prepares a suite of the run and runs its stage here; signal handlers are put back."""
    import torch

    from picollm.stages.eval import main
    from picollm.worker import Worker
    from picollm_cli.prepare_stage import prepare_eval

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(folder: Path, suite: str, stage: str = "sft") -> StageDir:
        prepared = prepare_eval(RunDir(folder), stage, suite)
        worker = Worker(prepared, prepared.read_config(), rank=0, world=1)
        worker.device = torch.device("cpu")
        try:
            main(worker)
        finally:
            worker.events.close()
        return prepared

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def samples_of(stage: StageDir) -> list[dict]:
    return [json.loads(line) for line in (stage.path / "samples.jsonl").read_text().splitlines()]


def test_chat_suite(tiny_run: Path, work: Callable[..., StageDir]) -> None:
    stage = work(tiny_run, "chat")
    results = json.loads((stage.path / "results.json").read_text())
    tasks = results["suites"]["chat"]
    names = ("sum", "sum_in_head", "difference", "count", "spell", "identity")
    assert list(tasks) == [f"{name}_{split}" for name in names for split in ("train", "held_out")]
    records = samples_of(stage)
    assert len(records) == sum(score["n"] for score in tasks.values())
    assert all(score["n"] == 4 and 0 <= score["score"] <= 1 for score in tasks.values())
    assert {"question", "reply", "right", "task"} <= records[0].keys()
    events = {event["name"]: event for event in read_all(stage.events_path) if event["kind"] == "eval"}
    assert events.keys() == tasks.keys() and events["sum_train"]["n"] == 4
    assert stage.is_done({"recipe": sha256_json(stage.read_config()["recipe"])})
    assert set(stage.record()["outputs"]) == {"results.json", "samples.jsonl"}


@pytest.mark.parametrize(("name", "prompt"), [("sft", "Who are you?"), ("pretrain", "Once upon a time")])
def test_samples_suite(tiny_run: Path, work: Callable[..., StageDir], name: str, prompt: str) -> None:
    stage = work(tiny_run, "samples", name)
    records = samples_of(stage)
    assert records[0]["prompt"] == prompt
    shown = [(e["prompt"], e["text"], e["step"]) for e in read_all(stage.events_path) if e["kind"] == "sample"]
    assert shown == [(record["prompt"], record["text"], 10) for record in records]
    text = evaluate("--stage", name, "--suite", "samples").stdout
    assert all(record["prompt"] in text for record in records)


@pytest.mark.parametrize("suite", ["bpb", "samples", "chat"])
def test_a_stop_leaves_no_results(tiny_run: Path, work: Callable[..., StageDir], suite: str) -> None:
    stop = tiny_run / "eval" / f"sft-{suite}" / "STOP"
    stop.parent.mkdir(parents=True)
    stop.touch()
    with pytest.raises(Interrupted):
        work(tiny_run, suite)
    assert not (stop.parent / "results.json").exists() and not (stop.parent / "STAGE.json").exists()
    stop.unlink()
    assert work(tiny_run, suite).record() is not None


def test_inputs_must_be_those_of_the_recipe(tiny_run: Path, work: Callable[..., StageDir]) -> None:
    stage = work(tiny_run, "bpb")
    config = json.loads(stage.config_path.read_text())
    config["recipe"]["data"][0]["sha256"] = "0" * 64
    stage.config_path.write_text(json.dumps(config))
    from picollm.stages.eval import main
    from picollm.worker import Worker

    worker = Worker(stage, stage.read_config(), 0, 1)
    worker.device = "cpu"
    with pytest.raises(IntegrityError) as caught:
        main(worker)
    worker.events.close()
    assert "stories" in caught.value.message and "000000000000" in caught.value.cause
    assert sha256_file(tiny_run.parents[1] / "datasets/stories/dataset.json")[:12] in caught.value.cause
