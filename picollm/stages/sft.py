"""Supervised fine-tuning: conversations -> a chat model. `python -m picollm.stages.sft RUN/sft`."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from picollm.config.recipe import TrainRecipe
from picollm.data.conversations import Conversation
from picollm.data.datasets import Dataset
from picollm.data.mixture import Mixture
from picollm.data.packing import Batches, RowPacker
from picollm.data.token_source import Encoded, LiveTokens
from picollm.errors import ConfigError
from picollm.model.gpt import GPT
from picollm.stages.training import load_first_weights, read_inputs, run_training
from picollm.tokenizer.chat_format import has_target, render
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.worker import Worker, run

VALIDATION_ROWS = 256


def mix(datasets: list[Dataset], recipe: TrainRecipe, split: str) -> list[Conversation]:
    """Conversations of all sources by weight: the largest share is taken whole, the others are repeated or thinned."""
    parts = [dataset.conversations(split) for dataset in datasets]
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in recipe.data]
    # As many in all as keeps the source that has most for its weight complete.
    total = max(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    mixed: list[Conversation] = []
    for part, weight, source in zip(parts, weights, recipe.data, strict=True):
        if not part:
            continue
        wanted = max(1, round(total * weight))
        whole, rest = divmod(wanted, len(part))
        mixed += part * whole + random.Random(f"{recipe.seed}/{source.dataset}").sample(part, rest)
    # Source after source would stay together: of a large dataset only blocks of neighbours are permuted.
    random.Random(f"{recipe.seed}/mix").shuffle(mixed)
    return mixed


def learnable(conversations: list[Conversation], tokenizer: Tokenizer, length: int) -> tuple[list[Conversation], int]:
    """Those of which a row of `length` tokens holds a token that carries loss, and how many different ones are not."""
    found: dict[int, bool] = {}  # a mixture repeats conversations
    for conversation in conversations:
        if id(conversation) not in found:
            found[id(conversation)] = has_target(tokenizer, conversation, length)
    return [c for c in conversations if found[id(c)]], sum(not kept for kept in found.values())


def tokens_of(conversations: list[Conversation], tokenizer: Tokenizer, length: int) -> LiveTokens:
    """Conversations as tokens behind the bos with their loss mask, as many of each as a row holds."""

    def encode(indices: Sequence[int]) -> list[Encoded]:
        out = []
        for i in indices:
            ids, mask = render(tokenizer, conversations[i])
            out.append(Encoded(np.array(ids[1:], dtype=np.int32), np.array(mask[1:], dtype=bool)))
        return out

    return LiveTokens(encode, len(conversations), limit=length)


@torch.no_grad()
def validation_loss(
    model: GPT, conversations: list[Conversation], tokenizer: Tokenizer, length: int, batch: int
) -> float | None:
    """Nats per trained token over packed validation conversations; None when there are none to score."""
    if not conversations:
        return None
    try:
        packer = RowPacker(
            Mixture([tokens_of(conversations, tokenizer, length)], [1.0], seed=0), length=length, bos=tokenizer.bos,
            seed=0, buffer_size=min(64, len(conversations)), packing="whole",
        )  # fmt: skip
        batches = Batches(packer, rows_per_step=batch, device_batch_size=batch, rank=0, world=1)
        device = model.embed_tokens.device
        nats, count = 0.0, 0
        while packer.row < VALIDATION_ROWS and packer.epoch < 1.0 + packer.buffer_size / len(conversations):
            [(ids, targets)], found = batches.next_step()
            nats += float(model.nats(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device)).sum())
            count += found
    except ConfigError:
        return None
    return nats / count


def main(worker: Worker) -> None:
    inputs = read_inputs(worker)
    recipe, tokenizer = inputs.recipe, inputs.tokenizer
    length = recipe.model.max_position_embeddings
    parts: dict[str, list[Conversation]] = {}
    for split in ("train", "validation"):
        mixed = mix(inputs.datasets, recipe, split)
        parts[split], left_out = learnable(mixed, tokenizer, length)
        if left_out:
            worker.note(
                f"{split}: left out {left_out:,} of the conversations, because what comes before the first reply fills "
                f"the {length:,} tokens that the model reads",
                level="warning",
            )
        if mixed and not parts[split] and split == "train":
            raise ConfigError(
                "there is nothing to fine-tune on",
                cause=f"in every conversation the first reply comes after {length:,} tokens, more than the model reads",
                hint="use shorter conversations, or a new run with a larger `model.max_position_embeddings`",
            )
    train, validation = parts["train"], parts["validation"]

    def evaluate(model: GPT, step: int) -> dict[str, float]:
        loss = validation_loss(model, validation, tokenizer, length, inputs.runtime.device_batch_size)
        return {} if loss is None else {"val_loss": round(loss, 6)}

    assert recipe.init_from is not None
    run_training(
        worker,
        inputs,
        sources=[tokens_of(train, tokenizer, length)],
        weights=[1.0],
        evaluate=evaluate,
        initialise=lambda model: load_first_weights(model, worker, "pretrain", recipe.init_from),
    )


if __name__ == "__main__":
    run(main)
