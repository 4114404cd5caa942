"""The model of picollm on one page: same names, same weights, same logits as `picollm/model/gpt.py`.

Nothing here is fast. `docs/learn/README.md` walks through it.
Letters: B batch, T time, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass
class Architecture:
    """The shape; field names are those of Hugging Face and of a stage's `config.json`. Defaults: preset `demo`."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 512
    vocab_size: int = 1024
    max_position_embeddings: int = 128
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-6
    qk_scale: float = 1.2
    arch: str = "portable"
    sliding_window: int | None = None  # this and what follows: only `full` has it, and this page does not
    window_pattern: str = "L"
    final_logit_softcapping: float | None = None
    value_embeddings: bool = False
    x0_scalars: bool = False
    smear: bool = False
    backout: bool = False


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Bring the last axis to length sqrt(C). There is no weight to learn."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn each pair (i, i + D/2) of a head by an angle that grows with the position. x is (B, T, heads, D)."""
    T, D = x.size(1), x.size(3)
    frequency = theta ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)  # (D/2,)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency  # (T, D/2)
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]  # (T, 1, D/2)
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Each token looks at itself and the tokens before it, and takes a weighted mean of their values."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        C, q, k = arch.hidden_size, arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        self.q_proj = nn.Linear(C, q, bias=False)
        self.k_proj = nn.Linear(C, k, bias=False)
        self.v_proj = nn.Linear(C, k, bias=False)
        self.o_proj = nn.Linear(q, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (B, T, _), a = x.shape, self.arch
        H, K, D = a.num_attention_heads, a.num_key_value_heads, a.head_dim
        q = rotate(self.q_proj(x).view(B, T, H, D), a.rope_theta)
        k = rotate(self.k_proj(x).view(B, T, K, D), a.rope_theta)
        v = self.v_proj(x).view(B, T, K, D)
        q = a.qk_scale * rms_norm(q, a.rms_norm_eps)
        k = a.qk_scale * rms_norm(k, a.rms_norm_eps)
        k, v = k.repeat_interleave(H // K, dim=2), v.repeat_interleave(H // K, dim=2)  # queries share keys when K < H
        scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)  # (B, H, T, T), rows sum to 1
        return self.o_proj(torch.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, H * D))


class MLP(nn.Module):
    """Each token by itself: widen, keep the squares of what is positive, narrow."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x).relu().square())


class Block(nn.Module):
    """Two steps, each added to the residual stream: look around, then think."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.eps = arch.rms_norm_eps
        self.attention = Attention(arch)
        self.mlp = MLP(arch)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(rms_norm(x, self.eps))
        return x + self.mlp(rms_norm(x, self.eps))


class GPT(nn.Module):
    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = a = arch
        if any((a.sliding_window, a.final_logit_softcapping, a.value_embeddings, a.x0_scalars, a.smear, a.backout)):
            raise NotImplementedError("windows, softcap, value embeddings, x0 scalars, smear, backout: see extras.py")
        rows = -(-arch.vocab_size // 64) * 64  # the real model pads to 64 because matrix units like it
        self.embed_tokens = nn.Parameter(torch.randn(rows, arch.hidden_size))
        self.resid_theta = nn.Parameter(torch.zeros(arch.num_hidden_layers))
        self.layers = nn.ModuleList(Block(arch) for _ in range(arch.num_hidden_layers))
        self.lm_head = nn.Parameter(torch.randn(rows, arch.hidden_size) * 0.001)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V): at each position, a score for every token that could come next."""
        x = rms_norm(self.embed_tokens[ids], self.arch.rms_norm_eps)  # (B, T, C)
        for scalar, block in zip(self.resid_theta.exp(), self.layers, strict=True):
            x = block(scalar * x)
        return rms_norm(x, self.arch.rms_norm_eps) @ self.lm_head[: self.arch.vocab_size].T

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Sum of -log p(target) in nats; a target of -1 does not count."""
        return nn.functional.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


@torch.no_grad()
def main(stage: Path, text: str, num_tokens: int = 40) -> str:
    """Continue a text with the weights of a stage folder, as `~/.local/share/picollm/runs/demo/pretrain`."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    model = GPT(Architecture(**json.loads((stage / "config.json").read_text())["recipe"]["model"]))
    checkpoint = sorted((stage / "checkpoints").glob("step_*[0-9]"))[-1]
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(stage.parent / "tokenizer" / "tokenizer.json"))
    ids = [tokenizer.token_to_id("<|bos|>"), *tokenizer.encode(text).ids]
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), sys.argv[2]))
