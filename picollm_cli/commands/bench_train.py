"""`picollm bench train`: training speed on synthetic tokens, one configuration after the other."""

from __future__ import annotations

import itertools
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from picollm.errors import ConfigError
from picollm_cli import options
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch, parse_launch

if TYPE_CHECKING:
    from picollm.config.schema import RunConfig

# Everything that a cell of the grid says about itself; `--compare` looks for the same cell in another file.
KEYS = ("model", "depth", "T", "batch_tokens", "device_batch", "ranks", "dtype", "fp8", "attention", "compile")


def train(
    preset: options.Preset = None,
    config: options.ConfigFile = None,
    sets: options.Set = None,
    vary: Annotated[
        Optional[list[str]],
        typer.Option(
            "--vary",
            metavar="KEY=A,B,…",
            help="Values of a key to measure one after the other; may be repeated.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each configuration.")] = 10,
    compare: Annotated[
        Optional[str],
        typer.Option(
            "--compare", metavar="FILE", help="Also show speed against an earlier `--out`.", show_default=False
        ),
    ] = None,
    out_file: Annotated[
        Optional[str], typer.Option("--out", metavar="FILE", help="Where the JSON goes.", show_default=False)
    ] = None,
    launch: options.Launch = None,
    json: options.Json = False,
) -> None:
    """Measure training: tokens/s, MFU, memory, parts of a step.

    Trains on random tokens with the loop's own step; nothing is kept.
    Each configuration runs in fresh processes. MFU counts attention in
    full; the causal count stands beside it.

    \b
    Examples:
      picollm bench train --preset cpu-small --steps 5
      picollm bench train --preset d12 --vary train.fp8=false,true
      picollm bench train --vary model.depth=12,20,24 --out speed.json
      picollm bench train --preset d12 --compare speed.json
    """
    from picollm.files import read_json, write_json
    from picollm.run_dir import expand

    out, how = Output(json), parse_launch(launch)
    earlier = read_json(expand(compare), hint="name a file that `--out` wrote")["cells"] if compare else []
    cells = []
    for values in _grid(vary or []):
        config_of = _resolve(preset, config, [*(sets or []), *values])
        cell = _cell(out, config_of, how, steps)
        cells.append(cell)
        _show(out, cell, earlier)
    result = {"machine": _machine(), "cells": cells}
    if out_file:
        write_json(expand(out_file).absolute(), result)
        out.note(f"written to {out_file}")
    out.result(result)


def _grid(vary: list[str]) -> list[list[str]]:
    """`--vary` options -> lists of `key=value`, all combinations in order.

    Raises:
        ConfigError: an option is not KEY=A,B.
    """
    axes = []
    for text in vary:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise ConfigError(
                f"`--vary {text}` cannot be read",
                cause="it is not `KEY=A,B`",
                hint="such as `--vary model.depth=12,20`",
            )
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(combination) for combination in itertools.product(*axes)]


def _resolve(preset: str | None, config: str | None, sets: list[str]) -> RunConfig:
    from picollm.config.resolve import resolve
    from picollm.run_dir import expand

    return resolve(preset=preset, config_path=expand(config) if config else None, sets=tuple(sets)).config


def _cell(out: Output, config: RunConfig, how: Launch, steps: int) -> dict[str, Any]:
    """Measure one configuration in processes of its own.

    Raises:
        WorkerError: they died; a PicollmError of theirs comes as it was.
    """
    from picollm.files import write_json
    from picollm.hardware import detect
    from picollm.plan import pretrain_recipe, train_runtime

    machine = detect()
    recipe = pretrain_recipe(
        config, machine, tokenizer_vocab=config.tokenizer.vocab_size, tokenizer_sha256="synthetic", data=()
    )
    runtime = train_runtime(config, machine, recipe, ranks=how.ranks)
    arch = recipe.model
    about = {
        "model": arch.arch,
        "depth": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "T": arch.max_position_embeddings,
        "batch_tokens": recipe.batch_tokens,
        "device_batch": runtime.device_batch_size,
        "ranks": runtime.ranks,
        "threads": runtime.threads,
        "dtype": recipe.dtype,
        "fp8": recipe.fp8,
        "attention": runtime.attention,
        "compile": runtime.compile,
        "activation_checkpointing": runtime.activation_checkpointing,
        "steps": steps,
    }
    with tempfile.TemporaryDirectory(prefix="picollm-bench-") as name:
        folder = Path(name)
        write_json(
            folder / "config.json",
            {"recipe": recipe.model_dump(mode="json"), "runtime": runtime.model_dump(mode="json"), "steps": steps},
        )
        found = _run(out, folder, how, runtime.threads, f"{arch.arch} d{arch.num_hidden_layers}")
    return about | found


def _run(out: Output, folder: Path, how: Launch, threads: int, title: str) -> dict[str, Any]:
    import os
    import subprocess

    from picollm import errors
    from picollm.errors import WorkerError
    from picollm.events import EventFollower
    from picollm.files import read_json
    from picollm.hardware import detect
    from picollm.run_dir import StageDir
    from picollm_cli.launch_line import launch_command
    from picollm_cli.processes import SPIN_COUNT

    command = launch_command(StageDir(folder), "picollm.stages.bench_train", how, has_gpu=bool(detect().gpus))
    follower, log = EventFollower(folder / "events.jsonl"), folder / "log.txt"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=SPIN_COUNT | os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"},
        )  # fmt: skip
        try:
            while process.poll() is None:
                for event in follower.poll():
                    out.note(f"{title}: {event['text']}")
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.terminate()
            process.wait()
    result = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
    if error := result.get("error"):
        kind = getattr(errors, error["type"], WorkerError)
        raise kind(error["message"], cause=error["cause"], hint=error["hint"] or "see the message above")
    if not result:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-8:]
        cause = "\n    ".join([f"exit code {process.returncode}; its last lines:", *lines])
        raise WorkerError("the process that measures died", cause=cause)
    return result


def _machine() -> dict[str, Any]:
    from picollm.hardware import detect

    machine = detect()
    return {"cpu": machine.cpu_name, "gpus": [gpu.name for gpu in machine.gpus], "python": platform.python_version()}


def _show(out: Output, cell: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """A configuration as a few lines."""
    compiled = "compiled" if cell["compile"] else "eager"
    precision = "fp8" if cell["fp8"] else cell["dtype"]
    title = f"{cell['model']} d{cell['depth']}, T {cell['T']}, {precision}, {cell['attention']} attention, {compiled}"
    out.print(title, style="name")
    rate = f"{cell['tokens_per_s']:,.0f} tokens/s"
    if cell["mfu"] is not None:
        rate += f", MFU {cell['mfu']:.1%} (causal {cell['mfu_causal']:.1%})"
    before = next((old for old in earlier if all(old.get(key) == cell.get(key) for key in KEYS)), None)
    if before is not None:
        rate += f", {cell['tokens_per_s'] / before['tokens_per_s']:.2f} x the earlier {before['tokens_per_s']:,.0f}"
    out.print(f"  {rate}")
    spread = f"{cell['step_s_min']:.3f} to {cell['step_s_max']:.3f}"
    rows = f"{cell['batch_tokens']:,} tokens, {cell['device_batch']} rows at a time"
    out.print(f"  step {cell['step_s']:.3f} s ({spread}) of {rows}")
    total = sum(cell["parts_s"].values())
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in cell["parts_s"].items())
    out.print(f"  {parts}; first step {cell['first_step_s']:.1f} s")
    out.print(f"  peak memory {cell['peak_gib']:.2f} GiB, estimated {cell['estimated_gib']:.2f}")
    if cell["kernels"]:
        out.print("  " + ", ".join(f"{kind} {share:.0%}" for kind, share in cell["kernels"].items()))
