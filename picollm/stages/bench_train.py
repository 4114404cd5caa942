"""The process that measures training: `[torchrun] python -m picollm.stages.bench_train FOLDER`.

Reads `config.json` of the folder (`recipe`, `runtime`, `steps`), tells rank 0's progress in `events.jsonl`, and writes
`result.json`, or `{"error": …}` into it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from picollm.errors import PicollmError, first_line
from picollm.events import EventWriter
from picollm.files import read_json, write_json
from picollm.worker import as_known, keep_freed_memory


def main(folder: Path) -> int:
    """Measure what the folder describes; the exit code is that of the error, if there was one."""
    rank = int(os.environ.get("RANK", "0"))
    result = folder / "result.json"
    with contextlib.ExitStack() as stack:
        events = None
        if rank == 0:
            events = EventWriter(folder / "events.jsonl", "bench-train")
            stack.callback(events.close)
        try:
            found = _measure(read_json(folder / "config.json"), rank, events)
        except BaseException as error:
            if not result.exists():  # the first rank to fail tells; the others only lost it
                write_json(result, {"error": as_known(error).to_dict() | {"detail": first_line(error)}})
            raise
        if rank == 0:
            write_json(result, found)
    return 0


def _measure(config: dict[str, Any], rank: int, events: EventWriter | None) -> dict[str, Any]:
    keep_freed_memory()  # as in a worker of a run
    import torch

    from picollm.bench.training import measure
    from picollm.config.recipe import TrainRecipe, TrainRuntime
    from picollm.train import distributed

    recipe, runtime = TrainRecipe.model_validate(config["recipe"]), TrainRuntime.model_validate(config["runtime"])
    torch.set_num_threads(runtime.threads)
    device = distributed.start()

    def tell(text: str) -> None:
        if events is not None:
            events.write("phase", text=text)

    found = measure(recipe, runtime, rank, device, steps=config["steps"], tell=tell)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    distributed.stop()
    return {"torch": torch.__version__, "device": name or "cpu", **found}


if __name__ == "__main__":
    code = 1
    try:
        code = main(Path(sys.argv[1]))
    except PicollmError as error:
        print(error.message, error.cause or "", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as a worker of a run: a rank that fails must not wait at exit for NCCL, nor its peers for it
