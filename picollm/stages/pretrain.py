"""Pretraining: text of a dataset -> a base model. `python -m picollm.stages.pretrain RUN/pretrain`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from picollm.data.packing import Encoded
from picollm.evaluate import bits_per_byte
from picollm.model.gpt import GPT
from picollm.stages.training import read_inputs, run_training
from picollm.worker import Worker, run


def main(worker: Worker) -> None:
    inputs = read_inputs(worker)
    recipe, tokenizer, dataset = inputs.recipe, inputs.tokenizer, inputs.datasets[0]
    documents = dataset.documents("train")

    def encode(indices: Sequence[int]) -> list[Encoded]:
        texts = [documents[i] for i in indices]
        return [Encoded(np.array(ids, dtype=np.int32)) for ids in tokenizer.encode_batch(texts)]

    def evaluate(model: GPT, step: int) -> dict[str, float]:
        found = bits_per_byte.evaluate(
            model,
            tokenizer,
            dataset.documents("validation"),
            recipe.model.max_position_embeddings,
            inputs.runtime.device_batch_size,
            inputs.runtime.eval_tokens,
        )
        return {"val_bpb": round(found.bpb, 6)}

    run_training(worker, inputs, encode=encode, num_documents=len(documents), cut=True, evaluate=evaluate)


if __name__ == "__main__":
    run(main)
