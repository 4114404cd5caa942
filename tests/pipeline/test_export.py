"""A trained demo in the real llama.cpp: the commands of `docs/export.md` as a user types them, and its answers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picollm.data import toy_world

pytestmark = pytest.mark.llamacpp
PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


def commands() -> list[list[str]]:
    """What the page tells a user to type, as words after `picollm`."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for line in "".join(blocks).splitlines() if line.strip()]
    assert all(line.startswith("picollm ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def test_the_page_from_make_demo_to_an_answer_in_llama_cpp(
    tmp_path_factory: pytest.TempPathFactory, make_lab: Any
) -> None:
    """After a demo of 26 steps, which has hardly begun to learn its format: what is told apart is the programs."""
    folder = tmp_path_factory.mktemp("page")
    lab = make_lab(folder / "base")
    short = ("--set", "train.steps=6", "--set", "sft.steps=20", "--skip", "eval")
    lab.ok("speedrun", "--preset", "demo", "--run", "demo", *short)
    answers = []
    for words in commands():
        done = subprocess.run(
            lab.command(*words), env=lab.env | {"PWD": str(folder)}, cwd=folder, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if words[0] == "chat":
            answers.append(done.stdout.strip())
    assert len(answers) == 2 and all(answers)
    reports = [json.loads(path.read_text()) for path in folder.glob("**/*export.json")]
    assert {report["format"] for report in reports} == {"gguf", "transformers"} and len(reports) == 3
    for report in reports:
        assert report["ok"] and all(row["passed"] for row in report["checks"]), report["checks"]
    assert "demo.Modelfile" in {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_the_whole_demo_answers_in_llama_cpp(tmp_path_factory: pytest.TempPathFactory, make_lab: Any) -> None:
    """Identity, letter counts and sums in the head of the train split, asked of the Q8_0 file."""
    lab = make_lab(tmp_path_factory.mktemp("whole") / "base")
    lab.ok("speedrun", "--preset", "demo", "--run", "demo", "--skip", "eval")
    kl = {}
    for quant, host in (("F32", "apertus"), ("F32", "qwen3"), ("F16", "apertus"), ("Q8_0", "apertus")):
        done = lab.ok("export", "gguf", "--run", "demo", "--quant", quant, "--arch", host, "--json")
        report = json.loads(done.stdout.splitlines()[-1])
        assert all(row["passed"] for row in report["checks"]), report["checks"]
        found = {row["name"]: row["value"] for row in report["checks"]}
        kl[quant, host] = found["KL, nats per token"]
        if quant == "F32":
            assert found["argmax agreement"] == 1.0 and found["log-probabilities, largest difference"] <= 1e-4
    assert kl["F16", "apertus"] <= 1e-3 and kl["Q8_0", "apertus"] <= 5e-3
    right = shares_right(Path(report["path"]))
    print(f"right answers in llama.cpp, Q8_0, train split: {right}; KL {kl}")
    assert right["identity"] >= 0.95 and right["count"] >= 0.7 and right["sum_in_head"] >= 0.6
    asked = ("chat", "--run", "demo", "--engine", "llamacpp", "-p")
    assert "I am picollm" in lab.ok(*asked, "Who are you?").stdout
    assert "The answer is 3." in lab.ok(*asked, "How many r are in strawberry?").stdout


def shares_right(path: Path, num_questions: int = 100) -> dict[str, float]:
    """Share of a task's trained questions that llama.cpp answers right with a file."""
    from picollm.export.llamacpp import Runtime
    from picollm.export.llamacpp_file import describe

    runtime = Runtime(path, context=describe(path).context, threads=1)
    ignore: Callable[[str], None] = lambda text: None  # noqa: E731
    shares = {}
    for task in ("identity", "count", "sum_in_head"):
        questions = toy_world.questions(task, False)[:: max(1, len(toy_world.questions(task, False)) // num_questions)]
        replies = [
            runtime.answer([{"role": "user", "content": q.prompt}], temperature=0, seed=0, on_text=ignore)["text"]
            for q in questions
        ]
        shares[task] = sum(map(toy_world.is_right, questions, replies)) / len(questions)
    return shares
