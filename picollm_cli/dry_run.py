"""`--dry-run`: what a run is, what it will take, and how it is started; nothing is written."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from picollm.units import duration, size
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch, launch_commands
from picollm_cli.prepare import Prepared, plan_of

if TYPE_CHECKING:
    from picollm.config.schema import RunConfig
    from picollm.plan import Plan


def show_plan(out: Output, prepared: Prepared, launch: Launch, stage: str = "pretrain") -> None:
    """Print config with sources, estimate and launch line; under `--json` one object (DESIGN 11).

    Args:
        stage: whose launch line is shown.
    """
    from picollm.config.keys import flatten
    from picollm.hardware import detect

    run = prepared.run
    plan = plan_of(prepared, launch)
    module = f"picollm.stages.{stage}"
    commands = launch_commands(run.stage(stage), module, launch, has_gpu=bool(detect().gpus))
    config = prepared.config.model_dump(mode="json")
    out.result(
        {
            "run": run.name,
            "path": str(run.path),
            "new": prepared.new,
            "preset": prepared.preset,
            **plan.to_json(),
            "config": config,
            "sources": prepared.sources,
            "launch": commands[launch.node_rank],
            "launch_nodes": commands,
        }
    )
    out.print(f"run `{run.name}`, {'new' if prepared.new else 'continued'}, in {run.path}")
    stages = {}
    for part in plan.stages:
        steps = "1 step" if part.steps == 1 else f"{part.steps or 0:,} steps"
        work = f"  {steps}, {part.tokens:,} tokens" if part.steps and part.tokens else ""
        stages[part.name] = f"{duration(round(part.time_s)):>12}{work}"
    exports = {name: f"{'yes' if e.possible else 'no'} ({e.reason})" for name, e in plan.exports.items()}
    for title, table in (
        ("Config", _config_table(dict(flatten(config)), prepared.sources | _overridden(prepared.config))),
        ("Estimate", _two_columns(_estimate(plan))),
        ("Stages", _two_columns(stages)),
        ("Exports", _two_columns(exports)),
    ):
        out.print()
        out.print(title, style="name")
        out.print(table)
    out.print()
    out.print("Launch", style="name")
    for rank, command in enumerate(commands):
        node = f"node {rank}: " if launch.nnodes > 1 else ""
        out.print(f"  {node}{shlex.join(command)}")


def _estimate(plan: Plan) -> dict[str, str]:
    """What the run is on this machine and what it takes: a name and a line each."""
    recipe, batch = plan.recipe, plan.fit
    cut = [_counted(plan.ranks, "rank"), _counted(batch.passes, "pass", "passes"), _counted(batch.rows, "row")]
    row = recipe.model.max_position_embeddings
    rows = {
        "parameters": f"{plan.params.total:,}",
        "compute": f"{plan.flops_per_token:.3g} FLOPs a token, {plan.total_flops:.3g} in pretraining",
        "device": f"{plan.device}, {cut[0]} of {_counted(plan.threads, 'thread')} ({plan.threads_reason})",
        "dtype": f"{plan.dtype} ({recipe.dtype_reason})",
        "fp8": f"{'yes' if recipe.fp8 else 'no'} ({recipe.fp8_reason})",
        "attention": f"{plan.attention} ({plan.attention_reason})",
        "step": f"{recipe.batch_tokens:,} tokens: {' x '.join(cut)} of {row:,} ({batch.reason})",
        "memory": f"about {size(plan.memory_bytes)} in the largest process ({_holders(plan)})",
        "disk": f"about {size(plan.disk_bytes)}",
        "download": _download(plan),
        "time": f"about {duration(round(plan.time_s))} on an idle machine",
        "money": "no price known for this machine" if plan.money_usd is None else f"{plan.money_usd:,.2f} USD",
    }
    if batch.activation_checkpointing:
        rows["step"] += "; blocks are computed twice, which takes a third longer"
    if plan.copies_bytes:
        rows["memory"] += f"; {size(plan.copies_bytes)} of the machine's own to save beside training"
    return rows


def _download(plan: Plan) -> str:
    """What is fetched before training; how fast the line is nobody knows offline."""
    from picollm.estimate import DOWNLOAD_BYTES_PER_S

    if not plan.download_bytes:
        return "nothing"
    time_s = plan.download_bytes / DOWNLOAD_BYTES_PER_S
    return f"about {size(plan.download_bytes)}, {duration(round(time_s))} at {DOWNLOAD_BYTES_PER_S / 1e6:.0f} MB/s"


def _counted(number: int, word: str, plural: str | None = None) -> str:
    return f"{number:,} {word if number == 1 else plural or word + 's'}"


def _holders(plan: Plan) -> str:
    """The three largest parts of the memory, in words."""
    memory = plan.fit.memory
    parts = {name: getattr(memory, name) for name in ("weights", "optimizer", "gradients", "activations", "loss")}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size(held)}" for name, held in largest)


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"  {name}", Text(value))
    return table


def _overridden(config: RunConfig) -> dict[str, str]:
    """Keys that decide nothing in this run, and what does."""
    return {"data.dataset": "not used: data.mix"} if config.data.mix else {}


def _config_table(values: dict[str, Any], sources: dict[str, str]) -> Table:
    """Every key and value; a source only where it is not the default."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for key, value in values.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        table.add_row(f"  {key}", Text("not set" if value is None else shown), Text(sources.get(key, "")))
    return table
