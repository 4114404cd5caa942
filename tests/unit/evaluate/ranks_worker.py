"""The ranks of test_ranks.py: `python ranks_worker.py FOLDER` evaluates on one, two and three gloo ranks.

FOLDER holds `tokenizer.json`; each rank writes down there what it found. Processes are forked so that torch loads once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from picollm.config.model import Architecture
from picollm.data import toy_world
from picollm.data.conversations import Conversation
from picollm.errors import Interrupted
from picollm.evaluate import bits_per_byte
from picollm.model.gpt import GPT
from picollm.stages import sft, training
from picollm.stages.sft import validation_loss, validation_rows
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import distributed

T = 32
DOCUMENTS = [*toy_world.validation_documents(12, 3), "", "Grüße, 東京 🙂", "x"]
GONE = 7


def random_model(tokenizer: Tokenizer) -> GPT:
    arch = Architecture(
        arch="portable", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, intermediate_size=64, vocab_size=tokenizer.vocab_size, max_position_embeddings=T, rope_theta=1e4,
    )  # fmt: skip
    model = GPT(arch)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def figures(tokenizer: Tokenizer) -> dict[str, Any]:
    """Every kind of share: many passes, a window's last round not full, fewer passes than ranks."""
    model, ranks = random_model(tokenizer), distributed.ranks()
    found: dict[str, Any] = {}
    bits_per_byte.WINDOW_ROWS = 22
    for name, documents, rows in (("many", DOCUMENTS, 4), ("one", ["Hello, you."], 4), ("default", DOCUMENTS, None)):
        seen: list[int] = []
        cut = bits_per_byte.rows(tokenizer, documents, T)
        measured = bits_per_byte.score(model, tokenizer, cut, T, rows, on_progress=seen.append, ranks=ranks)
        found[name] = asdict(measured) | {"seen": seen}
    sft.rows_per_pass = lambda model, T: 4
    talks = [Conversation.from_json(talk) for talk in toy_world.conversations(60, 5)]
    for name, conversations in (("talks", talks), ("one talk", talks[:1]), ("none", [])):
        rows = validation_rows(conversations, tokenizer, T)
        shares: list[float] = []
        found[name] = {"loss": validation_loss(model, rows, ranks, shares.append), "rows": len(rows), "seen": shares}
    return found


def stopped(tokenizer: Tokenizer) -> dict[str, Any]:
    """The last rank is asked to stop when it looks for the third time; the others never are."""
    ranks, looks, phases = distributed.ranks(), [], []
    training.TELL_EVERY_S = 0.0

    def should_stop() -> bool:
        looks.append(None)
        return ranks.rank == ranks.world - 1 and len(looks) == 3

    worker: Any = SimpleNamespace(should_stop=should_stop, event=lambda kind, text: phases.append(text))
    cut = bits_per_byte.rows(tokenizer, DOCUMENTS, T)
    try:
        with training.evaluating(worker) as look:
            model = random_model(tokenizer)
            bits_per_byte.score(model, tokenizer, cut, T, 2, lambda done: look(done / len(DOCUMENTS)), ranks)
    except Interrupted as error:
        return {"error": str(error), "looks": len(looks), "phases": phases}
    return {"looks": len(looks)}


def failing(tokenizer: Tokenizer) -> dict[str, Any]:
    """Rank 1 dies in its second pass."""
    model, ranks = random_model(tokenizer), distributed.ranks()
    passes: list[None] = []
    nats = model.nats

    def dying(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        passes.append(None)
        if ranks.rank == 1 and len(passes) == 2:
            os._exit(GONE)
        return nats(ids, targets)

    model.nats = dying  # type: ignore[method-assign]
    cut = bits_per_byte.rows(tokenizer, DOCUMENTS, T)
    try:
        bits_per_byte.score(model, tokenizer, cut, T, 1, lambda done: None, ranks)
    except Exception as error:
        return {"error": str(error)}
    return {}


JOBS: tuple[tuple[Callable[[Tokenizer], dict[str, Any]], int, list[int]], ...] = (
    (figures, 1, [0]), (figures, 2, [0, 0]), (figures, 3, [0, 0, 0]), (stopped, 3, [0, 0, 0]),
    (failing, 2, [0, GONE]),
)  # fmt: skip


def rank_main(rank: int, world: int, port: int, folder: Path, job: Callable[[Tokenizer], dict[str, Any]]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.start()
    found = job(Tokenizer((folder / "tokenizer.json").read_bytes()))
    (folder / f"{job.__name__}-{world}-{rank}.json").write_text(json.dumps(found))
    os._exit(0)


def main() -> None:
    folder = Path(sys.argv[1])
    context = multiprocessing.get_context("fork")
    for job, world, codes in JOBS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=rank_main, args=(rank, world, port, folder, job)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        for process in ranks:
            process.kill()
        assert [process.exitcode for process in ranks] == codes, (job.__name__, world)


if __name__ == "__main__":
    main()
