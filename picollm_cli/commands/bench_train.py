"""`picollm bench train`: training speed on synthetic tokens, one configuration after the other."""

from __future__ import annotations

import itertools
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Optional

import typer

from picollm.errors import ConfigError
from picollm_cli import options
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch, check_launch, parse_launch

if TYPE_CHECKING:
    from picollm.config.recipe import TrainRecipe, TrainRuntime
    from picollm.config.schema import RunConfig

# Everything that a cell of the grid says about itself; `--compare` looks for the same cell in another file.
KEYS = (
    *("model", "depth", "hidden_size", "T", "batch_tokens", "device_batch", "ranks", "threads", "dtype", "fp8"),
    *("attention", "compile", "activation_checkpointing"),
)
POLL_S = 0.2


class Plan(NamedTuple):
    """What is measured: a configuration as a worker of a run would get it."""

    recipe: TrainRecipe
    runtime: TrainRuntime


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
    from picollm.files import write_json

    out, how = Output(json), parse_launch(launch)
    # Everything that can be refused is refused before anything is measured, which may take an hour.
    if how.nnodes > 1:
        raise ConfigError(
            "`picollm bench train` measures one machine",
            cause=f"`--launch nnodes={how.nnodes}` asks for several, and they would share no folder",
            hint=f"use `--launch nproc={how.nproc}`",
        )
    check_launch(how)
    earlier = _earlier(compare) if compare else None
    target = _writable(out_file) if out_file else None
    plans = [_plan(_resolve(preset, config, [*(sets or []), *values]), how) for values in _grid(vary or [])]
    cells: list[dict[str, Any]] = []
    result = {"machine": _machine(), "cells": cells}
    for plan in plans:
        cells.append(_cell(out, plan, how, steps, earlier))
        _show(out, cells[-1])
        if target:  # after each, because the next one may fail
            write_json(target, result)
    if target:
        out.note(f"written to {target}")
    out.result(result)


def _earlier(name: str) -> list[dict[str, Any]]:
    """Cells of the file that `--compare` names.

    Raises:
        ConfigError: there is none, or `--out` did not write it.
        IntegrityError: it is torn.
    """
    from picollm.files import read_json
    from picollm.run_dir import expand

    hint = "name a file that `picollm bench train --out FILE` wrote"
    try:
        found = read_json(expand(name), hint=hint)
    except OSError as error:
        raise ConfigError(f"`--compare {name}` cannot be read", cause=error.strerror, hint=hint) from error
    cells = found.get("cells") if isinstance(found, dict) else None
    if not isinstance(cells, list) or not all(
        isinstance(cell, dict) and isinstance(cell.get("tokens_per_s"), int | float) for cell in cells
    ):
        raise ConfigError(f"`--compare {name}` holds no measurements", cause="`--out` writes other fields", hint=hint)
    return cells


def _writable(name: str) -> Path:
    """The file that `--out` names, in a folder that takes files.

    Raises:
        HostError: it does not.
    """
    from picollm.errors import HostError
    from picollm.run_dir import expand

    path, hint = expand(name).absolute(), "name another with `--out FILE`"
    if path.is_dir():
        raise HostError(f"cannot write `{path}`", cause="it is a directory", hint=hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise HostError(f"cannot write `{path}`", cause=error.strerror, hint=hint) from error


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


def _plan(config: RunConfig, how: Launch) -> Plan:
    """Recipe and runtime of one configuration on this machine.

    Raises:
        ConfigError: it cannot be.
        HostError: no room in a CPU's memory: the system would kill whatever is largest. A GPU says so by itself.
    """
    from picollm.errors import HostError
    from picollm.hardware import detect
    from picollm.plan import pretrain_recipe, train_runtime
    from picollm.runtimes import fit
    from picollm.units import size

    machine = detect()
    recipe = pretrain_recipe(
        config, machine, tokenizer_vocab=config.tokenizer.vocab_size, tokenizer_sha256="synthetic", data=()
    )
    needed, room = fit(config, machine, recipe, ranks=how.ranks).memory.total, machine.available_bytes // how.ranks
    if not machine.gpus and needed > room:
        raise HostError(
            f"{recipe.model.arch} d{recipe.model.num_hidden_layers} does not fit in memory",
            cause=f"a process needs about {size(needed)}, {size(room)} are free",
            hint="lower `model.depth`, or `train.device_batch_size`",
        )
    return Plan(recipe, train_runtime(config, machine, recipe, ranks=how.ranks))


def _cell(out: Output, plan: Plan, how: Launch, steps: int, earlier: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Measure one configuration in processes of its own, and look for it in an earlier measurement.

    Raises:
        WorkerError: they died; a PicollmError of theirs comes as it was.
    """
    from picollm.files import write_json

    recipe, runtime = plan
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
        cell = about | _run(out, folder, how, runtime.threads, f"{arch.arch} d{arch.num_hidden_layers}")
    if earlier is not None:
        same = (old for old in earlier if all(old.get(key) == cell[key] for key in KEYS))
        cell["earlier_tokens_per_s"] = next((old["tokens_per_s"] for old in same), None)
    return cell


def _run(out: Output, folder: Path, how: Launch, threads: int, title: str) -> dict[str, Any]:
    """What the processes measured; as in `_cell`."""
    from picollm.files import read_json
    from picollm.hardware import detect
    from picollm.run_dir import StageDir
    from picollm_cli.failure import from_report
    from picollm_cli.launch_line import launch_command
    from picollm_cli.processes import measure, measuring_died

    once = replace(how, restarts=0)  # what torchrun started again would fail again
    command = launch_command(StageDir(folder), "picollm.stages.bench_train", once, has_gpu=bool(detect().gpus))
    events, result = folder / "events.jsonl", folder / "result.json"
    code = measure(command, folder, events, lambda event: out.note(f"{title}: {event['text']}"), threads=threads)
    found = read_json(result) if result.exists() else {}
    report = found.get("error")
    if report and (error := from_report(report)):
        raise error
    if report or code or not found:
        raise measuring_died("the process that measures died", code, folder)
    return found


def _machine() -> dict[str, Any]:
    from picollm.hardware import detect

    machine = detect()
    return {"cpu": machine.cpu_name, "gpus": [gpu.name for gpu in machine.gpus], "python": platform.python_version()}


def _show(out: Output, cell: dict[str, Any]) -> None:
    """A configuration as a few lines."""
    compiled = "compiled" if cell["compile"] else "eager"
    precision = "fp8" if cell["fp8"] else cell["dtype"]
    title = f"{cell['model']} d{cell['depth']}, T {cell['T']}, {precision}, {cell['attention']} attention, {compiled}"
    out.print(title, style="name")
    rate = f"{cell['tokens_per_s']:,.0f} tokens/s"
    if cell["mfu"] is not None:
        rate += f", MFU {cell['mfu']:.1%} (causal {cell['mfu_causal']:.1%})"
    if before := cell.get("earlier_tokens_per_s"):
        rate += f", {cell['tokens_per_s'] / before:.2f} x the earlier {before:,.0f}"
    elif "earlier_tokens_per_s" in cell:
        rate += ", which the earlier file does not have"
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
