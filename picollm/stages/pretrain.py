"""Pretraining: text of one or more datasets -> a base model. `python -m picollm.stages.pretrain RUN/pretrain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from picollm.data.datasets import Dataset
from picollm.data.token_source import Encoded, LiveTokens
from picollm.evaluate import bits_per_byte
from picollm.evaluate.nats import Ranks
from picollm.model.gpt import GPT
from picollm.stages.token_cache import token_sources
from picollm.stages.training import Inputs, evaluating, read_inputs, run_training
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import distributed
from picollm.worker import Worker, run


def live_tokens(dataset: Dataset, tokenizer: Tokenizer) -> LiveTokens:
    """A dataset's training text, tokenised as it is drawn."""
    documents = dataset.documents("train")

    def encode(indices: Sequence[int]) -> list[Encoded]:
        texts = [documents[i] for i in indices]
        return [Encoded(np.array(ids, dtype=np.int32)) for ids in tokenizer.encode_batch(texts)]

    return LiveTokens(encode, len(documents))


@dataclass(frozen=True)
class HeldOut:
    """Validation text of a dataset, as rows for `bits_per_byte.score`; `share` of 1 in the mixture's mean."""

    name: str
    share: float
    rows: list[tuple[int, np.ndarray]]


def held_out(inputs: Inputs) -> list[HeldOut]:
    """The first `eval_tokens` tokens of the datasets' validation text, of a mixture by weight.

    A dataset without such text is left out, unless all are.
    """
    recipe = inputs.recipe
    parts = [
        (dataset.name, dataset.documents("validation"), source.weight)
        for dataset, source in zip(inputs.datasets, recipe.data, strict=True)
    ]
    parts = [part for part in parts if len(part[1])] or parts[:1]
    total = sum(weight for _, _, weight in parts)
    found = []
    for name, documents, weight in parts:
        most = max(1, round(inputs.runtime.eval_tokens * weight / total))
        rows = bits_per_byte.rows(inputs.tokenizer, documents, recipe.model.max_position_embeddings, most)
        found.append(HeldOut(name, weight / total, list(rows)))
    return found


def validate(
    model: GPT,
    inputs: Inputs,
    parts: list[HeldOut],
    ranks: Ranks | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Bits per byte of the validation text: `val_bpb`, and of a mixture also `val_bpb/NAME` of each dataset.

    That of a mixture is the mean of its datasets', each weighted, and scored on as many tokens, as its share says; one
    without validation text has none. Every rank gets the same figures; `on_progress` as in `nats_of_rows`, with the
    share done.

    Raises:
        ConfigError: there is no validation text.
    """
    values, mean, before = {}, 0.0, 0.0
    for part in parts:
        found = bits_per_byte.score(
            model,
            inputs.tokenizer,
            part.rows,
            inputs.recipe.model.max_position_embeddings,
            on_progress=partial(_tell, on_progress, before, part),
            ranks=ranks,
        )
        values[f"val_bpb/{part.name}"] = round(found.bpb, 6)
        mean += part.share * found.bpb
        before += part.share
    return {"val_bpb": round(mean, 6)} | (values if len(inputs.recipe.data) > 1 else {})


def _tell(on_progress: Callable[[float], None], before: float, part: HeldOut, documents: int) -> None:
    """Documents of a part scored -> the share of all that is done."""
    on_progress(before + part.share * documents / (part.rows[-1][0] + 1))


def main(worker: Worker) -> None:
    inputs = read_inputs(worker)
    parts = cache(lambda: held_out(inputs))  # tokenised once: a GPU is through sooner than the tokenizer

    def evaluate(model: GPT, step: int) -> dict[str, float]:
        with evaluating(worker) as look:
            return validate(model, inputs, parts(), distributed.ranks(), look)

    run_training(
        worker,
        inputs,
        sources=token_sources(worker, inputs, lambda dataset: live_tokens(dataset, inputs.tokenizer)),
        weights=[source.weight for source in inputs.recipe.data],
        evaluate=evaluate,
    )


if __name__ == "__main__":
    run(main)
