"""Pretraining from one or several datasets, with and without the token cache, in this process."""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from picollm.data.dataset_writer import DatasetWriter
from picollm.data.datasets import Dataset
from picollm.errors import IntegrityError, Interrupted, WorkerError
from picollm.events import EventWriter, read_all
from picollm.files import read_json, write_json
from picollm.locks import hold_lock
from picollm.run_dir import StageDir, run_named
from picollm.stages import pretrain, token_cache
from picollm.stages.training import evaluating, read_inputs
from picollm.tokenizer import cache
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import checkpoint
from picollm.train.checkpoint_files import checkpoint_dir, checkpoint_sha256
from picollm.worker import Worker
from tests.unit.stages.test_training import RECIPE, RUNTIME

MakeWorker = Callable[..., "QuietWorker"]
SIZES = {"peps": 40, "rfcs": 90}  # documents; those of rfcs are longer


class QuietWorker(Worker):
    """No signals and no launcher."""

    def __init__(self, stage: StageDir, rank: int = 0, world: int = 1, *, stops: bool = False) -> None:
        self.stage, self.config, self.rank, self.world = stage, stage.read_config(), rank, world
        self.events = None if rank else EventWriter(stage.events_path, stage.name)
        self.device, self.stops = torch.device("cpu"), stops

    def should_stop(self) -> bool:
        return self.stops


@pytest.fixture
def datasets(clean_environment: Path) -> dict[str, Dataset]:
    for name, size in SIZES.items():
        with DatasetWriter(name) as writer:
            writer.start("text")
            for i in range(size):
                writer.add("train", f"{name} {i} says so" + " again and again" * (i % 3 + (name == "rfcs")))
            writer.add("validation", f"{name} is held back")
            writer.publish({"from": "a test"})
    return {name: Dataset.open(name) for name in SIZES}


@pytest.fixture
def make_stage(datasets: dict[str, Dataset], tokenizer: Tokenizer) -> Callable[..., StageDir]:
    """A run of its own with the stage `pretrain` prepared on datasets with weights."""

    def make(run: str, weights: dict[str, float], cache_gib: float = 1.0, **changed: Any) -> StageDir:
        target = run_named(run)
        tokenizer.save(target.tokenizer)
        data = [{"dataset": name, "sha256": datasets[name].sha256, "weight": w} for name, w in weights.items()]
        recipe = RECIPE | {"data": data, "tokenizer_sha256": tokenizer.sha256, "steps": 40} | changed
        stage = target.stage("pretrain")
        runtime = RUNTIME | {"cache_gib": cache_gib, "eval_tokens": 64}
        write_json(stage.config_path, {"schema": 1, "stage": "pretrain", "recipe": recipe, "runtime": runtime})
        return stage

    return make


@pytest.fixture
def make_worker() -> Iterator[Callable[..., QuietWorker]]:
    made: list[QuietWorker] = []

    def make(*how: Any, **stops: bool) -> QuietWorker:
        made.append(QuietWorker(*how, **stops))
        return made[-1]

    yield make
    for worker in made:
        if worker.events:
            worker.events.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wait_until(condition: Callable[[], Any]) -> Any:
    while not (found := condition()):
        time.sleep(0.01)
    return found


def told(stage: StageDir, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_all(stage.events_path) if event["kind"] == kind]


def test_a_mixture_is_read_in_its_shares_and_told(make_stage: Callable[..., StageDir], make_worker: MakeWorker) -> None:
    stage = make_stage("mixed", {"peps": 3.0, "rfcs": 1.0}, steps=100)
    pretrain.main(make_worker(stage))
    result = read_json(stage.path / "STAGE.json")["result"]
    peps, rfcs = result["data"]
    assert (peps["dataset"], rfcs["dataset"]) == ("peps", "rfcs")
    assert peps["share"] == pytest.approx(0.75, abs=0.02) and peps["share"] + rfcs["share"] == pytest.approx(1.0)
    assert peps["epochs"] == peps["documents"] / SIZES["peps"] and peps["tokens"] > 2 * rfcs["tokens"]
    assert 0 < result["cut_share"] < 1
    values = {event["name"]: event["value"] for event in told(stage, "eval")}
    assert set(values) == {"val_bpb", "val_bpb/peps", "val_bpb/rfcs"}
    assert values["val_bpb"] == pytest.approx(0.75 * values["val_bpb/peps"] + 0.25 * values["val_bpb/rfcs"], abs=2e-6)
    assert result["val_bpb"] == values["val_bpb"]


def test_the_cache_changes_nothing(make_stage: Callable[..., StageDir], make_worker: MakeWorker) -> None:
    """Weights bit for bit, bits per byte, position in the data: with the cache, and without."""
    stages = [make_stage(f"cache{gib}", {"peps": 1.0, "rfcs": 2.0}, gib) for gib in (0.0, 1.0)]
    for stage in stages:
        pretrain.main(make_worker(stage))
    without, cached = stages
    assert checkpoint_sha256(without) == checkpoint_sha256(cached)
    for name in ("loss", "val_bpb", "data", "cut_share"):
        assert without.record()["result"][name] == cached.record()["result"][name]
    positions = [read_json(checkpoint_dir(stage, 40) / "meta.json")["data"] for stage in stages]
    assert positions[0] == positions[1]
    notes = [[event["text"] for event in told(stage, "note")] for stage in stages]
    assert any("`peps` tokenised as it is read: `data.cache_gib` is 0" in text for text in notes[0])
    assert any("`peps` cached: the run reads most of the dataset" in text for text in notes[1])


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_other_packings_train(make_stage: Callable[..., StageDir], make_worker: MakeWorker, packing: str) -> None:
    stages = [make_stage(name, {"rfcs": 1.0}, packing=name) for name in ("best_fit", packing)]
    for stage in stages:
        pretrain.main(make_worker(stage))
    first, second = (stage.record()["result"] for stage in stages)
    assert math.isfinite(second["loss"]) and second["loss"] != first["loss"]
    assert (second["data"] == first["data"]) == (packing == "documents"), "documents are packed as by best_fit"


def test_a_stop_while_tokenising_is_obeyed_by_all_ranks(
    make_stage: Callable[..., StageDir], make_worker: MakeWorker
) -> None:
    stage = make_stage("stopped", {"peps": 1.0})
    caught: list[BaseException] = []

    def other_rank() -> None:
        try:
            worker = make_worker(stage, 1, 2)
            token_cache.token_sources(worker, read_inputs(worker), lambda dataset: pytest.fail("not cached"))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=other_rank)
    thread.start()
    with pytest.raises(Interrupted, match="before the tokens of `peps` were there"):
        pretrain.main(make_worker(stage, 0, 2, stops=True))
    thread.join(timeout=20)
    assert [type(error) for error in caught] == [Interrupted]


def test_waiting_for_another_run_is_shown_and_can_be_stopped(
    make_stage: Callable[..., StageDir], make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "TELL_EVERY_S", math.inf)  # once, however long the thread takes to see it
    stage = make_stage("second", {"peps": 1.0})
    worker = make_worker(stage)
    inputs = read_inputs(worker)
    lock = cache._lock_of(cache.cache_dir(stage.run.base, inputs.datasets[0], inputs.tokenizer))
    thread = threading.Thread(
        target=lambda: wait_until(lambda: told(stage, "phase")) and setattr(worker, "stops", True), daemon=True
    )
    with hold_lock(lock, "the cache"):
        thread.start()
        with pytest.raises(Interrupted, match="before the tokens of `peps` were there"):
            pretrain.main(worker)
    thread.join()
    [phase] = told(stage, "phase")
    assert phase["text"] == f"another run (process {os.getpid()}) is making the tokens of peps, 0 %…"


def test_other_ranks_read_what_rank_0_made(make_stage: Callable[..., StageDir], make_worker: MakeWorker) -> None:
    stage = make_stage("two", {"peps": 1.0})
    found: list[Any] = []

    def take(rank: int) -> None:
        worker = make_worker(stage, rank, 2)
        found.extend(token_cache.token_sources(worker, read_inputs(worker), lambda dataset: pytest.fail("not cached")))

    thread = threading.Thread(target=take, args=(1,))
    thread.start()
    take(0)
    thread.join(timeout=20)
    assert [type(source) for source in found] == [cache.CachedTokens] * 2
    assert found[0].lengths(range(SIZES["peps"])) == found[1].lengths(range(SIZES["peps"]))


def test_a_rank_does_not_wait_for_one_that_failed(make_stage: Callable[..., StageDir], make_worker: MakeWorker) -> None:
    stage = make_stage("failed", {"peps": 1.0})
    stage.log_dir.mkdir(parents=True)
    (stage.log_dir / "error.json").write_text("{}")
    worker = make_worker(stage, 1, 2)
    with pytest.raises(WorkerError, match="token cache"):
        token_cache.token_sources(worker, read_inputs(worker), lambda dataset: pytest.fail("not cached"))


def test_a_shard_that_was_cut_is_found_although_the_cache_is_there(
    make_stage: Callable[..., StageDir], make_worker: MakeWorker, datasets: dict[str, Dataset]
) -> None:
    pretrain.main(make_worker(make_stage("first", {"peps": 1.0})))
    shard = datasets["peps"].path / next(file.name for file in datasets["peps"].files if file.split == "train")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match=shard.name):
        pretrain.main(make_worker(make_stage("second", {"peps": 1.0})))


# -- evaluation -------------------------------------------------------------------------------------------------------

# A rank of the stage as torchrun starts it; rank 1 fails in its second evaluation.
RANK = """
import os
from picollm.model.gpt import GPT
from picollm.stages import pretrain
from picollm.worker import run
validate, nats = pretrain.validate, GPT.nats
passes = []
def counting(self, ids, targets):
    passes.append(None)
    return nats(self, ids, targets)
def failing(*args):
    GPT.nats = (lambda *args: [][0]) if passes and os.environ["RANK"] == "1" else counting
    try:
        return validate(*args)
    finally:
        print(len(passes), flush=True)
pretrain.validate = failing
pretrain.bits_per_byte.rows_per_pass = lambda model, T: 1  # so that there is a pass for rank 1
run(pretrain.main)
"""


def test_all_ranks_evaluate_and_none_waits_for_one_that_failed(
    make_stage: Callable[..., StageDir], make_worker: MakeWorker
) -> None:
    """Two processes and a process group: the figures of one, told once; an error on one of them ends both."""
    stage = make_stage("ranks", {"peps": 3.0, "rfcs": 1.0}, dtype="float64", steps=30)
    config = read_json(stage.config_path)
    config["runtime"] |= {"ranks": 2, "device_batch_size": 1, "eval_every": 10, "keep_last": 9}
    write_json(stage.config_path, config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, stage.path], env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        passes = [int(process.communicate(timeout=300)[0].split()[0]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not {0, 130} & {process.returncode for process in ranks}
    assert read_json(stage.log_dir / "error.json")["rank"] == 1
    assert {event["step"] for event in told(stage, "eval")} == {10} and stage.finished_steps()[-1] == 20
    assert [event["text"] for event in told(stage, "phase")][-3:] == ["evaluating…", "", "evaluating…"]
    # One process reads the same off the weights that were saved at step 10, and finishes from there what two began.
    shutil.rmtree(checkpoint_dir(stage, 20))
    one = make_worker(stage)
    inputs = read_inputs(one)
    model = checkpoint.load_model(stage, dtype="float64").model
    parts = pretrain.held_out(inputs)
    assert sum(passes) == sum(len(part.rows) for part in parts) and abs(passes[0] - passes[1]) <= len(parts)
    values = {event["name"]: event["value"] for event in told(stage, "eval")}
    assert pretrain.validate(model, inputs, parts) == values and len(values) == 3
    pretrain.main(one)
    assert {event["step"] for event in told(stage, "eval")} == {10, 20, 30}


def test_an_evaluation_says_how_far_it_is(
    make_stage: Callable[..., StageDir], make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("picollm.stages.training.TELL_EVERY_S", 0.0)
    monkeypatch.setattr("picollm.stages.pretrain.bits_per_byte.rows_per_pass", lambda model, T: 1)
    stage = make_stage("told", {"peps": 3.0, "rfcs": 1.0}, cache_gib=0.0)
    pretrain.main(make_worker(stage))
    first, *shares, last = [event["text"] for event in told(stage, "phase")]
    assert (first, last) == ("evaluating…", "") and shares[-1] == "evaluating, 100% done…"
    numbers = [int(text.split()[1].rstrip("%")) for text in shares]
    assert numbers == sorted(numbers) and len(set(numbers)) > 2


def test_an_evaluation_ends_when_a_stop_was_asked_for(
    make_stage: Callable[..., StageDir], make_worker: MakeWorker
) -> None:
    stage = make_stage("ended", {"peps": 1.0})
    with pytest.raises(Interrupted), evaluating(make_worker(stage, stops=True)) as look:
        look(0.5)
    with evaluating(make_worker(stage)) as look:
        look(0.5)
