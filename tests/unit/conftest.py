"""A tokenizer and a model small enough to be made for every session."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest
import torch

from picollm.config.model import Architecture
from picollm.data import toy_world
from picollm.model.gpt import GPT
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.tokenizer.train import train


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """512 tokens, trained on a little of the toy world."""
    texts = (message["content"] for c in toy_world.conversations(200, 0) for message in c["messages"])
    return train(chain(toy_world.documents(50, 0), (text for text in texts if isinstance(text, str))), vocab_size=512)


@pytest.fixture(scope="session")
def random_model(tokenizer: Tokenizer) -> Callable[..., GPT]:
    """Makes a float32 model whose weights are all random, so that its replies vary; grouped queries, two layers."""

    def make(T: int = 64, seed: int = 0) -> GPT:
        arch = Architecture(
            arch="portable", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=64, vocab_size=tokenizer.vocab_size, max_position_embeddings=T,
            rope_theta=10_000.0,
        )  # fmt: skip
        model = GPT(arch)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        return model.eval().requires_grad_(False)

    return make
