"""`picollm export gguf`, from a stage to a checked file: everything but talking to the user."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picollm.errors import ConfigError
from picollm.export import features, folding, gguf, gguf_file, llamacpp_checks, parity
from picollm.export.folding import Checkpoint
from picollm.export.gguf_table import Entry
from picollm.export.gguf_types import DIRECT, Quant
from picollm.export.heap import return_large_blocks
from picollm.export.ollama import modelfile
from picollm.export.parity import Check
from picollm.export.provenance import provenance_of
from picollm.export.unready import unready as temporary
from picollm.files import sha256_file, write_atomic
from picollm.run_dir import RunDir, StageDir
from picollm.train import checkpoint_files
from picollm.train.checkpoint_tensors import architecture_of

# phase, done, total
Progress = Callable[[str, int, int], None]

# The oldest releases that have the two architectures: llama.cpp's pull requests 15852 and 12828.
OLDEST_RUNTIME = {
    "apertus": "llama.cpp of October 2025 (it brought `apertus` with xIELU) and what embeds one as new",
    "qwen3": "llama.cpp of April 2025 (it brought `qwen3`) and what embeds one as new",
}


@dataclass(frozen=True)
class GGUFRequest:
    """What is asked for.

    Attributes:
        host: stock architecture that the file names.
        license: of the weights; left out of the file unless given.
    """

    stage: StageDir
    quant: Quant
    host: str
    out: Path
    force: bool = False
    license: str | None = None


def default_path(stage: StageDir, quant: Quant, host: str) -> Path:
    """`RUN/export/gguf/RUN-STAGE-QUANT.gguf`, with the host in it where it is not the usual one."""
    suffix = "" if host == "apertus" else f"-{host}"
    return gguf_folder(stage.run) / f"{stage.run.name}-{stage.name}{suffix}-{quant.name}.gguf"


def gguf_folder(run: RunDir) -> Path:
    return run.path / "export" / "gguf"


def export_gguf(
    request: GGUFRequest,
    *,
    on_progress: Progress = lambda phase, done, total: None,
    on_checks: Callable[[list[Check]], None] = lambda checks: None,
) -> dict[str, Any]:
    """Write the file and its `Modelfile`, check them, and give them their names.

    Args:
        on_checks: called with the rows of the table, passed or not, before the file gets its name.

    Returns:
        the report, as in `export.json`.

    Raises:
        ConfigError: the model has features that no stock architecture has, or there is a file of that name.
        MissingArtifact: the stage has no checkpoint.
        IntegrityError: the checkpoint is damaged, or the export does not agree with it; then it is `….failed`.
        HostError: no room on the disk, or a program that is needed is not there.
    """
    quant, host, out = request.quant, request.host, request.out
    return_large_blocks()
    parity.claim(out, force=request.force)
    _refuse_foreign_modelfile(out)
    if not quant.direct:
        _refuse_widths(request.stage, quant)
        gguf.find_program(quant)
    checkpoint = folding.open_checkpoint(request.stage)
    tokenizer = folding.open_tokenizer(checkpoint)
    refuse_blocked(checkpoint, digits=tokenizer.digits)
    arch = checkpoint.arch
    provenance = provenance_of(checkpoint, request.license)
    metadata, listed = gguf.table(checkpoint, tokenizer, host, quant, provenance)
    with temporary(out) as unready:
        source = unready.with_suffix(".f32.tmp") if not quant.direct else unready
        try:
            gguf.write(
                source, checkpoint, host, quant, listed, metadata,
                on_progress=lambda done, total: on_progress("writing", done, total),
            )  # fmt: skip
            if not quant.direct:
                on_progress("llama-quantize", 0, 1)
                gguf.quantise(source, unready, quant)
        finally:
            if source != unready:
                source.unlink(missing_ok=True)
        stored = gguf_file.read(unready)
        checks = _file_checks(unready, stored, checkpoint, host, quant, listed, metadata, on_progress)
        on_progress("llama.cpp", 0, 1)
        checks += llamacpp_checks.checks(unready, checkpoint, tokenizer, quant)
        on_checks(checks)
        about = {
            "format": "gguf",
            "run": request.stage.run.name,
            "stage": request.stage.name,
            "step": checkpoint.step,
            "arch": host,
            "quant": quant.name,
            "file": out.name,
            "bytes": unready.stat().st_size,
            "sha256": sha256_file(unready),
            "checkpoint_sha256": checkpoint.sha256,
            "recipe_sha256": provenance.recipe_sha256,
            "types": stored.matrix_types,
            "kept_float": stored.float_matrices if not quant.is_float else [],
            "runtime": OLDEST_RUNTIME[host],
        }
        report = parity.finish(unready, out, checks, about)
    write_atomic(
        modelfile_path(out), modelfile(out.name, is_chat=provenance.is_chat, context=arch.max_position_embeddings)
    )
    return report


def _refuse_foreign_modelfile(out: Path) -> None:
    """Raises ConfigError: a file that somebody else wrote has the name of what comes beside the export."""
    path = modelfile_path(out)
    if os.path.lexists(path) and not parity.report_path(out).is_file():
        raise ConfigError(
            f"`{path}` exists",
            cause="and no export of picollm wrote it; an export writes a file of that name for Ollama",
            hint="remove it yourself, or choose another place with `--out`",
        )


def _refuse_widths(stage: StageDir, quant: Quant) -> None:
    """Say that the model is too narrow for a type before its program is asked for.

    Raises:
        ConfigError: no matrix has rows that its blocks divide.
        MissingArtifact: the stage has no checkpoint.
    """
    path = checkpoint_files.checkpoint_dir(stage, checkpoint_files.latest_step(stage))
    widths = sorted({*features.row_widths(architecture_of(path, checkpoint_files.read_meta(path)))})
    if any(map(quant.fits, widths)):
        return
    others = [other for other in DIRECT.values() if any(map(other.fits, widths)) and not other.is_float]
    nearest = min(others or [DIRECT["F16"]], key=lambda other: abs(other.bits - quant.bits))
    raise ConfigError(
        f"no matrix of run `{stage.run.name}` can be stored as {quant.name}",
        cause=f"its rows must be multiples of {quant.block}; they have {', '.join(map(str, widths))} weights",
        hint=f"choose `--quant {nearest.name}`",
    )


def modelfile_path(out: Path) -> Path:
    """Ollama's `Modelfile` of a GGUF file; with the file's name before it, because a folder may hold several."""
    return out.with_name(f"{out.stem}.Modelfile")


def refuse_blocked(checkpoint: Checkpoint, *, digits: int) -> None:
    """Say no before anything is written, naming every feature that stands in the way.

    Raises:
        ConfigError: there is one.
    """
    blocking = features.blockers(checkpoint.arch, digits=digits)[features.GGUF]
    if blocking:
        raise ConfigError(
            f"run `{checkpoint.stage.run.name}` cannot be exported as GGUF",
            cause=f"no program that reads GGUF has {', '.join(blocking)}",
            hint=f"use `picollm export transformers --run {checkpoint.stage.run.name}`; "
            + features.gguf_cure(checkpoint.arch, digits=digits),
        )


def _file_checks(
    path: Path, stored: gguf_file.Contents, checkpoint: Checkpoint, host: str, quant: Quant, listed: list[Entry],
    metadata: dict[str, Any], on_progress: Progress,
) -> list[Check]:  # fmt: skip
    """The rows that need no runtime: every key and every tensor, read back from the disk."""
    wrong = gguf_file.wrong_keys(stored.keys, host, quant, metadata)
    error, differing = gguf_file.tensor_errors(
        path, stored.tensors, quant, listed, gguf.tensors(checkpoint, host, quant),
        on_progress=lambda done, total: on_progress("reading back", done, total),
    )  # fmt: skip
    num_keys = len(metadata) + 2
    return [
        Check(
            "tensors", f"{len(listed) - len(differing)} of {len(listed)}", f"{len(listed)} of {len(listed)}",
            not differing, "; ".join(differing[:3]) or "names, types and shapes",
        ),
        Check(
            "tensor values, largest relative error", float(f"{error:.3g}"), f"<= {quant.max_error:g}",
            error <= quant.max_error, "root mean square of a tensor's difference over its own",
        ),
        Check(
            "keys", f"{num_keys - len(wrong)} of {num_keys}", f"{num_keys} of {num_keys}", not wrong,
            "; ".join(wrong[:3]),
        ),
    ]  # fmt: skip
