"""The commands of `docs/data.md` do what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from picollm.data.datasets import list_datasets
from picollm.data.importer import import_paths
from picollm.events import read_all
from picollm.files import read_json
from picollm.run_dir import run_named

ROOT = Path(__file__).parents[2]


def blocks_of(section: str) -> list[str]:
    """The bash blocks of a section of the page."""
    page = (ROOT / "docs/data.md").read_text()
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_block(block: str, folder: Path) -> str:
    """What a block prints."""
    program = f'picollm() {{ "{sys.executable}" -m picollm_cli "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", program + block], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_your_own_data(tmp_path: Path) -> None:
    blocks = blocks_of("Your own data")
    assert len(blocks) == 3
    found: list[dict[str, int]] = []
    shown = ""
    for block in blocks:
        shown += run_block(block, tmp_path)
        found.append({dataset.name: dataset.rows() for dataset in list_datasets()})
    assert found == [
        {"my-notes": 2, "my-table": 2}, {"my-notes": 2, "my-table": 2, "piped": 2}, {"my-notes": 2, "my-table": 2},
    ]  # fmt: skip
    assert re.search(r"^rejected: shorter than 6 characters +1 *$", shown, re.MULTILINE)
    assert re.search(r"^duplicates +1 *$", shown, re.MULTILINE)


def test_mixtures_and_the_cache(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(3):
        (notes / f"{i}.txt").write_text(f"Note {i}: the tide table hangs beside the door. " * (2 + i))
    import_paths("my-notes", [notes])
    [mix], [other] = blocks_of("Mixtures"), blocks_of("The token cache")
    run_block(mix, tmp_path)
    stage = run_named("mixed").stage("pretrain")
    result = stage.record()["result"]
    shares = {part["dataset"]: part["share"] for part in result["data"]}
    assert shares == pytest.approx({"my-notes": 0.25, "toy-world": 0.75}, abs=0.01)
    names = {event["name"] for event in read_all(stage.events_path) if event["kind"] == "eval"}
    assert {"val_bpb", "val_bpb/toy-world"} <= names
    assert [path.name[:8] for path in (stage.run.base / "cache/tokens").iterdir() if path.is_dir()] == ["my-notes"]
    shown = run_block(other, tmp_path)
    assert re.search(r'data\.mix +\{"toy-world": 1.0, "my-notes": 1.0\} +--set', shown), shown
    assert re.search(r"data\.packing +documents", shown)
    assert not run_named("other").exists()
    assert read_json(stage.config_path)["recipe"]["data"][0]["weight"] == 1.0
