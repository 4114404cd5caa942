"""Attention kept inside documents: what a document gives in a row is what it gives alone."""

from __future__ import annotations

import pytest
import torch

from picollm.attention_choice import AttentionDevice, choose_attention
from picollm.config.model import Architecture
from picollm.errors import ConfigError
from picollm.model.gpt import GPT

T = 24
FULL = {
    "sliding_window": 5, "window_pattern": "SL", "final_logit_softcapping": 3.0, "value_embeddings": True,
    "x0_scalars": True, "smear": True, "backout": True,
}  # fmt: skip
HOPPER = AttentionDevice("cuda", (9, 0), 91501, installed=frozenset({"flash", "varlen", "flex"}))


def make(features: dict[str, object], backend: str) -> GPT:
    values = {
        "arch": "portable", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "vocab_size": 50,
        "max_position_embeddings": T, "rope_theta": 10_000.0,
    }  # fmt: skip
    model = GPT(Architecture.model_validate(values | features), compute_dtype=torch.float64, backend=backend).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.3, generator=generator))
    return model


@pytest.mark.parametrize("backend", ["matmul", "sdpa"])
@pytest.mark.parametrize("features", [{}, FULL], ids=["portable", "full"])
def test_a_document_gives_in_a_row_what_it_gives_alone(features: dict[str, object], backend: str) -> None:
    model = make(features, backend)
    ids = torch.randint(0, 50, (2, T), generator=torch.Generator().manual_seed(2))
    pieces = [(0, 0, 9), (0, 9, 15), (1, 0, 1), (1, 1, 23)]  # row, start, tokens
    bounds = torch.tensor([row * T + start for row, start, _ in pieces] + [2 * T], dtype=torch.int32)
    together = model.hidden(ids, bounds=bounds)
    for row, start, size in pieces:
        alone = model.hidden(ids[row : row + 1, start : start + size])
        torch.testing.assert_close(together[row, start : start + size], alone[0], atol=1e-11, rtol=1e-9)
    assert (model.hidden(ids)[0, 9:] - together[0, 9:]).abs().max() > 1e-3, "without bounds they do see each other"


def test_bounds_of_whole_rows_change_nothing() -> None:
    model = make(FULL, "sdpa")
    ids = torch.randint(0, 50, (2, T), generator=torch.Generator().manual_seed(3))
    whole = model.loss(ids, ids, bounds=torch.tensor([0, T, 2 * T], dtype=torch.int32))
    torch.testing.assert_close(whole, model.loss(ids, ids), atol=1e-10, rtol=1e-10)


def test_documents_choose_a_kernel_that_can() -> None:
    choice = choose_attention(HOPPER, "bfloat16", 2048, windows=True, documents=True)
    assert (choice.full, choice.window) == ("varlen", "varlen") and "data.packing=documents" in choice.reason
    assert choose_attention(HOPPER, "float32", 2048, documents=True).full == "sdpa"
    assert choose_attention(AttentionDevice("cpu"), "float32", 128, documents=True).full == "matmul"
    for backend in ("cudnn", "flash", "flex"):
        with pytest.raises(ConfigError, match=f"model.attention={backend}") as caught:
            choose_attention(HOPPER, "bfloat16", 2048, requested=backend, documents=True)
        assert "data.packing=documents" in str(caught.value.cause) and "varlen" in str(caught.value.hint)
