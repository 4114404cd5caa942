"""Pretraining: text of one or more datasets -> a base model. `python -m picollm.stages.pretrain RUN/pretrain`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from picollm.data.datasets import Dataset
from picollm.data.token_source import Encoded, LiveTokens
from picollm.evaluate import bits_per_byte
from picollm.model.gpt import GPT
from picollm.stages.token_cache import token_sources
from picollm.stages.training import Inputs, read_inputs, run_training
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.worker import Worker, run


def live_tokens(dataset: Dataset, tokenizer: Tokenizer) -> LiveTokens:
    """A dataset's training text, tokenised as it is drawn."""
    documents = dataset.documents("train")

    def encode(indices: Sequence[int]) -> list[Encoded]:
        texts = [documents[i] for i in indices]
        return [Encoded(np.array(ids, dtype=np.int32)) for ids in tokenizer.encode_batch(texts)]

    return LiveTokens(encode, len(documents))


def validate(model: GPT, inputs: Inputs) -> dict[str, float]:
    """Bits per byte of the validation text: `val_bpb`, and of a mixture also `val_bpb/NAME` of each dataset.

    That of a mixture is the mean of its datasets', each weighted, and scored on as many tokens, as its share says; one
    without validation text has none.
    """
    recipe = inputs.recipe
    parts = [
        (dataset.name, dataset.documents("validation"), source.weight)
        for dataset, source in zip(inputs.datasets, recipe.data, strict=True)
    ]
    parts = [part for part in parts if len(part[1])] or parts[:1]
    total = sum(weight for _, _, weight in parts)
    values, mean = {}, 0.0
    for name, documents, weight in parts:
        share = weight / total
        found = bits_per_byte.evaluate(
            model,
            inputs.tokenizer,
            documents,
            recipe.model.max_position_embeddings,
            inputs.runtime.device_batch_size,
            max(1, round(inputs.runtime.eval_tokens * share)),
        )
        values[f"val_bpb/{name}"] = round(found.bpb, 6)
        mean += share * found.bpb
    return {"val_bpb": round(mean, 6)} | (values if len(recipe.data) > 1 else {})


def main(worker: Worker) -> None:
    inputs = read_inputs(worker)
    run_training(
        worker,
        inputs,
        sources=token_sources(worker, inputs, lambda dataset: live_tokens(dataset, inputs.tokenizer)),
        weights=[source.weight for source in inputs.recipe.data],
        evaluate=lambda model, step: validate(model, inputs),
    )


if __name__ == "__main__":
    run(main)
