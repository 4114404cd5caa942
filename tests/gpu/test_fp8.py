"""fp8 where it is meant to run: the layouts that cuBLASLt takes, a compiled model, and no wait for the host."""

from __future__ import annotations

import pytest
import torch

from picollm.config.model import Architecture
from picollm.model.functional import rms_norm
from picollm.model.gpt import GPT
from picollm.model.linear import Linear
from picollm.model.precision import refresh_fp8, use_fp8

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_fp8() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9 or newer")


def test_products_are_as_exact_as_eight_bits_are() -> None:
    torch.manual_seed(0)
    layer = Linear(1536, 6144, normed_input=True).cuda()
    torch.nn.init.normal_(layer.weight, std=0.02)
    x = rms_norm(torch.randn(8, 256, 1536, device="cuda"), 1e-6).bfloat16().requires_grad_()
    grad = torch.randn(8, 256, 6144, device="cuda").bfloat16() * 1e-6

    def run() -> list[torch.Tensor]:
        x.grad = layer.weight.grad = None
        y = layer(x)
        y.backward(grad)
        return [value.float() for value in (y.detach(), x.grad, layer.weight.grad)]

    exact = run()
    assert use_fp8(layer) == 1
    run()  # the first call of a kernel may load it
    torch.cuda.set_sync_debug_mode("error")
    try:
        refresh_fp8(layer)
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, want, bound in zip(got, exact, (0.042, 0.064, 0.064), strict=True):
        assert bound / 2 < float((value - want).norm() / want.norm()) < bound


def test_a_compiled_model_learns_as_in_bf16() -> None:
    arch = Architecture(
        arch="portable", hidden_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        head_dim=128, intermediate_size=2048, vocab_size=1024, max_position_embeddings=512, rope_theta=10_000.0,
    )  # fmt: skip
    paths = []
    for with_fp8 in (False, True):
        model = GPT(arch, compute_dtype=torch.bfloat16).cuda()
        model.init_weights(0)
        assert not with_fp8 or use_fp8(model) == 4 * 6
        model.compile_blocks()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        ids = (torch.arange(512)[None] * torch.arange(1, 9)[:, None] % 1021).cuda()
        losses = []
        for _ in range(15):
            loss = model.loss(ids, ids.roll(-1, 1), 1 / ids.numel())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            refresh_fp8(model)
            losses.append(float(loss.detach()))
        paths.append(losses)
    plain, quantised = paths
    assert plain[-1] < 0.75 * plain[0]
    # Over the whole way down: at its end, near zero, a share would say nothing.
    assert sum(quantised) == pytest.approx(sum(plain), rel=0.03)
