"""`picollm export`: the model as files that other programs run."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from picollm.errors import ConfigError
from picollm.units import size
from picollm_cli import options
from picollm_cli.console import Output
from picollm_cli.stage_option import StageOption, choose_stage
from picollm_cli.text_input import argument_text

if TYPE_CHECKING:
    from picollm.export.parity import Check
    from picollm.run_dir import RunDir

HELP = """Write the model as files that other programs run.

\b
Examples:
  picollm export list
  picollm export gguf --quant Q8_0
  picollm export transformers --run demo
"""
app = typer.Typer(no_args_is_help=True, help=HELP)

License = Annotated[
    Optional[str],
    typer.Option("--license", metavar="ID", help="Licence of the weights, as `apache-2.0`.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier export of that name.")]


@app.command()
def gguf(
    run: options.Run = None,
    stage: StageOption = None,
    quant: Annotated[
        str,
        typer.Option(
            "--quant",
            metavar="TYPE",
            help="F32 F16 BF16 Q8_0 Q5_1 Q5_0 Q4_1 Q4_0; with `llama-quantize` on PATH also Q4_K_M, Q6_K, IQ4_XS …",
        ),
    ] = "Q8_0",
    arch: Annotated[
        str, typer.Option("--arch", metavar="NAME", help="apertus (exact), or qwen3 for older runtimes.")
    ] = "apertus",
    file: Annotated[
        Optional[str],
        typer.Option("--out", metavar="FILE", help="File to write; inside the run unless told.", show_default=False),
    ] = None,
    license: License = None,
    force: Force = False,
    json: options.Json = False,
) -> None:
    """Write a GGUF file for llama.cpp, Ollama, LM Studio and others.

    The file is read back and compared with the checkpoint; where llama.cpp is
    installed (`pip install xllamacpp`) it must also give the same tokens and
    probabilities. A file that does not is left with the name `….failed`.

    \b
    Examples:
      picollm export gguf
      picollm export gguf --run demo --quant F16
      picollm export gguf --stage pretrain --out base.gguf
      picollm export gguf --arch qwen3 --quant Q4_K_M
    """
    from picollm.export.gguf_types import find_host, find_quant
    from picollm.run_dir import find_run

    out = Output(json)
    quant_, host = find_quant(quant), find_host(arch)
    found = find_run(run)
    chosen = choose_stage(found, stage)
    if license is not None:
        license = argument_text(license)
    # Torch comes with these; nothing above needs it, so that mistakes are told at once.
    from picollm.export.gguf_export import GGUFRequest, default_path, export_gguf, modelfile_path

    target = _file(file) or default_path(chosen, quant_, host)
    force = force or _may_replace(out, target)
    with _listed(found), _Phases(out) as phases:
        report = export_gguf(
            GGUFRequest(chosen, quant_, host, target, force=force, license=license),
            on_progress=phases.update,
            on_checks=lambda checks: _table(out, phases, checks),
        )
    if not quant_.direct:
        types = ", ".join(f"{count} {name}" for name, count in report["types"].items())
        out.note(f"`llama-quantize` chooses a type for each matrix, by its rows too: {types}")
    if kept := report["kept_float"]:
        shown = ", ".join(kept[:4]) + (" …" if len(kept) > 4 else "")
        out.warn(f"the rows of {len(kept)} matrices fit no block of {report['quant']}, so they stay F16: {shown}")
    out.print(str(target))
    out.note(f"{size(report['bytes'])}; runs in {report['runtime']}")
    if host == "apertus":
        out.note("for an older one: `--arch qwen3`, with half as many weights again in the MLP")
    run_ = f"--run {found.name}" if stage is None else f"--run {found.name} --stage {chosen.name}"
    out.hint(
        f"talk to it with `picollm chat {run_} --engine {'llamacpp' if file is None else shlex.quote(str(target))}`; "
        f"for Ollama: `ollama create {found.name} -f {shlex.quote(str(modelfile_path(target)))}`"
    )
    out.result({"path": str(target), "modelfile": str(modelfile_path(target)), **report})


@app.command()
def transformers(
    run: options.Run = None,
    stage: StageOption = None,
    arch: Annotated[
        Optional[str],
        typer.Option(
            "--arch",
            metavar="NAME",
            help="qwen3, apertus (a third smaller in the MLP), or picollm with its own code; qwen3 where it fits.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16.")] = "float32",
    folder: Annotated[
        Optional[str],
        typer.Option("--out", metavar="DIR", help="Folder to write; inside the run unless told.", show_default=False),
    ] = None,
    license: License = None,
    force: Force = False,
    json: options.Json = False,
) -> None:
    """Write a folder for Hugging Face Transformers, vLLM and others.

    A model of stock features needs no code of ours there; one with
    `model.arch=full` takes its code with it. The folder is loaded with the
    real library, where it is installed, and must give the same logits.

    \b
    Examples:
      picollm export transformers
      picollm export transformers --run demo --dtype bfloat16
      picollm export transformers --arch apertus --out demo-hf
    """
    from picollm.run_dir import expand, find_run

    out = Output(json)
    found = find_run(run)
    chosen = choose_stage(found, stage)
    if license is not None:
        license = argument_text(license)
    target = None if folder is None else expand(argument_text(folder)).absolute()
    from picollm.export.transformers import TransformersRequest, export_transformers, planned_path

    request = TransformersRequest(chosen, arch, dtype, target, force=force, license=license)
    target = planned_path(request)
    request = replace(request, out=target, force=force or _may_replace(out, target))
    with _listed(found), _Phases(out) as phases:
        report = export_transformers(
            request, on_progress=phases.update, on_checks=lambda checks: _table(out, phases, checks)
        )
    out.print(str(target))
    out.note(f"{size(report['bytes'])}; needs {report['needs']}")
    out.result({"path": str(target), **report})


@app.command("list")
def list_(run: options.Run = None, json: options.Json = False) -> None:
    """Show what this run's model can be exported to, and why not.

    \b
    Examples:
      picollm export list
      picollm export list --run demo --json
    """
    from rich.table import Table
    from rich.text import Text

    from picollm.export.listing import made, targets
    from picollm.run_dir import find_run

    out = Output(json)
    found = find_run(run)
    possible, files = targets(found), made(found)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("target", "possible", "why"):
        table.add_column(heading)
    for name, target in possible.items():
        table.add_row(name, "yes" if target.possible else "no", Text(target.reason))
    out.table(table)
    if files:
        out.print()
        for file in files:
            out.print(file["path"] + ("" if file["ok"] else "  (failed its checks)"))
    out.result(
        {
            "run": found.name,
            "exports": {name: {"possible": t.possible, "reason": t.reason} for name, t in possible.items()},
            "made": files,
        }
    )


# -- what the commands share ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _listed(run: RunDir) -> Iterator[None]:
    """Bring the run's manifest up to date, whether the export passed or was left as `.failed`."""
    from picollm.manifest import list_exports

    try:
        yield
    finally:
        list_exports(run)


class _Phases:
    """Progress of one thing after another: writing, reading back …"""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._stack = ExitStack()
        self._phase = ""
        self._update: Any = None

    def __enter__(self) -> _Phases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.close()
            self._phase = phase
            unit = {"writing": "bytes", "reading back": "tensors"}.get(phase, "steps")
            self._update = self._stack.enter_context(self._out.progress(phase, unit=unit))
        self._update(done, total)

    def close(self) -> None:
        self._stack.close()
        self._phase = ""


def _file(name: str | None) -> Path | None:
    """What `--out` names.

    Raises:
        ConfigError: a folder, or a name that is not one of a GGUF file.
    """
    if name is None:
        return None
    from picollm.run_dir import expand

    path = expand(argument_text(name)).absolute()
    if path.is_dir() or name.endswith("/"):
        raise ConfigError(
            f"`{path}` is a folder",
            cause="`--out` names the file to write",
            hint=f"add a name: `--out {path}/model.gguf`",
        )
    if path.suffix != ".gguf":
        raise ConfigError(
            f"`{path.name}` is not the name of a GGUF file",
            cause="programs know one by the end of its name, and a `Modelfile` is written beside it",
            hint=f"call it `--out {shlex.quote(f'{name}.gguf')}`",
        )
    return path


def _may_replace(out: Output, target: Path) -> bool:
    """Ask before an earlier export is replaced; without a terminal nobody is asked, and the export says no itself."""
    from picollm.export.parity import report_path

    if not (sys.stdin.isatty() and target.exists() and report_path(target).is_file()):
        return False
    if out.confirm(f"replace `{target}`?", yes=False):
        return True
    raise ConfigError(f"`{target}` was kept", hint="choose another place with `--out`")


def _table(out: Output, phases: _Phases, checks: list[Check]) -> None:
    """The table of checks, on stdout, when the last phase has ended; why rows were not run stands once, below it."""
    phases.close()
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "good", "FAILED": "bad", "not run": "warn"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("check", "result", "found", "wanted", "on"):
        table.add_column(heading)
    for check in checks:
        value = (
            f"{check.value:g}" if isinstance(check.value, float) else "" if check.value is None else str(check.value)
        )
        note = "" if check.passed is None else check.note
        table.add_row(check.name, Text(check.result, styles[check.result]), value, check.bound, Text(note))
    out.table(table)
    for reason in dict.fromkeys(check.note for check in checks if check.passed is None):
        out.print(f"not run: {reason}")
