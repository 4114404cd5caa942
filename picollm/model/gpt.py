"""The decoder: token ids -> logits, or -> loss.

Pre-norm blocks with weightless RMSNorm (also right after the embedding), rotary positions, QK norm, relu(x)^2,
a residual scalar per layer, untied head, no biases. Everything folds exactly into stock architectures for export.

Letters: B batch, T time, C hidden size, H query heads, K key/value heads, D head size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from picollm.config.model import Architecture
from picollm.model.attention import causal_attention
from picollm.model.functional import apply_rotary, linear_cross_entropy, relu_squared, rms_norm, rotary_table
from picollm.model.kv_cache import KVCache
from picollm.model.linear import Linear, packed_linear


class Attention(nn.Module):
    """Causal self-attention with rotary positions, QK norm and grouped queries."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = arch.num_attention_heads, arch.num_key_value_heads
        self.head_dim = arch.head_dim
        self.eps = arch.rms_norm_eps
        # Both QK scales in one factor: multiplying q and k by s is multiplying the scores by s^2.
        self.scale = arch.qk_scale**2 / math.sqrt(arch.head_dim)
        queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        self.q_proj = Linear(arch.hidden_size, queries)
        self.k_proj = Linear(arch.hidden_size, keys)
        self.v_proj = Linear(arch.hidden_size, keys)
        self.o_proj = Linear(queries, arch.hidden_size)

    def forward(
        self, x: Float[Tensor, "B T C"], rotary: Float[Tensor, "2 ..."], backend: str, cached: Cached | None
    ) -> Float[Tensor, "B T C"]:
        B, T, _ = x.shape
        qkv = packed_linear(x, (self.q_proj, self.k_proj, self.v_proj))
        qkv = qkv.view(B, T, -1, self.head_dim)  # (B, T, H + 2 K, D)
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        qk = rms_norm(apply_rotary(qk, rotary), self.eps)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        positions = None
        if cached is not None:
            k, v = cached.update(k, v)
            positions = cached.positions
        y = causal_attention(q, k, v, scale=self.scale, backend=backend, positions=positions)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """relu(x W_up)^2 W_down."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.up_proj = Linear(arch.hidden_size, arch.intermediate_size)
        self.down_proj = Linear(arch.intermediate_size, arch.hidden_size)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down_proj(relu_squared(self.up_proj(x)))


class Block(nn.Module):
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.eps = arch.rms_norm_eps
        self.attention = Attention(arch)
        self.mlp = MLP(arch)

    def forward(
        self, x: Float[Tensor, "B T C"], rotary: Float[Tensor, "2 ..."], backend: str, cached: Cached | None
    ) -> Float[Tensor, "B T C"]:
        x = x + self.attention(rms_norm(x, self.eps), rotary, backend, cached)
        return x + self.mlp(rms_norm(x, self.eps))


class Cached:
    """One forward pass's view of a KVCache: which rows, which positions, and the layer it has come to."""

    def __init__(self, cache: KVCache, positions: Int[Tensor, "B T"], rows: Int[Tensor, " B"] | None, length: int):
        self.cache, self.positions, self.rows, self.length = cache, positions, rows, length
        self.layer = 0

    def update(
        self, k: Float[Tensor, "B T K D"], v: Float[Tensor, "B T K D"]
    ) -> tuple[Float[Tensor, "B S K D"], Float[Tensor, "B S K D"]]:
        return self.cache.update(self.layer, k, v, self.positions, self.rows, self.length)


class GPT(nn.Module):
    """A decoder-only transformer of the given architecture; weights come from `init_weights` or a checkpoint.

    Attributes:
        compute_dtype: type of activations; weights stay in their own (float32 masters while training).
        backend: kernel of attention, see `causal_attention`.
    """

    def __init__(self, arch: Architecture, *, compute_dtype: torch.dtype = torch.float32, backend: str = "sdpa"):
        super().__init__()
        self.arch = arch
        self.compute_dtype = compute_dtype
        self.backend = backend
        self.embed_tokens = nn.Parameter(torch.empty(arch.padded_vocab_size, arch.hidden_size))
        # The scalars are exp(theta): positive by construction, so the export can divide by their products.
        self.resid_theta = nn.Parameter(torch.empty(arch.num_hidden_layers))
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch.num_hidden_layers))
        self.lm_head = nn.Parameter(torch.empty(arch.padded_vocab_size, arch.hidden_size))
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
            else:
                limit = 0.4 * bound if name.endswith("up_proj.weight") else bound
                value = torch.empty(weight.shape).uniform_(-limit, limit, generator=generator)
            weight.copy_(value)

    def compile_blocks(self) -> None:
        """Compile block by block: compile time does not grow with depth, and names of weights stay."""
        for block in self.layers:
            block.compile(fullgraph=True, dynamic=False)

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
    ) -> Float[Tensor, "B T C"]:
        """The normed residual stream after the last block."""
        cached = None
        if cache is None:
            rotary = self.rotary(ids.size(1))[:, None]  # (2, 1, T, 1, D/2)
        else:
            assert positions is not None
            length = int(positions.max()) + 1 if length is None else length
            rotary = self.rotary(length)[:, positions]  # (2, B, T, 1, D/2)
            cached = Cached(cache, positions, rows, length)
        eps = self.arch.rms_norm_eps
        x = rms_norm(F.embedding(ids, self.embed_tokens).to(self.compute_dtype), eps)
        scalars = self.resid_theta.exp().to(x.dtype)
        for i, block in enumerate(self.layers):
            if cached is not None:
                cached.layer = i
            x = block(scalars[i] * x, rotary, self.backend, cached)
        return rms_norm(x, eps)

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
        head = self.lm_head[: self.arch.vocab_size].to(x.dtype)
        logits = F.linear(x, head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, ids: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], scale: float = 1.0) -> Float[Tensor, ""]:
        """Sum of -log p(target) over targets >= 0, in nats, times `scale`."""
        x = self.hidden(ids)
        return linear_cross_entropy(x.flatten(0, 1), self.lm_head, targets.flatten(), scale, self.arch.vocab_size)

    @torch.no_grad()
    def nats(self, ids: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """-log p(target) per position in nats, 0 where the target is negative."""
        x = self.hidden(ids)
        head = self.lm_head[: self.arch.vocab_size].to(x.dtype)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = torch.zeros(targets.shape, dtype=exact, device=x.device)
        for row in range(ids.size(0)):
            logits = F.linear(x[row], head).to(out.dtype)
            out[row] = F.cross_entropy(logits, targets[row], ignore_index=-1, reduction="none")
        return out
