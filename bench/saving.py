"""What saving costs: seconds a training waits for a checkpoint, and their share of a run at the default cadence.

    OMP_NUM_THREADS=1 python bench/saving.py --preset cpu-small [--set train.steps=2000] [--folder DIR]

Steps of the preset's first stage on random tokens, on a GPU where there is one; saves in DIR (a temporary folder unless
given) take turns, synchronous and asynchronous. `waits_s` is wall-clock time of the main thread in `save`; `cpu_s` is
CPU time of the whole process that a save adds, its thread included. Medians. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from picollm.config.recipe import Source
from picollm.config.resolve import resolve
from picollm.hardware import detect
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.recipes import pretrain_recipe
from picollm.run_dir import StageDir
from picollm.runtimes import checkpoint_cadence
from picollm.train.checkpoint import Saver
from picollm.worker import keep_freed_memory


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(wall-clock, CPU) seconds; a GPU's queue is empty before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu-small")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="rows of a micro-batch")
    args = parser.parse_args()
    keep_freed_memory()
    config = resolve(preset=args.preset, config_path=None, sets=tuple(args.sets)).config
    recipe = pretrain_recipe(
        config,
        detect(),
        tokenizer_vocab=config.tokenizer.vocab_size,
        tokenizer_sha256="0" * 64,
        data=[Source(dataset="none", sha256="0" * 64)],
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT(recipe.model, compute_dtype=getattr(torch, recipe.dtype))
    model.init_weights(recipe.seed)
    model.to(device)
    optimizer = MuonAdamW(model, recipe.rates, recipe.schedule, recipe.steps, dtype=getattr(torch, recipe.dtype))
    keep = torch.ones((), device=device)
    length = recipe.model.max_position_embeddings
    micro_batches = max(1, recipe.batch_tokens // (args.rows * length))

    def step() -> None:
        for _ in range(micro_batches):
            ids = torch.randint(0, recipe.model.vocab_size, (args.rows, length + 1), device=device)
            model.loss(ids[:, :-1], ids[:, 1:], scale=1 / recipe.batch_tokens).backward()
        optimizer.step(0, keep=keep)

    step()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        modes = {"synchronous": False, "asynchronous": True}
        savers = {
            name: Saver(StageDir(Path(folder) / "run" / name), 0, 1, keep_last=2, asynchronous=asynchronous)
            for name, asynchronous in modes.items()
        }
        waits: dict[str, list[float]] = {name: [] for name in modes}
        adds: dict[str, list[float]] = {name: [] for name in modes}
        commits: dict[str, list[float]] = {name: [] for name in modes}
        plain: list[tuple[float, float]] = []
        size, number = 0, 0
        for turn in range(args.rounds + 1):  # the first one makes folders and buffers
            plain.append(timed(step))
            for name, saver in savers.items():
                number += 1
                wait = [0.0]

                def save_and_step(saver: Saver = saver, number: int = number, wait: list[float] = wait) -> None:
                    wait[0] = timed(lambda: saver.save(number, model, optimizer, {}))[0]
                    step()
                    saver.wait()

                _, cpu = timed(save_and_step)
                [saved] = saver.finished()
                size = saved.bytes
                if turn:
                    waits[name].append(wait[0])
                    adds[name].append(cpu)
                    commits[name].append(saved.dt_s)
    step_s, step_cpu_s = (statistics.median(values) for values in zip(*plain[1:], strict=True))
    every = checkpoint_cadence(recipe.steps)
    saves = recipe.steps // every
    result = {
        "preset": args.preset, "torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads(),
        "checkpoint_bytes": size, "steps": recipe.steps, "save_every_steps": every, "step_s": round(step_s, 4),
        "step_cpu_s": round(step_cpu_s, 4),
    }  # fmt: skip
    for name in modes:
        wait_s, cpu_s = statistics.median(waits[name]), statistics.median(adds[name]) - step_cpu_s
        result[name] = {
            "waits_s": round(wait_s, 4),
            "until_committed_s": round(statistics.median(commits[name]), 4),
            "cpu_s": round(cpu_s, 4),
            "waits_share_of_run": round(saves * wait_s / (recipe.steps * step_s), 5),
            "cpu_share_of_run": round(saves * cpu_s / (recipe.steps * step_cpu_s), 5),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
