"""`picollm bench`: how fast this machine is, and where the time goes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from picollm_cli import options
from picollm_cli.commands import bench_train
from picollm_cli.console import Output

if TYPE_CHECKING:
    from picollm.bench.rows import Shapes

HELP = """Measure how fast this machine trains.

\b
Examples:
  picollm bench train --preset cpu-small --steps 5
  picollm bench gpu-probe
  picollm bench gpu-probe --only gemm --only attention
"""
app = typer.Typer(no_args_is_help=True, help=HELP)
app.command("train")(bench_train.train)


@app.command("gpu-probe")
def gpu_probe(
    only: Annotated[
        Optional[list[str]],
        typer.Option("--only", metavar="SECTION", help="One section; may be repeated. All of them unless told."),
    ] = None,
    out_file: Annotated[
        Optional[str], typer.Option("--out", metavar="FILE", help="Where the JSON goes.", show_default=False)
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure a GPU in ten minutes: kernels, attention, steps, fp8.

    Sections: identity, ceilings, gemm, attention, pointwise, d12, d20,
    fp8, profile. Each has a time budget and says at once what it finds;
    bounds are those of an H200 (docs/performance.md).

    \b
    Examples:
      picollm bench gpu-probe
      picollm bench gpu-probe --only attention --out attention.json
      picollm bench gpu-probe --json
    """
    from picollm.bench.rows import Shapes
    from picollm.bench.sections import SECTIONS
    from picollm.errors import ConfigError, did_you_mean
    from picollm.files import free_name
    from picollm.run_dir import base_dir, expand

    for name in only or ():
        if name not in SECTIONS:
            raise ConfigError(
                f"there is no section `{name}`",
                cause=f"sections are {', '.join(SECTIONS)}",
                hint=did_you_mean(name, list(SECTIONS), "--only "),
            )
    _require_gpu()
    folder = free_name(base_dir() / "bench" / time.strftime("gpu-probe-%Y%m%d-%H%M%S"))
    result = expand(out_file).absolute() if out_file else folder / "result.json"
    probe(Output(json), folder, result, "cuda", [name for name in SECTIONS if name in (only or SECTIONS)], Shapes())


def _require_gpu() -> None:
    """Refuse before anything is written where there is nothing to measure.

    Raises:
        HostError: the driver reports no GPU, or the installed torch cannot use one.
    """
    from picollm.errors import HostError
    from picollm.hardware import detect_gpus, torch_drives_gpus

    if not detect_gpus():
        raise HostError(
            "there is no CUDA GPU to measure",
            cause="no NVIDIA driver reports one, or CUDA_VISIBLE_DEVICES hides it",
            hint="run it on a machine with one; `picollm doctor device` says what is seen here",
        )
    if not torch_drives_gpus():
        raise HostError(
            "the installed torch cannot use the GPU",
            cause="it is a CPU build",
            hint="install torch's CUDA build, then `picollm doctor torch`",
        )


def probe(out: Output, folder: Path, result: Path, device: str, sections: list[str], shapes: Shapes) -> None:
    """Run the worker in `folder`, print each row when it is there, and write all of it as JSON.

    Raises:
        WorkerError: the worker died, or a section failed; what was measured is written all the same.
    """
    from picollm.errors import WorkerError
    from picollm.events import read_all
    from picollm.files import disk_errors, write_json
    from picollm_cli.processes import MEASURE_LOG, measure, measuring_died

    with disk_errors(folder):
        folder.mkdir(parents=True)
        result.parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / "spec.json", {"device": device, "sections": sections, "shapes": shapes.to_json()})
    events, code = folder / "results.jsonl", 1
    try:
        command = [sys.executable, "-m", "picollm.stages.gpu_probe", str(folder)]
        code = measure(command, folder, events, lambda event: _show(out, event))
    finally:
        found = _result(read_all(events))
        write_json(result, found)
    out.note(f"written to {result}")
    failed = [section["section"] for section in found["sections"] if section["error"]]
    if code and not failed:
        raise measuring_died("the probe died", code, folder, hint=f"its whole output is in `{folder / MEASURE_LOG}`")
    if failed:
        cause = "; ".join(f"{s['section']}: {s['error']}" for s in found["sections"] if s["error"])
        hint = f"the other sections are in `{result}`"
        raise WorkerError(f"{len(failed)} of {len(sections)} sections failed", cause=cause, hint=hint)
    out.result(found)


def _result(events: list[dict[str, Any]]) -> dict[str, Any]:
    """`{"device", "torch", "rows", "sections", "missed"}` from the worker's events; names are null when it died."""
    start = next((event for event in events if event["kind"] == "start"), {"device": None, "torch": None})
    inner = {"v", "t", "stage", "kind"}
    rows, sections = (
        [{key: value for key, value in event.items() if key not in inner} for event in events if event["kind"] == kind]
        for kind in ("row", "section_end")
    )
    missed = [f"{row['section']}: {row['name']}" for row in rows if row["passed"] is False]
    return {"device": start["device"], "torch": start["torch"], "rows": rows, "sections": sections, "missed": missed}


def _show(out: Output, event: dict[str, Any]) -> None:
    """One event as a line of text."""
    from picollm.bench.sections import SECTIONS

    if event["kind"] == "start":
        out.print(f"{event['device']}, torch {event['torch']}; bounds are those of an H200")
    elif event["kind"] == "section":
        section = SECTIONS[event["section"]]
        number = 1 + list(SECTIONS).index(event["section"])
        out.print(f"{number}. {event['section']}: {section.asks} (up to {event['budget_s']:.0f} s)", style="name")
    elif event["kind"] == "row":
        good, bad, none = ("✓", "✗", "·") if out.stdout.encoding.lower().startswith("utf") else ("+", "x", "-")
        mark, style = {True: (good, "good"), False: (bad, "bad"), None: (none, None)}[event["passed"]]
        value = event["value"] if isinstance(event["value"], str) else f"{event['value']:,.5g} {event['unit']}".strip()
        bound = f"  (>= {event['bound']:,g})" if event["bound"] is not None else ""
        bound += f"  (<= {event['at_most']:,g})" if event["at_most"] is not None else ""
        detail = "".join(f"  {key} {entry}" for key, entry in event["detail"].items())
        out.print(f"  {mark} {event['name']:52} {value}{bound}{detail}", style=style)
        if event["passed"] is False:
            out.print(f"      {SECTIONS[event['section']].otherwise}")
    elif event["kind"] == "section_end":
        if event["error"]:
            out.warn(f"{event['section']} failed: {event['error']}")
        elif event["cut"]:
            out.note(f"  {event['section']}: out of time after {event['dt_s']:.0f} s; the rest of it was left out")
