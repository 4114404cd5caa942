"""Estimated peak memory beside the resident memory of real training, for shapes of both architectures, on this CPU.

    python bench/memory.py [--dataset NAME] [--vocab 8192] [--depths 2 4 6] [--row 512] [--dtypes bfloat16 float32]

Each shape is pretrained for three steps by the stage's own worker in a fresh process (PICOLLM_BASE_DIR holds runs and
datasets). What is compared is growth: the process's largest resident size, and the estimate of it, both less the size
of a process that has loaded the same modules and stops there. Prints one JSON object; the exit code is 1 when an
estimate is further from the measurement than --within.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from picollm.files import read_json
from picollm.hardware import detect
from picollm.plan import make_plan
from picollm_cli.console import Output
from picollm_cli.prepare import open_run
from picollm_cli.prepare_stage import prepare_pretrain

MIB = 2**20
STEPS = 3
# What every worker has loaded before it builds a model, with a first product done.
LOADED = "import torch, picollm.stages.pretrain; (torch.ones(256, 256) @ torch.ones(256, 256)).sum()"


def largest_resident(arguments: list[str], env: dict[str, str]) -> int:
    """Bytes that a Python process held at most; its output is shown when it fails."""
    process = subprocess.Popen(
        [sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{output[-3000:]}")
    return usage.ru_maxrss * 1024


def measure(arch: str, depth: int, dtype: str, args: argparse.Namespace, env: dict[str, str]) -> dict[str, object]:
    name = f"bench-memory-{arch}-d{depth}-{dtype}"
    sets = [
        f"data.dataset={args.dataset}", f"tokenizer.vocab_size={args.vocab}", f"model.arch={arch}",
        f"model.depth={depth}", f"model.max_position_embeddings={args.row}", f"train.dtype={dtype}",
        f"train.steps={STEPS}", f"train.batch_tokens={args.batch}", f"train.eval_tokens={args.row}",
        *(args.set or []),
    ]  # fmt: skip
    given = [word for value in sets for word in ("--set", value)]
    picollm = ["-m", "picollm_cli"]
    largest_resident([*picollm, "tokenizer", "train", "--run", name, *given], env)
    with open_run(Output(True), run=name, preset=None, config=None, force=["pretrain"]) as prepared:
        stage = prepare_pretrain(prepared)
        # The vocabulary that was trained may be smaller than the one asked for.
        vocab = read_json(stage.config_path)["recipe"]["model"]["vocab_size"]
        config = prepared.config
    tokenizer = config.tokenizer.model_copy(update={"vocab_size": vocab})
    plan = make_plan(config.model_copy(update={"tokenizer": tokenizer}), detect())
    memory, batch = plan.fit.memory, plan.fit
    before = largest_resident(["-c", LOADED], env)
    grown = largest_resident(["-m", "picollm.stages.pretrain", str(stage.path)], env) - before
    estimate = memory.total - before
    return {
        "arch": arch,
        "depth": depth,
        "dtype": dtype,
        "vocab_size": vocab,
        "attention": plan.attention,
        "rows": batch.rows,
        "passes": batch.passes,
        "loaded_mib": round(before / MIB),
        "estimate_mib": round(estimate / MIB),
        "measured_mib": round(grown / MIB),
        "error": round(estimate / grown - 1, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="toy-world")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4, 6])
    parser.add_argument("--archs", nargs="+", default=["portable", "full"])
    parser.add_argument("--row", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--within", type=float, default=0.2)
    parser.add_argument("--set", action="append", help="another config value, as section.key=value")
    args = parser.parse_args()
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    rows = []
    for arch in args.archs:
        for dtype in args.dtypes:
            for depth in args.depths:
                rows.append(measure(arch, depth, dtype, args, env))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    worst = max(abs(float(str(row["error"]))) for row in rows)
    print(json.dumps({"steps": STEPS, "row": args.row, "batch_tokens": args.batch, "worst": worst, "shapes": rows}))
    sys.exit(worst > args.within)


if __name__ == "__main__":
    main()
