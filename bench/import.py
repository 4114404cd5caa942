"""What importing costs: characters per second and memory, with one process and with as many as there are CPUs.

    python bench/import.py [--mib 1024] [--files 1] [--folder DIR]

Generates JSON lines (documents of 200 to 20 000 characters, one in fifty twice), imports them in a fresh process for
each number of processes, and prints one JSON object. `characters_per_s` is by wall-clock time, Python's start included.
`parent_mib` and `child_mib` are the most memory that the importing process and any single one of its helpers had.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from picollm.hardware import usable_cpus

IMPORT = """
import json, resource, sys
from pathlib import Path
from picollm.data.importer import import_paths

if __name__ == "__main__":
    done = import_paths("bench", [Path(sys.argv[1])], processes=int(sys.argv[2]), force=True)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1 if sys.platform == "darwin" else 1024
    print(json.dumps(done.to_json() | {"parent": peaks[0] * unit, "child": peaks[1] * unit}))
"""


def generate(folder: Path, mib: int, files: int) -> None:
    """Files of the same text every time."""
    chooser = random.Random(1)
    words = ["".join(chooser.choices("etaoinshrdlu", k=chooser.randint(1, 11))) for _ in range(20_000)]
    for number in range(files):
        written, before = 0, ""
        with open(folder / f"{number:03d}.jsonl", "w", encoding="utf-8") as file:
            while written < mib * 2**20 // files:
                text = " ".join(chooser.choices(words, k=chooser.randint(30, 3000)))
                if chooser.random() < 0.02:
                    text = before or text
                before = text
                written += file.write(json.dumps({"text": text}) + "\n")


def measure(folder: Path, base: Path, processes: int) -> dict[str, float | int]:
    started = time.perf_counter()
    script = base / "import_it.py"
    script.write_text(IMPORT)
    done = subprocess.run(
        [sys.executable, script, folder, str(processes)],
        env=os.environ | {"PICOLLM_BASE_DIR": str(base), "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds = time.perf_counter() - started
    found = json.loads(done.stdout)
    return {
        "processes": processes,
        "seconds": round(seconds, 1),
        "characters": found["characters"],
        "characters_per_s": round(found["characters"] / seconds),
        "duplicates": found["duplicates"],
        "parent_mib": round(found["parent"] / 2**20),
        "child_mib": round(found["child"] / 2**20) if processes > 1 else 0,
        "sha256": found["sha256"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the text and the dataset; a temporary one unless given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        text = Path(temporary, "text")
        text.mkdir()
        generate(text, args.mib, args.files)
        runs = [measure(text, Path(temporary), count) for count in dict.fromkeys((1, usable_cpus()))]
    print(json.dumps({"mib": args.mib, "files": args.files, "cpus": usable_cpus(), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
