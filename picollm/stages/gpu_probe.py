"""The process that measures: `python -m picollm.stages.gpu_probe FOLDER`.

Reads `spec.json` of the folder, appends to its `results.jsonl`, and exits 1 when a section failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from picollm.events import EventWriter
from picollm.files import read_json


def main(folder: Path) -> int:
    """Run the probe that the folder describes."""
    from picollm.bench.gpu_probe import Spec, run

    spec = Spec.of(read_json(folder / "spec.json"))
    events = EventWriter(folder / "results.jsonl", "gpu-probe")
    good = run(spec, events.write)
    events.close()
    return 0 if good else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("one argument, the folder with `spec.json`: `picollm bench gpu-probe` makes it and starts this")
    sys.exit(main(Path(sys.argv[1])))
