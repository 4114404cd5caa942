"""`--dry-run`: what a run is, what it will take, and how it is started; nothing is written."""

from __future__ import annotations

import json
import shlex
from typing import Any

from rich.table import Table
from rich.text import Text

from picollm.units import duration, size
from picollm_cli.console import Output
from picollm_cli.launch_line import Launch, launch_command
from picollm_cli.prepare import Prepared, plan_of


def show_plan(out: Output, prepared: Prepared, launch: Launch, stage: str = "pretrain") -> None:
    """Print config with sources, estimate and launch line; under `--json` one object (DESIGN 11).

    Args:
        stage: whose launch line is shown.
    """
    from picollm.config.keys import flatten
    from picollm.hardware import detect

    run = prepared.run
    plan = plan_of(prepared, ranks=launch.ranks)
    command = launch_command(run.stage(stage), f"picollm.stages.{stage}", launch, has_gpu=bool(detect().gpus))
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
            "launch": command,
        }
    )
    out.print(f"run `{run.name}`, {'new' if prepared.new else 'continued'}, in {run.path}")
    out.print()
    out.print("Config", style="name")
    out.print(_config_table(dict(flatten(config)), prepared.sources))
    out.print()
    out.print("Estimate", style="name")
    money = "no price known for this machine" if plan.money_usd is None else f"{plan.money_usd:,.2f} USD"
    rows = {
        "parameters": f"{plan.params.total:,}",
        "device": f"{plan.device}, {plan.ranks} rank{'s' * (plan.ranks > 1)} "
        f"of {plan.threads} thread{'s' * (plan.threads > 1)}"
        f" ({plan.threads_reason})",
        "dtype": f"{plan.dtype} ({plan.dtype_reason})",
        "attention": f"{plan.attention} ({plan.attention_reason})",
        "memory": f"about {size(plan.memory_bytes)} in the largest process",
        "disk": f"about {size(plan.disk_bytes)}",
        "time": f"about {duration(round(plan.time_s))} on an idle machine",
        "money": money,
    }
    out.print(_two_columns(rows))
    out.print()
    out.print("Stages", style="name")
    stages = {}
    for part in plan.stages:
        work = f"  {part.steps:,} steps, {part.tokens:,} tokens" if part.steps and part.tokens else ""
        stages[part.name] = f"{duration(round(part.time_s)):>12}{work}"
    out.print(_two_columns(stages))
    out.print()
    out.print("Launch", style="name")
    out.print(f"  {shlex.join(command)}")


def _two_columns(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"  {name}", Text(value))
    return table


def _config_table(values: dict[str, Any], sources: dict[str, str]) -> Table:
    """Every key and value; a source only where it is not the default."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for key, value in values.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        table.add_row(f"  {key}", Text("not set" if value is None else shown), Text(sources.get(key, "")))
    return table
