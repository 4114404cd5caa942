"""Head and loss in one: the logits of a batch never exist at once, and their gradient is made where they do."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from picollm.model.extras import soft_cap
from picollm.model.functional import exact_type

# Elements of logits alive at once on a CPU: they stay in a last-level cache, and matmuls are still at full speed.
LOGITS_PER_CHUNK = 1 << 22
# A chunk's logits take at most this share of a GPU's memory. There chunks save memory only: four cost the head some
# per cent of its time (GPU.md 2a), so as few as fit are best.
GPU_MEMORY_SHARE = 32


def rows_per_chunk(rows: int, vocab_size: int, itemsize: int, gpu_memory: int | None) -> int:
    """Rows whose logits exist at once: chunks of one size, as few as the device takes.

    Args:
        itemsize: bytes of a logit.
        gpu_memory: bytes of the device, None for a CPU.
    """
    if gpu_memory is None:
        most = max(16, LOGITS_PER_CHUNK // vocab_size)
    else:
        most = max(16, gpu_memory // GPU_MEMORY_SHARE // (vocab_size * itemsize))
    chunks = -(-rows // most)
    return -(-rows // max(1, chunks))


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, while a chunk's probabilities are at hand."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, vocab_size: int, cap: float | None,
        z_loss: float, compiled: bool,
    ) -> Tensor:  # fmt: skip
        w = weight[:vocab_size].to(x.dtype)
        exact = exact_type(x.dtype)
        memory = torch.cuda.get_device_properties(x.device).total_memory if x.is_cuda else None
        rows = rows_per_chunk(x.size(0), vocab_size, x.element_size(), memory)
        needs_grad = ctx.needs_input_grad[0]
        chunk = _compiled_chunk() if compiled else _chunk
        if needs_grad:
            dx = torch.empty_like(x)
            dw = torch.zeros(weight.shape, dtype=exact, device=x.device)
        total = torch.zeros((), dtype=scale.dtype, device=x.device)
        for start in range(0, x.size(0), rows):
            part, target = x[start : start + rows], targets[start : start + rows]
            loss, dlogits = chunk(part @ w.T, target, scale.to(exact), cap, z_loss, needs_grad)
            total += loss.sum(dtype=total.dtype)
            if needs_grad:
                torch.mm(dlogits, w, out=dx[start : start + rows])
                dw[:vocab_size] += dlogits.T @ part
        if needs_grad:
            ctx.save_for_backward(dx, dw)
        return (total * scale).to(exact)

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dw = ctx.saved_tensors
        # Looking at a number on a GPU would wait for it; two more passes over the gradients cost less.
        if grad.device.type != "cpu" or float(grad) != 1.0:
            dx, dw = dx * grad.to(dx.dtype), dw * grad.to(dw.dtype)
        return dx, dw, None, None, None, None, None, None


def linear_cross_entropy(
    x: Float[Tensor, "N C"],
    weight: Float[Tensor, "W C"],
    targets: Int[Tensor, " N"],
    scale: float | Float[Tensor, ""],
    vocab_size: int,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> Float[Tensor, ""]:
    """Sum over rows with target >= 0 of -log softmax(z)[target] + z_loss * logsumexp(z)^2, in nats, times `scale`.

    z = soft_cap(x weight^T) over the first `vocab_size` rows of `weight`, float32 (float64 for float64 input) after
    the product. Gradients of the logits have the type of x and carry `scale`: in float16 it must hold the loss scale.

    Args:
        z_loss: weight of the penalty that keeps the logits' common offset small (Chowdhery et al. 2022,
            arXiv:2204.02311).
        compiled: the work between the products in kernels of its own, no chunk in float32.
    """
    # Sums are float64, which Apple's GPUs lack. A number becomes a tensor on the device without a copy from the host.
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    scale = scale.to(dtype) if isinstance(scale, Tensor) else torch.full((), scale, dtype=dtype, device=x.device)
    return _LinearCrossEntropy.apply(x, weight, targets, scale, vocab_size, softcap, z_loss, compiled)


def _chunk(
    logits: Tensor, target: Tensor, scale: Tensor, cap: float | None, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of each row, unscaled, and the scaled gradient of the logits, in as few passes as the library allows."""
    exact = exact_type(logits.dtype)
    wanted, index = target >= 0, target.clamp_min(0)[:, None]
    z = logits
    if cap is not None:
        t = (logits.to(exact) / cap).tanh_()
        z = t * cap
    p = torch.softmax(z, -1, dtype=exact)
    hit = z.gather(-1, index).squeeze(-1).to(exact)
    loss = -p.gather(-1, index).squeeze(-1).log()
    # A probability may round to 0 in float32; asking whether one did would make the host wait for a GPU.
    if z.device.type != "cpu" or (loss > 60).any():
        loss = z.to(exact).logsumexp(-1) - hit
    lse = loss + hit
    if z_loss:
        loss = loss + z_loss * lse.square()
    dlogits = None
    if needs_grad:
        if z_loss:
            p.mul_((1 + 2 * z_loss * lse)[:, None])
        p.scatter_add_(-1, index, torch.full_like(index, -1, dtype=exact))
        if cap is not None:
            p.mul_(t.square_().neg_().add_(1))
        dlogits = torch.empty_like(logits)
        torch.mul(p, (wanted * scale)[:, None], out=dlogits)
    return loss.mul_(wanted), dlogits


def _plain_chunk(
    logits: Tensor, target: Tensor, scale: Tensor, cap: float | None, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_chunk`, in formulas that a compiler fuses: the logits are read twice and their gradient is written once."""
    wanted, index = target >= 0, target.clamp_min(0)[:, None]
    z = soft_cap(logits.to(exact_type(logits.dtype)), cap)
    peak = z.amax(-1, keepdim=True)
    e = torch.exp(z - peak)
    total = e.sum(-1, keepdim=True)
    lse = peak + total.log()
    hit = z.gather(-1, index)
    loss = (lse - hit).squeeze(-1)
    if z_loss:
        loss = loss + z_loss * lse.squeeze(-1).square()
    dlogits = None
    if needs_grad:
        weight = (wanted * scale)[:, None]
        pull = (1 + 2 * z_loss * lse) if z_loss else 1.0
        slope = e * (pull * weight / total)
        # Comparing every column with the target costs more than writing that one again.
        at_target = (pull * torch.exp(hit - lse) - 1) * weight
        if cap is not None:
            slope, at_target = slope * (1 - (z / cap).square()), at_target * (1 - (hit / cap).square())
        dlogits = slope.to(logits.dtype).scatter(-1, index, at_target.to(logits.dtype))
    return loss * wanted, dlogits


@functools.cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(_plain_chunk, fullgraph=True, dynamic=False)
