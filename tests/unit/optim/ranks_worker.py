"""The ranks of test_ranks.py: they train tiny models through a real process group and write down what they end with.

`python ranks_worker.py FOLDER LIMIT` runs those JOBS that need no more than LIMIT ranks one after another; processes
are forked so that torch loads once. They use the GPUs they see.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.train import distributed

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 128, "vocab_size": 70, "max_position_embeddings": 16, "rope_theta": 1e5,
}  # fmt: skip
ARCHS = {
    "portable": Architecture(arch="portable", **SHAPE),
    "full": Architecture(
        arch="full", sliding_window=4, window_pattern="SSSL", final_logit_softcapping=15.0, value_embeddings=True,
        x0_scalars=True, smear=True, backout=True, **SHAPE,
    ),
}  # fmt: skip
RATES = Rates(
    matrix_lr=0.02, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.005, value_embedding_lr=0.02, x0_lr=0.01,
    gate_lr=0.01, weight_decay=0.3,
)  # fmt: skip
SCHEDULE = Schedule(
    warmup_steps=2, warmdown_steps=20, final_lr_fraction=0.05, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=10,
)  # fmt: skip
STEPS = 50
SAVED = 20  # step of which every run writes its state, beside the last
# Number of ranks, first and last step, number of ranks whose state to start from (0: none).
JOBS = ((1, 0, STEPS, 0), (2, 0, STEPS, 0), (4, 0, STEPS, 0), (3, SAVED, 30, 4), (1, 30, STEPS, 3))
DEVICE = torch.device("cpu")
ROWS = 12  # of the global batch: divisible by 1 to 4 ranks; each rank takes them as two micro-batches


def build(arch: str, dtype: torch.dtype, wire: torch.dtype | None = None) -> tuple[GPT, MuonAdamW]:
    torch.set_num_threads(1)
    model = GPT(ARCHS[arch], compute_dtype=dtype).to(dtype)
    model.init_weights(0)
    model.to(DEVICE)
    ranks = distributed.ranks()
    return model, MuonAdamW(model, RATES, SCHEDULE, STEPS, dtype=dtype, wire_dtype=wire, ranks=ranks)


def total(tensor: Tensor) -> float:
    distributed.ranks().all_reduce(tensor).wait()
    return tensor.item()


def advance(model: GPT, optimizer: MuonAdamW, step: int) -> tuple[float, float]:
    """One step on this rank's rows; returns the mean loss and the gradient norm over all ranks."""
    ranks = distributed.ranks()
    ids = torch.randint(0, 70, (ROWS, 17), generator=torch.Generator().manual_seed(step % 4)).to(DEVICE)
    mine = ids.chunk(ranks.world)[ranks.rank].chunk(2) if ROWS // ranks.world > 1 else [ids]
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for number, rows in enumerate(mine):
        if number == len(mine) - 1:
            optimizer.last_micro_batch()
        part = model.loss(rows[:, :-1], rows[:, 1:], scale=1.0 / (ROWS * 16))
        part.backward()
        loss += part.detach()
    if ranks.world > 1:  # hooks have sent all but what completes last: nothing waits for the end of backward
        assert optimizer.launched >= len(optimizer.buckets) - 1
    norm = total(optimizer.grad_square()) ** 0.5
    optimizer.step(step, keep=torch.ones((), device=DEVICE))
    return total(loss), norm


def fingerprint(model: GPT) -> str:
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def own_state(optimizer: MuonAdamW) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, int]]]:
    return {f"{s.name}@{s.rows[0]}": (s.tensor.clone(), s.shape, s.rows) for s in optimizer.shards()}


def merge(files: list[Path], arch: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(whole state, weights) from what the ranks saved; each row must have been saved exactly once."""
    state: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for file in files:
        saved = torch.load(file, weights_only=True)[arch]
        weights = saved["weights"]
        for key, (tensor, shape, (start, end)) in saved["state"].items():
            name = key.rsplit("@", 1)[0]
            whole = state.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))
            whole[start:end] = tensor
            times.setdefault(name, torch.zeros(shape[0], dtype=torch.int64))[start:end] += 1
    assert all((count == 1).all() for count in times.values())
    return state, weights


def restore(model: GPT, optimizer: MuonAdamW, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Load weights and state saved by any number of ranks; what is then held is the same in every bit."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    optimizer.load(lambda name, start, end: state[name][start:end])
    for shard in optimizer.shards():
        assert torch.equal(shard.tensor, state[shard.name][slice(*shard.rows)])


def snapshot(model: GPT, optimizer: MuonAdamW) -> dict[str, object]:
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "state": own_state(optimizer),
    }


def odd_steps(model: GPT, optimizer: MuonAdamW) -> None:
    """What happens seldom: a skipped step, gradients thrown away, parameters that take no part, no announcement."""
    before, state = fingerprint(model), own_state(optimizer)
    for keep in (False, True):
        optimizer.last_micro_batch()
        poison = torch.nan if distributed.ranks().rank == 0 and not keep else 1.0
        (model.embed_tokens.square().sum() * poison).backward()
        assert torch.isfinite(torch.tensor(total(optimizer.grad_square()))) == keep
        if not keep:
            optimizer.step(STEPS - 1, keep=torch.zeros((), device=DEVICE))
        else:
            optimizer.zero_grad()
        assert fingerprint(model) == before
        assert all(torch.equal(t, state[key][0]) for key, (t, *_) in own_state(optimizer).items())
    rare = model.layers[1].mlp.up_proj.weight.square().sum() + model.resid_theta.sum()
    (rare / distributed.ranks().world).backward()
    optimizer.step(STEPS - 1, keep=torch.ones((), device=DEVICE))


def compiled_blocks() -> dict[str, Any]:
    """Two steps, plain and with compiled blocks, and how many reductions ran when the first layer's gradients came."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    found: dict[str, Any] = {}
    for name in ("plain", "compiled"):
        model, optimizer = build("portable", torch.float32)
        if name == "compiled":
            model.compile_blocks()
        first, launched = model.layers[0].mlp.up_proj.weight, []
        first.register_post_accumulate_grad_hook(lambda _, o=optimizer, seen=launched: seen.append(o.launched))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own while it traces
            losses = [advance(model, optimizer, step)[0] for step in range(2)]
        found[name] = {"losses": losses, "launched": launched}
    return found | {"fingerprint": fingerprint(model)}


def file_of(folder: Path, world: int, first: int, last: int, rank: int) -> Path:
    return folder / f"{world}-ranks-from-{first}-to-{last}-{rank}.pt"


def work(folder: Path, first: int, last: int, source: int) -> None:
    """One rank of one job."""
    ranks = distributed.ranks()
    middle: dict[str, Any] = {}
    end: dict[str, Any] = {}
    for arch in ARCHS if ranks.world <= 2 and not first else ("full",):
        model, optimizer = build(arch, torch.float64)
        if first:
            begun = 0 if first == SAVED else SAVED
            restore(model, optimizer, *merge([file_of(folder, source, begun, first, r) for r in range(source)], arch))
        losses = []
        for step in range(first, last):
            losses.append(advance(model, optimizer, step))
            if step + 1 == SAVED:
                middle[arch] = snapshot(model, optimizer)
        end[arch] = {**snapshot(model, optimizer), "losses": losses, "fingerprint": fingerprint(model)}
        if first == 0:
            odd_steps(model, optimizer)
            end[arch]["after"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    if first == 0:
        wires = {"float32": None} | ({"bfloat16": torch.bfloat16} if ranks.world == 2 else {})
        for name, wire in wires.items():
            model, optimizer = build("full", torch.float32, wire)
            loss = [advance(model, optimizer, step)[0] for step in range(STEPS)][-4:]
            end[name] = {"loss": sum(loss) / 4, "fingerprint": fingerprint(model)}
        if ranks.world == 2:
            end["compiled"] = compiled_blocks()
        torch.save(to_cpu(middle), file_of(folder, ranks.world, first, SAVED, ranks.rank))
    torch.save(to_cpu(end), file_of(folder, ranks.world, first, last, ranks.rank))


def to_cpu(value: Any) -> Any:
    """Tensors in nested dicts and lists, where the test can compare them."""
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value.cpu() if isinstance(value, Tensor) else value


def rank_main(rank: int, world: int, port: int, job: tuple[Path, int, int, int]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    global DEVICE
    DEVICE = distributed.start()
    work(*job)
    distributed.stop()
    os._exit(0)  # interpreter shutdown after gloo has been seen to abort although all results were right


def main() -> None:
    folder = Path(sys.argv[1])
    context = multiprocessing.get_context("fork")
    for world, first, last, source in JOBS:
        if max(world, source) > int(sys.argv[2]):
            continue
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = (folder, first, last, source)
        processes = [context.Process(target=rank_main, args=(rank, world, port, job)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * world, (world, first)


if __name__ == "__main__":
    main()
