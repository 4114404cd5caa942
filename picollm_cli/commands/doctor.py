"""`picollm doctor`: can this machine do it, and what stands in the way?"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from picollm_cli.console import Output
from picollm_cli.options import ConfigFile, Json, Preset, Run, Set

if TYPE_CHECKING:
    from picollm_cli.inspection import Check, Inspection

DEFAULT_PRESET = "demo"
# level -> (mark, mark where the terminal has no such letter, word, style)
MARKS = {
    "ok": ("✓", "+", "ok", "good"),
    "info": ("·", "-", "info", "quiet"),
    "warn": ("!", "!", "warning", "warn"),
    "block": ("✗", "x", "blocks", "bad"),
}


def doctor(
    checks: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="CHECK", help="Checks to run, such as `torch`; all of them when none is named."),
    ] = None,
    run: Run = None,
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Set = None,
    list_: Annotated[bool, typer.Option("--list", help="List the checks and what each asks.")] = False,
    json: Json = False,
) -> None:
    """Check this machine, its packages, and whether a run fits.

    Looks at a new run of preset `demo` unless told. Exit code 3 when
    something blocks. The torch checks start a process of their own once and
    keep its answer in `machine.json` of the base directory.

    \b
    Examples:
      picollm doctor
      picollm doctor --preset cpu-small --set data.dataset=notes
      picollm doctor disk.room disk.writable
      picollm doctor --run demo --json
      picollm doctor --list
    """
    from picollm_cli.checks import CHECKS, run_check, select

    out = Output(json)
    names = select(checks or ())
    width = max(map(len, CHECKS))
    if list_:
        for name in names:
            out.print(f"{name:{width}}  {CHECKS[name][1]}")
        out.result({"checks": [{"id": name, "asks": CHECKS[name][1]} for name in names]})
        return
    inspection = _inspection(run, preset, config, set_ or [])
    found = []
    for name in names:
        found.append(run_check(name, inspection))
        _print_check(out, found[-1], width)
    blockers = [check.id for check in found if check.level == "block"]
    out.print()
    out.print(_summary(found, inspection))
    out.result({"ok": not blockers, "checks": [check.to_json() for check in found]})
    if blockers:
        out.note(f"blocked by: {', '.join(blockers)}")
        raise typer.Exit(3)


def _inspection(run: str | None, preset: str | None, config: str | None, sets: list[str]) -> Inspection:
    """What to look at: an existing run, or the new one that `speedrun` would make of the same options.

    Raises:
        MissingArtifact: `--run` names a run that is not there, and nothing says what it would be made of.
        ConfigError: what this call says about the config is wrong. What stands in the user's own file or the
            environment is left to the checks, so that doctor still says everything else.
    """
    from picollm.errors import ConfigError
    from picollm.run_dir import expand, find_run, run_named
    from picollm_cli.inspection import Inspection

    asked = bool(preset or config or sets)
    name = run or os.environ.get("PICOLLM_RUN") or None
    target = run_named(name) if name else None
    if target is not None and not target.exists():
        target = find_run(name) if run and not (preset or config) else None
    if target is not None and preset and preset != (made_with := target.read_config().get("preset")):
        # A name in the environment is a default; one that was typed is meant.
        if run:
            raise ConfigError(
                f"run `{run}` was made with another preset",
                cause=f"it was `{made_with}`, now `{preset}` is given",
                hint="leave out `--preset`, or leave out `--run` to look at a new run",
            )
        target, name = None, None
    if target is None and preset is None and config is None:
        preset = DEFAULT_PRESET
    inspection = Inspection(
        run=target,
        name=name,
        preset=None if target else preset,
        config_path=expand(config) if config else None,
        sets=sets,
    )
    if asked:
        inspection.require_config()
    return inspection


def _print_check(out: Output, check: Check, width: int) -> None:
    from rich.text import Text

    mark, plain_mark, word, style = MARKS[check.level]
    unicode = out.stdout.encoding.lower().startswith("utf")
    out.print(
        Text.assemble((f"{mark if unicode else plain_mark} {word:8}", style), f"{check.id:{width}}  {check.detail}")
    )
    if check.fix:
        out.print(f"    fix: {check.fix}")


def _summary(found: list[Check], inspection: Inspection) -> str:
    from picollm.errors import PicollmError
    from picollm_cli.checks import CHECKS

    blocking = sum(check.level == "block" for check in found)
    warnings = sum(check.level == "warn" for check in found)
    warned = f", {warnings} warning{'s' if warnings != 1 else ''}" if warnings else ""
    if blocking:
        return f"{blocking} check{' blocks' if blocking == 1 else 's block'}{warned}"
    if len(found) < len(CHECKS):
        return f"Nothing blocks in {len(found)} of {len(CHECKS)} checks{warned}"
    try:
        _ = inspection.plan
    except PicollmError:
        return f"Nothing blocks on this machine, but the config of {inspection.subject} cannot be used{warned}"
    return f"This machine is ready for {inspection.subject}{warned}; start it with `{inspection.command}`"
