"""Training speed of `picollm pretrain` beside a nanochat checkout, at one shape, on one thread, in one run.

    python bench/pretrain_vs_peer.py --peer CHECKOUT --peer-python PYTHON --peer-base DIR --dataset NAME

Each side is run as a whole process with few and with more steps; the CPU seconds (user and system, children included)
of the difference are the cost of the extra steps, so that start-up, tokenisation and saving cancel out. Sides take
turns, and what is compared is the ratio of medians: the machine may be noisy.

With `--compiled` both sides compile; then `--steps 10 70` makes what is compared long beside the compilers' noise.

CHECKOUT is a nanochat checkout, PYTHON an interpreter with its requirements, DIR a NANOCHAT_BASE_DIR with a trained
tokenizer of the same vocabulary and the same documents; NAME a dataset of picollm. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROWS, T, DEPTH = 8, 512, 4
TOKENS = ROWS * T


def cpu_seconds(command: list[str], env: dict[str, str], cwd: Path | None) -> float:
    """CPU seconds of a command and its children; its output is shown when it fails."""
    process = subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def ours(steps: int, dtype: str, compiled: bool, dataset: str, base: Path) -> float:
    run = f"bench-{dtype}-{steps}"
    env = os.environ | {"PICOLLM_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    sets = [f"data.dataset={dataset}", f"train.steps={steps}", f"train.dtype={dtype}", f"train.eval_tokens={T}"]
    sets.append(f"train.compile={str(compiled).lower()}")
    flags = [flag for value in sets for flag in ("--set", value)]
    shutil.rmtree(base / "runs" / run, ignore_errors=True)
    picollm = [sys.executable, "-m", "picollm_cli"]
    cpu_seconds([*picollm, "tokenizer", "train", "--preset", "cpu-small", "--run", run, *flags], env, None)
    return cpu_seconds([*picollm, "pretrain", "--run", run], env, None)


def peer(steps: int, dtype: str, compiled: bool, checkout: Path, python: str, base: Path) -> float:
    env = os.environ | {
        "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": dtype, "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "0" if compiled else "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
    }  # fmt: skip
    flags = {
        "depth": DEPTH, "head-dim": 64, "window-pattern": "L", "max-seq-len": T, "device-batch-size": ROWS,
        "total-batch-size": TOKENS, "core-metric-every": -1, "sample-every": -1, "eval-every": -1, "run": "dummy",
        "num-iterations": steps, "model-tag": "bench",
    }  # fmt: skip
    return cpu_seconds([python, "-m", "scripts.base_train", *(f"--{k}={v}" for k, v in flags.items())], env, checkout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--peer-base", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--steps", nargs=2, type=int, default=[4, 20])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    few, more = args.steps
    base = Path(os.environ.get("PICOLLM_BASE_DIR") or tempfile.mkdtemp())
    result: dict[str, object] = {
        "shape": {"depth": DEPTH, "T": T, "tokens_per_step": TOKENS},
        "cpu": platform.processor(),
        "compiled": args.compiled,
    }
    for dtype in args.dtypes:
        rates: dict[str, list[float]] = {"picollm": [], "peer": []}
        if args.compiled:  # fills the compilers' caches, which would make the first run dearer than the second
            ours(few, dtype, True, args.dataset, base)
            peer(few, dtype, True, args.peer.absolute(), args.peer_python, args.peer_base)
        for _ in range(args.rounds):
            for side in rates:
                if side == "picollm":
                    costs = [ours(n, dtype, args.compiled, args.dataset, base) for n in (few, more)]
                else:
                    costs = [
                        peer(n, dtype, args.compiled, args.peer.absolute(), args.peer_python, args.peer_base)
                        for n in (few, more)
                    ]
                rates[side].append(TOKENS * (more - few) / (costs[1] - costs[0]))
                print(f"{dtype} {side}: {rates[side][-1]:,.0f} tokens per CPU-second", file=sys.stderr, flush=True)
        medians = {side: statistics.median(values) for side, values in rates.items()}
        result[dtype] = {
            "tokens_per_cpu_s": {side: [round(v) for v in values] for side, values in rates.items()},
            "ratio_of_medians": round(medians["picollm"] / medians["peer"], 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
