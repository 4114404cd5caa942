"""Does an export say what the model says? Checks as rows of a table, and the end of every export: kept or `.failed`."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from picollm import __version__
from picollm.errors import ConfigError, IntegrityError
from picollm.files import SCHEMA, disk_errors, fsync_path, read_json, write_json

REPORT = "export.json"
FAILED = ".failed"
# What float32 logits may differ by in another program, over this many positions of each prompt.
MAX_LOGIT_ERROR = 1e-4
POSITIONS = 256


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        value: what was found, with its unit in the name or the text; None when nothing was.
        bound: what it must be, in words.
        passed: None when the check was not run; `note` then says why and what would make it run.
    """

    name: str
    value: str | int | float | None
    bound: str
    passed: bool | None
    note: str = ""

    @property
    def result(self) -> str:
        return {True: "ok", False: "FAILED", None: "not run"}[self.passed]


def not_run(name: str, bound: str, note: str) -> Check:
    return Check(name, None, bound, None, note)


# -- logits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far another program's logits are from ours.

    Attributes:
        logits: largest absolute difference.
        kl: mean over positions of KL(native || found), nats per token.
        agreement: share of positions whose most likely token is the same.
        lead: where it is not, how far ahead of theirs our most likely token is, at most; rounding decides ties.
    """

    logits: float
    kl: float
    agreement: float
    lead: float
    positions: int


def compare(native: Float[Tensor, "N V"], found: Float[Tensor, "N V"]) -> Difference:
    """Compare logits, or log-probabilities, of the same positions."""
    assert native.shape == found.shape, (native.shape, found.shape)
    largest = lead = agreed = kl = 0.0
    for ours, theirs in zip(native.split(64), found.split(64), strict=True):
        ours, theirs = ours.double(), theirs.double()
        error = (ours - theirs).abs().max()
        largest = max(largest, float("inf") if error.isnan() else float(error))
        log_p = ours.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - theirs.log_softmax(-1))).sum())
        chosen = theirs.argmax(-1, keepdim=True)
        agreed += int((ours.argmax(-1, keepdim=True) == chosen).sum())
        lead = max(lead, float((ours.amax(-1, keepdim=True) - ours.gather(-1, chosen)).max()))
    n = len(native)
    return Difference(largest, kl / n, agreed / n, lead, n)


def logit_checks(
    difference: Difference, *, max_error: float | None = None, max_kl: float | None = None, min_agreement: float = 1.0
) -> list[Check]:
    """The three rows; what has no bound is reported all the same.

    Where logits are exact to `max_error`, tokens that are no further apart than twice that may change places.
    """
    where = f"{difference.positions} positions"
    tied = max_error is not None and difference.lead <= 2 * max_error
    agrees = difference.agreement >= min_agreement or tied
    return [
        _at_most("logits, largest difference", difference.logits, max_error, where),
        _at_most("KL, nats per token", difference.kl, max_kl, where),
        Check("argmax agreement", difference.agreement, f">= {min_agreement:.0%}, or ties", agrees, where),
    ]


def _at_most(name: str, value: float, bound: float | None, note: str) -> Check:
    return Check(name, value, "reported" if bound is None else f"<= {bound:g}", bound is None or value <= bound, note)


def probes(prompts: Sequence[Sequence[int]], vocab_size: int, length: int, bos: int) -> list[list[int]]:
    """Rows of ids, bos first, none longer than `length`: the prompts one after the other, and random ids.

    Together they have at least `POSITIONS` positions of each kind, or `length` when that is less.
    """
    wanted = min(POSITIONS, length)
    generator = torch.Generator().manual_seed(0)
    random: Int[Tensor, " N"] = torch.randint(0, vocab_size, (wanted - 1,), generator=generator)
    text = [token for prompt in prompts for token in (bos, *prompt)] or [bos]
    text = (text * (wanted // len(text) + 1))[:wanted]
    return [text, [bos, *random.tolist()]]


# -- the end of an export ---------------------------------------------------------------------------------------------


def claim(target: Path, *, force: bool) -> None:
    """Make sure that an export may have this name, before any work.

    Only what an export of ours has written is ever replaced, whatever the user insists on.

    Raises:
        ConfigError: something is there already.
    """
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    ours = _is_report(report_path(target))
    if force and ours:
        return
    raise ConfigError(
        f"`{target}` exists",
        cause="an export replaces nothing unless told" if ours else "and no export of picollm wrote it",
        hint="repeat the command with `--force`, or choose another place with `--out`"
        if ours
        else "remove it yourself, or choose another place with `--out`",
    )


def _is_report(path: Path) -> bool:
    """Whether `finish` wrote it: other programs call files so too."""
    try:
        found = read_json(path)
    except (OSError, IntegrityError):
        return False
    return isinstance(found, dict) and "picollm" in found and "checks" in found


def report_path(target: Path) -> Path:
    """Where the report of an export stands: in its folder, or beside its file."""
    return target / REPORT if target.is_dir() else target.with_name(f"{target.name}.{REPORT}")


def finish(written: Path, target: Path, checks: Sequence[Check], about: dict[str, Any]) -> dict[str, Any]:
    """Give a checked export its name, or the name `….failed`; its report goes with it.

    Args:
        written: the finished file or folder under a temporary name beside `target`; gone afterwards.
        about: what the report says beside the checks: format, architecture, types, run, stage …

    Returns:
        the report, as it stands in `export.json`.

    Raises:
        IntegrityError: a check failed.
        HostError: the disk is full or cannot be written.
    """
    failed = [check for check in checks if check.passed is False]
    final = target.with_name(target.name + FAILED) if failed else target
    report = {
        "schema": SCHEMA,
        "picollm": __version__,
        "name": final.name,
        "ok": not failed,
        **about,
        "checks": [{**asdict(check), "value": _plain(check.value), "result": check.result} for check in checks],
    }
    with disk_errors(final):
        if written.is_dir():
            write_json(written / REPORT, report)
            fsync_path(written)
            _replace(written, final)
        else:
            # The file first: a report without its file would say that an older one is good.
            fsync_path(written)
            report_path(final).unlink(missing_ok=True)
            _replace(written, final)
            write_json(report_path(final), report)
    if failed:
        rows = "; ".join(f"{check.name}: {check.value}, wanted {check.bound}" for check in failed)
        raise IntegrityError(
            "the export does not agree with the model",
            cause=rows,
            hint=f"it was left as `{final}`; tell us, with its `{REPORT}`",
        )
    return report


def _plain(value: str | int | float | None) -> str | int | float | None:
    """As JSON can say it, which has no name for infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _replace(written: Path, final: Path) -> None:
    """Rename over what an earlier export left: a folder cannot be replaced in one step, so it steps aside first."""
    aside = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
    there = final.is_dir() and written.is_dir()
    if there:
        os.replace(final, aside)
    try:
        os.replace(written, final)
    except OSError:
        if there:
            os.replace(aside, final)
        raise
    fsync_path(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
