"""Supervised fine-tuning: conversations -> a chat model. `python -m picollm.stages.sft RUN/sft`."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from picollm.config.recipe import TrainRecipe
from picollm.data.conversations import Conversation
from picollm.data.datasets import Dataset
from picollm.data.mixture import Mixture
from picollm.data.packing import IGNORED, RowPacker
from picollm.data.token_source import Encoded, LiveTokens
from picollm.errors import ConfigError
from picollm.evaluate.nats import Ranks, Row, nats_of_rows, rows_per_pass
from picollm.model.gpt import GPT
from picollm.stages.training import Inputs, evaluating, load_first_weights, read_inputs, run_training
from picollm.tokenizer.chat_format import has_target, render
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import distributed
from picollm.worker import Worker, run

VALIDATION_ROWS = 256


def validation_mix(datasets: list[Dataset], recipe: TrainRecipe) -> list[Conversation]:
    """Held-back conversations of all sources by weight: the largest share is whole, the others repeated or thinned."""
    parts = [dataset.conversations("validation") for dataset in datasets]
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
    # Rows of the first 256 are scored; source after source would leave some out.
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


def train_sources(worker: Worker, inputs: Inputs) -> list[LiveTokens]:
    """The conversations of each dataset that hold something to learn, as tokens.

    Raises:
        ConfigError: a dataset has none.
    """
    length = inputs.recipe.model.max_position_embeddings
    sources = []
    for dataset in inputs.datasets:
        conversations = dataset.conversations("train")
        kept, left_out = learnable(conversations, inputs.tokenizer, length)
        _say_left_out(worker, "train", left_out, length, of=f" of `{dataset.name}`")
        if not kept:
            raise ConfigError(
                f"there is nothing to fine-tune on in `{dataset.name}`",
                cause=f"in every conversation the first reply comes after {length:,} tokens, more than the model reads"
                if conversations
                else "all of its conversations are validation",
                hint="use more or shorter conversations, or a new run with a larger `model.max_position_embeddings`",
            )
        sources.append(tokens_of(kept, inputs.tokenizer, length))
    return sources


def _say_left_out(worker: Worker, split: str, count: int, length: int, of: str = "") -> None:
    if count:
        worker.note(
            f"{split}: left out {count:,} of the conversations{of}, because what comes before the first reply fills "
            f"the {length:,} tokens that the model reads",
            level="warning",
        )


def validation_rows(conversations: list[Conversation], tokenizer: Tokenizer, length: int) -> list[Row]:
    """Conversations, each once, packed into VALIDATION_ROWS rows at most: inputs and targets, (length,) each.

    There are none where no conversation holds a token to score.
    """
    if not conversations:
        return []
    packer = RowPacker(
        Mixture([tokens_of(conversations, tokenizer, length)], [1.0], seed=0), length=length, bos=tokenizer.bos,
        seed=0, buffer_size=64, packing="whole",
    )  # fmt: skip
    packer.DRAW = 1  # never more in all than there are: of a second epoch the long ones would crowd out short ones
    ids, mask = np.empty(length + 1, dtype=np.int32), np.empty(length + 1, dtype=bool)
    rows: list[Row] = []
    placed = 0
    with contextlib.suppress(ConfigError):  # nothing to learn from
        while len(rows) < VALIDATION_ROWS and placed < len(conversations):
            packer.buffer_size = min(packer.buffer_size, len(conversations) - placed)
            plan = packer.plan_row()
            packer.gather(plan, ids, mask)
            packer.forget()
            placed += len(plan)
            rows.append((ids[:-1].copy(), np.where(mask[1:], ids[1:], IGNORED)))
    return rows


def validation_loss(
    model: GPT,
    rows: list[Row],
    ranks: Ranks | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> float | None:
    """Nats per trained token over `validation_rows`, the same on every rank; None when there are none to score.

    Args:
        on_progress: as in `nats_of_rows`, with the share done.
    """
    if not rows:
        return None
    per_pass = rows_per_pass(model, len(rows[0][0]))
    nats = nats_of_rows(model, rows, per_pass, ranks, lambda done: on_progress(done / len(rows)))
    return math.fsum(nats) / sum(int((targets != IGNORED).sum()) for _, targets in rows)


def main(worker: Worker) -> None:
    inputs = read_inputs(worker)
    recipe, tokenizer = inputs.recipe, inputs.tokenizer
    length = recipe.model.max_position_embeddings
    sources = train_sources(worker, inputs)
    validation, left_out = learnable(validation_mix(inputs.datasets, recipe), tokenizer, length)
    _say_left_out(worker, "validation", left_out, length)

    rows = cache(lambda: validation_rows(validation, tokenizer, length))  # packed once, as each time would be alike

    def evaluate(model: GPT, step: int) -> dict[str, float]:
        with evaluating(worker) as look:
            loss = validation_loss(model, rows(), distributed.ranks(), look)
        return {} if loss is None else {"val_loss": round(loss, 6)}

    assert recipe.init_from is not None
    run_training(
        worker,
        inputs,
        sources=sources,
        weights=[source.weight for source in recipe.data],
        evaluate=evaluate,
        initialise=lambda model: load_first_weights(model, worker, "pretrain", recipe.init_from),
    )


if __name__ == "__main__":
    run(main)
