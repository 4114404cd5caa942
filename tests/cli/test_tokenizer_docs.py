"""The commands of `docs/tokenizer.md` do what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from picollm.config.tokenizer import TokenizerConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs/tokenizer.md").read_text()


def test_the_commands_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    script = f'set -e\npicollm() {{ "{sys.executable}" -m picollm_cli "$@"; }}\n' + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "unknown bytes 0" in done.stdout
    assert "tokens of 2 digits" in done.stdout  # the dry run says what GGUF cannot hold


def test_the_defaults_are_the_ones_of_the_schema() -> None:
    rows = dict(re.findall(r"\| `tokenizer\.(\w+)` \| ([\d,]+) \|", PAGE))
    found = {name: int(value.replace(",", "")) for name, value in rows.items()}
    assert found == TokenizerConfig().model_dump()
