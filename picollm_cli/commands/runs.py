"""`picollm runs`: what there is."""

from __future__ import annotations

from typing import Any

from picollm.units import size
from picollm_cli import options
from picollm_cli.console import Output

STAGES = ("tokenizer", "pretrain", "sft", "eval")


def runs(json: options.Json = False) -> None:
    """List all runs, newest first: what is done, how good, how large.

    \b
    Examples:
      picollm runs
      picollm runs --json
    """
    from datetime import datetime

    from rich.table import Table
    from rich.text import Text

    from picollm.errors import PicollmError
    from picollm.run_dir import list_runs, runs_dir

    out = Output(json)
    rows, torn = [], []
    for run in list_runs():
        try:
            rows.append(_row(run))
        except PicollmError as error:
            torn.append({"run": run.name, "error": error.to_dict()})
            out.warn(f"run `{run.name}` is left out: {error.message}: {error.cause}")
    out.result({"runs": rows, "torn": torn})
    if torn and not rows:
        return
    if not rows:
        out.note(f"there is no run in `{runs_dir()}`")
        out.hint("make one with `picollm speedrun --preset demo`")
        return
    table = Table(box=None, pad_edge=False)
    for heading, justify in (
        ("run", "left"), ("preset", "left"), ("done up to", "left"), ("loss", "right"), ("bpb", "right"),
        ("size", "right"), ("when", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(
            Text(row["run"]),
            Text(row["preset"]),
            Text(row["stages"][-1] if row["stages"] else "nothing yet"),
            "" if row["loss"] is None else f"{row['loss']:.3f}",
            "" if row["bpb"] is None else f"{row['bpb']:.3f}",
            size(row["bytes"]),
            f"{datetime.fromtimestamp(row['changed_at']):%Y-%m-%d %H:%M}",
        )
    out.table(table)


def _row(run: Any) -> dict[str, Any]:
    """One run's figures: last training loss (nats per token), validation bits per byte, bytes on disk, time (UTC)."""
    from picollm.events import read_events
    from picollm.files import file_stats

    stored = run.read_config()
    stages = [name for name in STAGES[:3] if run.stage(name).record() is not None]
    if any(run.path.glob("eval/*/STAGE.json")):
        stages.append("eval")
    loss = bpb = None
    for name in ("pretrain", "sft"):
        for event in read_events(run.stage(name).events_path):
            if event["kind"] == "step" and event.get("loss") is not None:
                loss = event["loss"]
            elif event["kind"] == "eval" and event.get("name") == "val_bpb":
                bpb = event["value"]
    files = file_stats(run.path)
    return {
        "run": run.name,
        "path": str(run.path),
        "preset": stored["preset"],
        "stages": stages,
        "loss": loss,
        "bpb": bpb,
        "bytes": sum(stat.st_size for stat in files),
        "changed_at": round(max(stat.st_mtime for stat in files), 3),
    }
