"""The decoder: token ids -> logits, or -> loss.

Pre-norm blocks with weightless RMSNorm (also right after the embedding), rotary positions, QK norm, relu(x)^2,
a residual scalar per layer, untied head, no biases. That much folds exactly into stock architectures for export; what
`extras.py` adds does not.

Letters: B batch, T time, C hidden size, H query heads, K key/value heads, D head size, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from picollm.config.model import GATE_CHANNELS, Architecture
from picollm.model.attention import causal_attention
from picollm.model.extras import (
    add_value_embedding,
    extra_parameters,
    initial_extra,
    shifted,
    smear,
    soft_cap,
)
from picollm.model.functional import apply_rotary, exact_type, relu_squared, rms_norm, rotary_table
from picollm.model.kv_cache import Cached, KVCache
from picollm.model.linear import Linear, packed_linear
from picollm.model.loss import linear_cross_entropy


class Attention(nn.Module):
    """Causal self-attention with rotary positions, QK norm and grouped queries."""

    packed = ("q_proj", "k_proj", "v_proj")  # multiplied in one product: see `precision.use_fp8`

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = arch.num_attention_heads, arch.num_key_value_heads
        self.head_dim = arch.head_dim
        self.eps = arch.rms_norm_eps
        self.window = arch.windows[layer]
        # Both QK scales in one factor: multiplying q and k by s is multiplying the scores by s^2.
        self.scale = arch.qk_scale**2 / math.sqrt(arch.head_dim)
        queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        self.q_proj = Linear(arch.hidden_size, queries, normed_input=True)
        self.k_proj = Linear(arch.hidden_size, keys, normed_input=True)
        self.v_proj = Linear(arch.hidden_size, keys, normed_input=True)
        self.o_proj = Linear(queries, arch.hidden_size)
        if layer in arch.value_embedding_layers:
            self.value_gate = Linear(min(GATE_CHANNELS, arch.hidden_size), arch.num_key_value_heads)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        value_embedding: Float[Tensor, "B T W"] | None,
        rotary: Float[Tensor, "2 ..."],
        backend: str,
        cached: Cached | None,
        bounds: Int[Tensor, " N"] | None,
    ) -> Float[Tensor, "B T C"]:
        B, T, _ = x.shape
        qkv = packed_linear(x, (self.q_proj, self.k_proj, self.v_proj))
        qkv = qkv.view(B, T, -1, self.head_dim)  # (B, T, H + 2 K, D)
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        qk = rms_norm(apply_rotary(qk, rotary), self.eps)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        if value_embedding is not None:
            v = add_value_embedding(v, value_embedding, self.value_gate(x[..., : self.value_gate.in_features]))
        positions = None
        if cached is not None:
            k, v = cached.update(k, v)
            positions = cached.positions
        y = causal_attention(
            q, k, v, scale=self.scale, backend=backend, window=self.window, positions=positions, bounds=bounds
        )
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """relu(x W_up)^2 W_down."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.up_proj = Linear(arch.hidden_size, arch.intermediate_size, normed_input=True)
        self.down_proj = Linear(arch.intermediate_size, arch.hidden_size)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down_proj(relu_squared(self.up_proj(x)))


class Block(nn.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.eps = arch.rms_norm_eps
        self.attention = Attention(arch, layer)
        self.mlp = MLP(arch)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        scalar: Float[Tensor, ""],
        x0: Float[Tensor, "B T C"] | None,
        x0_scalar: Float[Tensor, ""] | None,
        value_embedding: Float[Tensor, "B T W"] | None,
        rotary: Float[Tensor, "2 ..."],
        backend: str,
        cached: Cached | None,
        bounds: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """One layer; `scalar` weighs the stream, `x0_scalar` the embedding `x0` mixed into it."""
        x = scalar * x if x0 is None else scalar * x + x0_scalar * x0
        x = x + self.attention(rms_norm(x, self.eps), value_embedding, rotary, backend, cached, bounds)
        return x + self.mlp(rms_norm(x, self.eps))


class GPT(nn.Module):
    """A decoder-only transformer of the given architecture; weights come from `init_weights` or a checkpoint.

    Attributes:
        compute_dtype: type of activations; weights stay in their own (float32 masters while training).
        backend: kernel of attention, see `causal_attention`; `window_backend` in layers with a window.
        activation_checkpointing: a training pass keeps a block's input only and computes the block again for its
            gradient (Chen et al. 2016, arXiv:1604.06174).
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        compute_dtype: torch.dtype = torch.float32,
        backend: str = "sdpa",
        window_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.arch = arch
        self.compute_dtype = compute_dtype
        self.backend = backend
        self.window_backend = window_backend or backend
        self.activation_checkpointing = False
        self.embed_tokens = nn.Parameter(torch.empty(arch.padded_vocab_size, arch.hidden_size))
        # The scalars are exp(theta): positive by construction, so the export can divide by their products.
        self.resid_theta = nn.Parameter(torch.empty(arch.num_hidden_layers))
        self.layers = nn.ModuleList(Block(arch, layer) for layer in range(arch.num_hidden_layers))
        self.lm_head = nn.Parameter(torch.empty(arch.padded_vocab_size, arch.hidden_size))
        for name, parameter in extra_parameters(arch).items():
            setattr(self, name, parameter)
        self._compiled = False
        self._rotary: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Start values; each parameter has its own generator, keyed on seed and name, so none depends on another.

        Scales are nanochat's (measured there over many sweeps): unit-variance uniform projections into the block,
        zero projections out of it, a small head.
        """
        C, L = self.arch.hidden_size, self.arch.num_hidden_layers
        bound = math.sqrt(3 / C)
        for name, weight in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            if name == "embed_tokens":
                value = torch.empty(weight.shape).normal_(0, 0.8, generator=generator)
            elif name == "lm_head":
                value = torch.empty(weight.shape).normal_(0, 0.001, generator=generator)
            elif name == "resid_theta":
                value = torch.log(1.15 - 0.10 * torch.arange(L) / max(1, L - 1))
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                value = torch.zeros(weight.shape)
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight")):
                limit = 0.4 * bound if name.endswith("up_proj.weight") else bound
                value = torch.empty(weight.shape).uniform_(-limit, limit, generator=generator)
            else:
                value = initial_extra(name, weight.shape, self.arch, generator)
                assert value is not None, name
            weight.copy_(value)

    def compile_blocks(self) -> None:
        """Compile training passes block by block, and what is before and after the blocks apart.

        Compile time does not grow with depth (blocks of a kind share their code), a block's gradients are complete
        when its backward pass ends, and names of weights stay. Passes in eval mode, without gradients or with a cache
        are not compiled: their shapes change.
        """
        # A kind of block is a variant of one function, and so is each device batch; torch's limit is 8 in all.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._compiled = True

    def rotary(self, length: int) -> Float[Tensor, "2 S 1 half"]:
        """Cosines and sines of the first positions, in compute type; grown on demand, never part of a checkpoint."""
        key = (self.compute_dtype, self.embed_tokens.device)
        table = self._rotary.get(key)
        if table is None or table.size(1) < length:
            size = max(length, self.arch.max_position_embeddings)
            table = rotary_table(size, self.arch.head_dim, self.arch.rope_theta, self.compute_dtype, key[1])
            self._rotary[key] = table
        return table[:, :length]

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        *,
        cache: KVCache | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        rows: Int[Tensor, " B"] | None = None,
        length: int | None = None,
        bounds: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """The normed residual stream after the last block.

        Args:
            bounds: as in `causal_attention`; for passes without a cache. Positions go on over a row, because rotary
                ones count only as differences.
        """
        cached = before = None
        if cache is None:
            rotary = self.rotary(ids.size(1))[:, None]  # (2, 1, T, 1, D/2)
            if bounds is not None and self._compiles():
                torch._dynamo.mark_dynamic(bounds, 0)  # no new code for every number of documents
            if bounds is not None and self.smear_gate is not None:
                first = torch.zeros(ids.numel() + 1, dtype=torch.bool, device=ids.device)
                first[bounds.long()] = True
                before = F.embedding(ids.roll(1, 1), self.embed_tokens) * ~first[:-1].view(*ids.shape, 1)
        else:
            assert positions is not None
            length = int(positions.max()) + 1 if length is None else length
            rotary = self.rotary(length)[:, positions]  # (2, B, T, 1, D/2)
            cached = Cached(cache, positions, rows, length)
            if self.smear_gate is not None:
                earlier = F.embedding(cache.tokens_before(ids, positions, rows), self.embed_tokens)
                before = earlier * (positions > 0).unsqueeze(-1)
        dtype, eps = self.compute_dtype, self.arch.rms_norm_eps
        enter, run, leave = _compiled() if self._compiles(cache) else (_enter, Block.forward, _leave)
        checkpointed = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        x = enter(F.embedding(ids, self.embed_tokens), before, self.smear_gate, self.smear_lambda, dtype, eps)
        scalars = self.resid_theta.exp().to(dtype).unbind()
        x0 = x0_scalars = middle = None
        if self.x0_lambdas is not None:
            x0, x0_scalars = x, self.x0_lambdas.to(dtype).unbind()
        for i, block in enumerate(self.layers):
            if cached is not None:
                cached.layer = i
            value_embedding = None
            if i in self.arch.value_embedding_layers:
                value_embedding = F.embedding(ids, self.value_embeds[str(i)]).to(dtype)
            backend = self.backend if block.attention.window is None else self.window_backend
            x0_scalar = None if x0_scalars is None else x0_scalars[i]
            inputs = (block, x, scalars[i], x0, x0_scalar, value_embedding, rotary, backend, cached, bounds)
            if checkpointed:
                x = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(*inputs)
            if self.backout_lambda is not None and i == len(self.layers) // 2:
                middle = x
        return leave(x, middle, self.backout_lambda, eps)

    def _compiles(self, cache: KVCache | None = None) -> bool:
        return self._compiled and self.training and torch.is_grad_enabled() and cache is None

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        cache: KVCache | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        rows: Int[Tensor, " B"] | None = None,
        length: int | None = None,
        last: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B S V"]:
        """Logits over the vocabulary, at least float32, of all T tokens (S = T) or of one in each row (S = 1).

        Args:
            cache: keys and values of earlier tokens; the new ones are written to it.
            positions: position of each token in its row; required with a cache.
            rows: cache row of each batch row; None means all rows in order.
            length: keys to attend to, at least max(positions) + 1; found from `positions` when None.
            last: index of the one token per row whose logits are wanted; None wants all.
        """
        x = self.hidden(ids, cache=cache, positions=positions, rows=rows, length=length)
        if last is not None:
            x = x[torch.arange(x.size(0), device=x.device), last, None]
        return self._logits(x, self.lm_head[: self.arch.vocab_size].to(x.dtype))

    def loss(
        self,
        ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        scale: float | Float[Tensor, ""] = 1.0,
        z_loss: float = 0.0,
        bounds: Int[Tensor, " N"] | None = None,
    ) -> Float[Tensor, ""]:
        """Sum over targets >= 0 of -log p(target) + z_loss * logsumexp(logits)^2, in nats, times `scale`.

        In float16 `scale` must hold the loss scale: gradients of logits are made, and rounded, with it. With `bounds`
        (see `causal_attention`) the documents of a row do not see each other.
        """
        x = self.hidden(ids, bounds=bounds)
        return linear_cross_entropy(
            x.flatten(0, 1),
            self.lm_head,
            targets.flatten(),
            scale,
            self.arch.vocab_size,
            softcap=self.arch.final_logit_softcapping,
            z_loss=z_loss,
            compiled=self._compiles(),
        )

    @torch.no_grad()
    def nats(self, ids: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """-log p(target) per position in nats, 0 where the target is negative."""
        x = self.hidden(ids)
        head = self.lm_head[: self.arch.vocab_size].to(x.dtype)
        out = torch.zeros(targets.shape, dtype=exact_type(x.dtype), device=x.device)
        for row in range(ids.size(0)):
            out[row] = F.cross_entropy(self._logits(x[row], head), targets[row], ignore_index=-1, reduction="none")
        return out

    def _logits(self, x: Float[Tensor, "... C"], head: Float[Tensor, "V C"]) -> Float[Tensor, "... V"]:
        return soft_cap(F.linear(x, head).to(exact_type(x.dtype)), self.arch.final_logit_softcapping)


def _enter(
    rows: Float[Tensor, "B T C"],
    before: Float[Tensor, "B T C"] | None,
    gate: Float[Tensor, " G"] | None,
    strength: Float[Tensor, " 1"] | None,
    dtype: torch.dtype,
    eps: float,
) -> Float[Tensor, "B T C"]:
    """Rows of the embedding -> the stream. `before`: those of the tokens before, where they are not in the batch."""
    x = rms_norm(rows.to(dtype), eps)
    if gate is None or strength is None:
        return x
    previous = shifted(x) if before is None else rms_norm(before.to(dtype), eps)
    return smear(x, previous, gate, strength)


def _leave(
    x: Float[Tensor, "B T C"], middle: Float[Tensor, "B T C"] | None, backout: Float[Tensor, " 1"] | None, eps: float
) -> Float[Tensor, "B T C"]:
    """The stream -> what the head reads, less a share of what it was in the middle."""
    if middle is not None and backout is not None:
        x = x - backout.to(x.dtype) * middle
    return rms_norm(x, eps)


@functools.cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    return compiled(_enter), compiled(Block.forward), compiled(_leave)
