"""Time and memory of `picollm export gguf`: `python bench/export.py [--shape d12] [--quant Q8_0]` prints JSON.

A run with random weights is made in a temporary folder and exported by the library's own function in a process of its
own, first without llama.cpp, then with it where it is installed. Memory is sampled every 10 ms: `peak_rss_mib` counts
pages of mapped files too, which the system can drop at any time; `peak_anonymous_mib` does not. llama.cpp answers in a
process of its own: `peak_rss_with_children_mib` is that of both at one time, with what they share counted twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SHAPES = {
    "demo": {"hidden_size": 128, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 1024, "T": 128},
    "d12": {"hidden_size": 768, "num_hidden_layers": 12, "head_dim": 128, "vocab_size": 32768, "T": 2048},
}
RUN = "bench"


def make_run(base: Path, shape: str) -> None:
    """A run whose stage `sft` has a checkpoint of random weights, as a training would have left it."""
    import torch

    from picollm.config.model import Architecture
    from picollm.files import SCHEMA, write_json
    from picollm.model.gpt import GPT
    from picollm.run_dir import RunDir
    from picollm.tokenizer.train import train
    from picollm.train import checkpoint_files as files
    from picollm.train.checkpoint_tensors import WEIGHTS, write_tensors

    s = SHAPES[shape]
    run = RunDir(base / "runs" / RUN)
    tokenizer = train(words(), s["vocab_size"])
    run.stage("tokenizer").write_record({}, tokenizer.save(run.tokenizer), {})
    heads = s["hidden_size"] // s["head_dim"]
    arch = Architecture(
        arch="portable", hidden_size=s["hidden_size"], num_hidden_layers=s["num_hidden_layers"],
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=s["head_dim"],
        intermediate_size=4 * s["hidden_size"], vocab_size=tokenizer.vocab_size, max_position_embeddings=s["T"],
        rope_theta=100_000.0,
    )  # fmt: skip
    model = GPT(arch)
    model.init_weights(0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head")):
                parameter.normal_(0, 0.02)
    write_json(run.config_path, {"schema": SCHEMA, "preset": shape, "sources": {}, "config": {}})
    stage = run.stage("sft")
    recipe = {"model": arch.model_dump(mode="json"), "batch_tokens": 1024, "data": []}
    write_json(stage.config_path, {"schema": SCHEMA, "stage": "sft", "recipe": recipe, "runtime": {}})
    temporary = files.begin(stage, 1)
    write_tensors(temporary / WEIGHTS, {name: p.detach() for name, p in model.named_parameters()})
    meta = {"schema": SCHEMA, "step": 1, "model": recipe["model"], "tokenizer_sha256": tokenizer.sha256}
    files.write_meta(temporary, meta)
    files.commit(stage, 1, temporary, keep_last=1)
    stage.write_record({}, [], {"step": 1})


def words() -> Iterator[str]:
    """Text with enough different words for any of the vocabularies."""
    rng = random.Random(0)
    pool = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(20_000)]
    for _ in range(3):
        yield " ".join(pool)


def export(base: Path, quant: str, host: str, *, runtime: bool) -> dict[str, object]:
    """One export in this process; called in a fresh one."""
    os.environ["PICOLLM_BASE_DIR"] = str(base)
    # Only the largest are kept: objects of every sample would lie between those of the export and keep their memory.
    peaks = {"rss": 0, "with children": 0, "anonymous": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for name, size in memory().items():
                peaks[name] = max(peaks[name], size)

    threading.Thread(target=watch, daemon=True).start()
    started, cpu = time.perf_counter(), time.process_time()
    from picollm.export import llamacpp_checks
    from picollm.export.gguf_export import GGUFRequest, default_path, export_gguf
    from picollm.export.gguf_types import find_quant
    from picollm.run_dir import find_run

    if not runtime:
        llamacpp_checks.version = lambda: None
    stage, found = find_run(RUN).stage("sft"), find_quant(quant)
    phases: dict[str, float] = {}

    def on_progress(phase: str, _done: int, _total: int) -> None:
        phases.setdefault(phase, time.perf_counter() - started)

    request = GGUFRequest(stage, found, host, default_path(stage, found, host), force=True)
    report = export_gguf(request, on_progress=on_progress)
    seconds = time.perf_counter() - started
    done.set()
    return {
        "runtime": runtime,
        "wall_s": round(seconds, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "children_cpu_s": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
        "phases_start_s": {phase: round(at, 1) for phase, at in phases.items()},
        "file_mib": round(report["bytes"] / 2**20, 1),
        "peak_rss_mib": peaks["rss"] // 1024,
        "peak_rss_with_children_mib": peaks["with children"] // 1024,
        "peak_anonymous_mib": peaks["anonymous"] // 1024,
        "checks": {row["name"]: row["value"] for row in report["checks"]},
    }


def memory() -> dict[str, int]:
    """Resident memory of this process, with that of its children, and the part that no file backs, in KiB."""
    found = status("self")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    theirs = sum(status(pid).get("VmRSS", 0) for pid in children)
    return {"rss": found["VmRSS"], "with children": found["VmRSS"] + theirs, "anonymous": found["RssAnon"]}


def status(pid: str) -> dict[str, int]:
    """The sizes that the system tells of a process, in KiB; none where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    parts = (line.partition(":") for line in lines)
    return {name: int(rest.split()[0]) for name, _, rest in parts if rest.endswith(" kB")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="d12")
    parser.add_argument("--quant", default="Q8_0")
    parser.add_argument("--arch", default="apertus")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("BASE", "RUNTIME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        base, runtime = arguments.child
        print(json.dumps(export(Path(base), arguments.quant, arguments.arch, runtime=runtime == "yes")))
        return
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), arguments.shape)
        again = [sys.executable, __file__, "--quant", arguments.quant, "--arch", arguments.arch, "--child", folder]
        rows = [
            json.loads(subprocess.run([*again, runtime], env=environment, check=True, stdout=subprocess.PIPE).stdout)
            for runtime in ("no", "yes")
        ]
    told = {"bench": "export", "shape": arguments.shape, "quant": arguments.quant, "arch": arguments.arch}
    print(json.dumps({**told, "threads": arguments.threads, "exports": rows}))


if __name__ == "__main__":
    main()
