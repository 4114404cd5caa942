"""A run small enough to be trained many times: 2 layers, hidden 64, rows of 32 tokens, float64 or float32."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from picollm.files import sha256_file
from picollm.run_dir import RunDir, StageDir
from picollm.train.checkpoint_files import checkpoint_dir, latest_step

CONFIG = """
seed = 1
[data]
dataset = "small"
buffer_documents = 20
[tokenizer]
vocab_size = 300
[model]
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 32
[train]
steps = 200
batch_tokens = 256
checkpoint_every = 5
dtype = "float32"
threads = 1
eval_tokens = 500
[sft]
steps = 40
[[sft.mix]]
dataset = "talks"
[eval]
max_new_tokens = 8
"""


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a text dataset, a conversation dataset and the config above; copied by `lab`."""
    base = tmp_path_factory.mktemp("pipeline") / "base"
    rng = random.Random(0)
    words = "the a small old red cat dog bird sees likes finds house river tree and runs home".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(4, 60))) + "." for _ in range(300)]
    talks = [
        {"messages": [{"role": "user", "content": f"Say {w}"}, {"role": "assistant", "content": f"{w} {w}."}]}
        for w in words * 6
    ]
    source = base.parent / "source"
    source.mkdir()
    (source / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (source / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    lab = Lab(base)
    lab.ok("data", "import", "small", str(source / "texts.jsonl"))
    lab.ok("data", "import", "talks", str(source / "talks.jsonl"))
    (base / "small.toml").write_text(CONFIG)
    return base


class Lab:
    """One base directory and the commands run in it, as a user would run them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.env = os.environ | {"PICOLLM_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "picollm_cli", *args]

    def start(self, *args: str) -> subprocess.Popen[str]:
        """The command as a background process with its own session."""
        return subprocess.Popen(
            self.command(*args), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args), env=self.env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
        )

    def ok(self, *args: str) -> subprocess.CompletedProcess[str]:
        done = self.run(*args)
        assert done.returncode == 0, done.stderr
        return done

    def speedrun(self, run: str, *args: str) -> tuple[str, ...]:
        return ("speedrun", "--run", run, "--config", str(self.base / "small.toml"), *args)

    def run_dir(self, name: str) -> RunDir:
        return RunDir(self.base / "runs" / name)

    def weights(self, run: str, stage: str) -> str:
        """sha256 of the newest checkpoint's weights."""
        folder = self.run_dir(run).stage(stage)
        return sha256_file(checkpoint_dir(folder, latest_step(folder)) / "model.safetensors")


@pytest.fixture
def lab(small_base: Path, tmp_path: Path) -> Lab:
    """A base directory of the test's own, with the small datasets in it."""
    base = tmp_path / "lab"
    shutil.copytree(small_base, base)
    return Lab(base)


@pytest.fixture(scope="session")
def reference(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """An uninterrupted run `r`, for all tests that compare with one. Tests must not change it."""
    base = tmp_path_factory.mktemp("reference") / "base"
    shutil.copytree(small_base, base)
    lab = Lab(base)
    lab.ok(*lab.speedrun("r"))
    return lab


@pytest.fixture(scope="session")
def make_lab() -> type[Lab]:
    return Lab


@pytest.fixture
def processes_of() -> Callable[[Path], list[int]]:
    """Live picollm processes that have a base directory on their command line."""
    import psutil

    def find(base: Path) -> list[int]:
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or [])
            if "picollm" in line and str(base) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.info["pid"])
        return found

    return find


@pytest.fixture
def kill_inside_a_save() -> Callable[[StageDir], None]:
    """kill -9 of a stage's worker while a checkpoint of it is half written."""
    import psutil

    def kill(stage: StageDir) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if not any(stage.checkpoints.glob("*.tmp")):
                time.sleep(0.001)
                continue
            # It goes on while we look. Stopped, it does not, and what is true then is true when it dies.
            worker = psutil.Process(int(stage.pid_path.read_text().split()[0]))
            worker.send_signal(signal.SIGSTOP)
            while worker.status() != psutil.STATUS_STOPPED:
                time.sleep(0.001)
            if any(stage.checkpoints.glob("*.tmp")):
                worker.kill()
                return
            worker.send_signal(signal.SIGCONT)
        pytest.fail("no save was caught")

    return kill


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Poll until a condition holds; the test fails after a minute, whatever the machine's speed."""

    def wait(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"waited in vain for {what}")
            time.sleep(0.02)

    return wait
