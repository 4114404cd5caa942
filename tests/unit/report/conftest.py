"""A run as its stages leave it behind, written by hand: small, exact, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picollm.events import EventWriter
from picollm.files import sha256_file, write_json
from picollm.run_dir import RunDir, StageDir
from picollm.train import checkpoint_files

MODEL = {
    "arch": "portable", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 16, "intermediate_size": 256, "vocab_size": 300, "max_position_embeddings": 32,
    "rope_theta": 100000.0, "rms_norm_eps": 1e-6, "qk_scale": 1.2,
}  # fmt: skip
BATCH = 128


def write_stage(run: RunDir, name: str, dataset: str, *, steps: int, done: int, validation: str | None) -> StageDir:
    """A training stage that came `done` of `steps` steps far; step i had loss 6 - i / 10 and took 0.5 s."""
    stage = run.stage(name)
    path = run.base / "datasets" / dataset / "dataset.json"
    recipe = {
        "stage": name, "seed": 42, "model": MODEL, "dtype": "float32", "dtype_reason": "no bf16 here", "steps": steps,
        "batch_tokens": BATCH, "rates": {"matrix_lr": 0.02}, "schedule": {"warmup_steps": 4},
        "data": [{"dataset": dataset, "sha256": sha256_file(path), "weight": 1.0}], "tokenizer_sha256": "c" * 64,
    }  # fmt: skip
    write_json(stage.config_path, {"schema": 1, "stage": name, "recipe": recipe, "runtime": {"threads": 1, "ranks": 1}})
    events = EventWriter(stage.events_path, name)
    events.write("stage_start", attempt=1, resumed_from=0, total_steps=steps)
    for step in range(1, done + 1):
        events.write("step", step=step, loss=6 - step / 10, tokens=step * BATCH, dt_s=0.5)
    if done == steps:
        if validation:
            events.write("eval", step=steps, name=validation, value=1.25)
        events.write("stage_end", ok=True)
    events.close()
    temporary = checkpoint_files.begin(stage, done)
    (temporary / "model.safetensors").write_bytes(name.encode())
    checkpoint_files.write_meta(temporary, {"schema": 1, "step": done, "cpu_s": 7.5})
    checkpoint_files.commit(stage, done, temporary, keep_last=2)
    if done == steps:
        folder = checkpoint_files.checkpoint_dir(stage, done)
        files = [file for file in folder.rglob("*") if file.is_file()]
        stage.write_record({"recipe": "a" * 64}, files, {
            "step": steps, "loss": 1.5, "cpu_s": 12.5, "cut_share": 0.25,
            "data": [{"dataset": dataset, "documents": 9, "tokens": 900, "epochs": 1.5, "share": 1.0}],
        })  # fmt: skip
    return stage


def write_results(run: RunDir, stage: str, suite: str, tasks: dict[str, Any], samples: list[dict[str, str]]) -> None:
    folder = run.eval_stage(stage, suite)
    results = {"schema": 1, "run": run.name, "stage": stage, "step": 40, "suites": {suite: tasks}}
    write_json(folder.path / "results.json", results)
    (folder.path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    folder.write_record({"recipe": "b" * 64}, [folder.path / "results.json"], {})


@pytest.fixture
def make_run(clean_environment: Path) -> Callable[..., RunDir]:
    """Builds `runs/demo`; `until` names the last thing that happened in it."""

    def make(until: str = "eval") -> RunDir:
        run = RunDir(clean_environment / "runs" / "demo")
        write_json(
            run.config_path,
            {
                "schema": 1,
                "preset": "demo",
                "sources": {"train.steps": "--set"},
                "config": {"train": {"steps": 20}, "seed": 42},
            },
        )
        write_json(run.environment_path, {"python": "3.11.7", "machine": {"cores": 2, "gpus": []}})
        for dataset, kind in (("stories", "text"), ("talks", "conversations")):
            files = [
                {"name": "train-00000", "split": "train", "rows": 1200, "sha256": "d" * 64},
                {"name": "validation-00000", "split": "validation", "rows": 60, "sha256": "e" * 64},
            ]
            write_json(
                clean_environment / "datasets" / dataset / "dataset.json",
                {
                    "schema": 1,
                    "name": dataset,
                    "kind": kind,
                    "source": {"kind": "import"},
                    "files": files,
                    "totals": {},
                },
            )
        if until == "config":
            return run
        tokenizer = run.tokenizer / "tokenizer.json"
        write_json(tokenizer, {"model": "BPE"})
        run.stage("tokenizer").write_record({"recipe": "f" * 64}, [tokenizer], {"vocab_size": 300})
        done = 7 if until == "half of pretrain" else 20
        write_stage(run, "pretrain", "stories", steps=20, done=done, validation="val_bpb")
        if until == "half of pretrain":
            return run
        write_stage(run, "sft", "talks", steps=40, done=40, validation="val_loss")
        write_results(run, "sft", "bpb", {"stories": {"n": 60, "score": 1.2345, "stderr": 0.01}}, [])
        chat = {
            "sum_train": {"n": 100, "score": 1.0, "stderr": 0.0},
            "sum_held_out": {"n": 80, "score": 0.95, "stderr": 0.024},
        }
        write_results(run, "sft", "chat", chat, [{"task": "sum_train", "question": "?", "reply": "12"}])
        samples = [{"prompt": "Who are you?", "text": "I am picollm.\n```\nnot a fence"}]
        write_results(run, "sft", "samples", {}, samples)
        return run

    return make
