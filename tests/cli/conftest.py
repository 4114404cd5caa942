"""A run with trained stages, made in-process in a second: real files, random weights."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from picollm_cli.main import main

SPLIT_ROWS = {"train": 40, "validation": 12}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with run `tiny`: tokenizer, `pretrain` and `sft` with a model of random weights, T 96."""
    import torch

    from picollm.attention_choice import AttentionChoice
    from picollm.config.model import Architecture
    from picollm.config.recipe import Rates, Schedule, Source, TrainRecipe, TrainRuntime
    from picollm.config.resolve import resolve
    from picollm.data import toy_world
    from picollm.data.dataset_writer import DatasetWriter
    from picollm.data.datasets import Dataset
    from picollm.files import SCHEMA, sha256_json, write_json
    from picollm.run_dir import RunDir
    from picollm.tokenizer.train import train
    from picollm.train import checkpoint
    from picollm.train.step import build_trainer

    base = tmp_path_factory.mktemp("tiny") / "base"
    with DatasetWriter("stories", base) as writer:
        writer.start("text")
        for split, num in SPLIT_ROWS.items():
            for text in toy_world.documents(num, seed=len(split)):
                writer.add(split, text)
        writer.publish({"generator": "test"})
    run = RunDir(base / "runs" / "tiny")
    made = resolve(preset="demo", config_path=None, sets=("data.dataset=stories", "eval.questions=4"))
    config = made.config.model_dump(mode="json")
    write_json(run.config_path, {"schema": SCHEMA, "preset": "demo", "sources": made.sources, "config": config})
    tokenizer = train(toy_world.documents(60, 0), 400)
    run.stage("tokenizer").write_record({}, tokenizer.save(run.tokenizer), {"vocab_size": tokenizer.vocab_size})
    dataset = Dataset.open("stories", base)
    arch = Architecture(
        arch="portable", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, vocab_size=tokenizer.vocab_size, max_position_embeddings=96,
        rope_theta=10_000.0,
    )  # fmt: skip
    runtime = TrainRuntime(
        ranks=1, threads=1, device_batch_size=1, attention="auto", compile=False, checkpoint_every=10, keep_last=1,
        eval_every=None, eval_tokens=96,
    )  # fmt: skip
    for name, source in (("pretrain", dataset.name), ("sft", "toy-world-chat")):
        recipe = TrainRecipe(
            stage=name, seed=0, model=arch, dtype="float32", dtype_reason="test", steps=10, batch_tokens=96,
            rates=Rates(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01, scalar_lr=0.01, weight_decay=0.0),
            schedule=Schedule(
                warmup_steps=0, warmdown_steps=1, final_lr_fraction=0.0, momentum_start=0.85, momentum_peak=0.95,
                momentum_end=0.9, momentum_ramp_steps=1,
            ),
            data=(Source(dataset=source, sha256=dataset.sha256),), buffer_documents=1,
            tokenizer_sha256=tokenizer.sha256,
        )  # fmt: skip
        trainer = build_trainer(recipe, runtime, AttentionChoice("sdpa", None, "test"), torch.device("cpu"))
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
        stage = run.stage(name)
        values = recipe.model_dump(mode="json")
        write_json(
            stage.config_path,
            {"schema": SCHEMA, "stage": name, "recipe": values, "runtime": runtime.model_dump(mode="json")},
        )
        saver = checkpoint.Saver(stage, 0, 1, keep_last=1, asynchronous=False)
        saver.save(10, trainer.model, trainer.optimizer, {"tokenizer_sha256": tokenizer.sha256})
        outputs = [path for saved in saver.finished() for path in saved.path.rglob("*") if path.is_file()]
        stage.write_record({"recipe": sha256_json(values)}, outputs, {"step": 10})
    return base


@pytest.fixture
def tiny_run(tiny_base: Path, clean_environment: Path) -> Path:
    """A copy of the run in this test's base directory; returns the run's folder."""
    shutil.copytree(tiny_base, clean_environment)
    return clean_environment / "runs" / "tiny"


# -- bad input --------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `picollm ARGUMENTS` in this process, error layer included."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["picollm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Command, clean_environment: Path) -> Command:
    """Run a command that must fail in the shape of an error of ours, and must leave every file as it was.

    `new=True` allows files that were not there before (a lock is always allowed: the kernel's, not ours).
    """

    def run(code: int, *arguments: str, new: bool = False) -> Ended:
        before = hashes(clean_environment)
        ended = command(*arguments)
        assert ended.code == code, ended.err
        assert ERROR_SHAPE.search(ended.err), ended.err
        assert "Traceback" not in ended.err
        after = hashes(clean_environment)
        assert {name: after.get(name) for name in before} == before
        assert new or after.keys() == before.keys()
        return ended

    return run


# `error:` and a message, a cause, an empty line, the next command.
ERROR_SHAPE = re.compile(r"^error: .+\n(  cause: .+\n)?(.*\n)*\nhint: .+\n\Z", re.MULTILINE)


def hashes(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file below a folder, without locks."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", ".toy-world.lock")
    }
