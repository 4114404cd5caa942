"""Out of memory in an attempt's first steps: the next attempt takes fewer rows at a time.

Tokens per step stay: with half of the rows in a forward pass there are twice as many passes. Whoever started the
worker starts it again, torchrun or the command; a worker that ran out of memory is in no state to try in place.
"""

from __future__ import annotations

from typing import Any

from picollm.errors import OutOfMemory, first_line
from picollm.files import read_json, write_json
from picollm.run_dir import StageDir
from picollm.worker import is_out_of_memory

# Memory has reached its peak by then; what fails later is not the batch alone, and hours may have passed.
FIRST_STEPS = 20


def smaller_batch(stage: StageDir, rows: int, error: Exception) -> OutOfMemory | None:
    """Write half of `rows` into the stage's `runtime.json`, if `error` is about memory and there is half.

    Every rank may come here at once: all write the same.

    Args:
        rows: `device_batch_size` of this attempt.

    Returns:
        What to raise instead, with `backed_off` set; None when there is nothing to back off from.
    """
    if not is_out_of_memory(error) or rows <= 1:
        return None
    half = rows // 2
    reason = f"out of memory with {rows} rows at a time"
    kept: dict[str, Any] = read_json(stage.runtime_path) if stage.runtime_path.is_file() else {}
    write_json(stage.runtime_path, kept | {"device_batch_size": half, "reason": reason})
    smaller = OutOfMemory(
        reason,
        cause=first_line(error),
        hint=f"run the same command again: it goes on with {half}; the batch in tokens stays the same",
    )
    smaller.backed_off = True
    return smaller
