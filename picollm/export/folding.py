"""A checkpoint's weights as stock architectures want them: what only our model has is folded into matrices.

    embedding, then norm       -> the rows are normed once and for all
    norms without weights      -> weights of ones
    rotate, norm, times 1.2    -> norm with a weight of 1.2, rotate: a rotation keeps a norm
    residual scalars lambda_i  -> W_o and W_down of layer i divided by lambda_0 ... lambda_i
    relu(x)^2                  -> xIELU with constants (exact), or SwiGLU with a steep gate (`swiglu`)

The rotation is the stock one already (pairs (i, i + D/2), by +angle). Rows of the embedding and the head beyond the
tokenizer's vocabulary, which only round it up to a multiple of 64, are left out: files then have as many rows as
tokens, and no runtime can choose an id that has no text.

Letters: V vocabulary, C hidden size, D head size, I width inside the MLP, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from picollm.config.model import Architecture
from picollm.errors import ConfigError, IntegrityError
from picollm.export import features
from picollm.model.functional import rms_norm
from picollm.run_dir import StageDir
from picollm.tokenizer.tokenizer import Tokenizer
from picollm.train import checkpoint_files as files
from picollm.train import checkpoint_tensors as tensors

# Below this the eps in the norms shows: at 1e-5 logits are off by 1e-2 (MODEL 2.5).
LEAST_SCALAR = 0.05

# relu(x)^2 as xIELU: softplus(alpha_n) = 0, beta = 0 and softplus(alpha_p) = 1. For float32 metadata alpha_p is
# ln(e - 1). bfloat16 cannot hold that, but softplus(64) is 64 in any type: then W_up is divided by 8, which is exact.
XIELU_ALPHA_P = 0.541324854
XIELU_ALPHA_P_SCALED = 64.0
XIELU_UP_DIVISOR = 8.0
XIELU_ALPHA_N = -128.0
XIELU_BETA = 0.0
XIELU_EPS = -1e-6

# Steepness of the gate that makes SwiGLU of relu(x)^2: the error falls with its square. A block-quantised type needs
# weights of like size, and float16 ends at 65504, which the steep gate of a large activation passes.
SWIGLU_C = 1024.0
SWIGLU_C_QUANTISED = 64.0
SWIGLU_C_FLOAT16 = 64.0

# Neutral name within a layer -> parameter of ours.
_MATRICES = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A stage's newest checkpoint, verified and not loaded.

    Attributes:
        path: its folder.
        sha256: of its weights.
        meta: its `meta.json`.
    """

    stage: StageDir
    path: Path
    step: int
    arch: Architecture
    sha256: str
    tokenizer_sha256: str
    meta: dict[str, Any]


def open_checkpoint(stage: StageDir) -> Checkpoint:
    """Verify the hashes and headers of a stage's newest checkpoint.

    Raises:
        MissingArtifact: the stage has no checkpoint.
        IntegrityError: it is damaged, or its weights are not of its architecture.
    """
    step = files.latest_step(stage)
    path = files.checkpoint_dir(stage, step)
    sums = files.verify(path, only=(tensors.WEIGHTS, "meta.json"))
    meta = files.read_meta(path)
    arch = tensors.architecture_of(path, meta)
    tensors.check_weights(path, arch)
    if not isinstance(tokenizer := meta.get("tokenizer_sha256"), str):
        raise IntegrityError(
            f"`{path / 'meta.json'}` is torn or was edited", cause="it names no tokenizer", hint=files.RESTORE
        )
    return Checkpoint(stage, path, step, arch, sums[tensors.WEIGHTS], tokenizer, meta)


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The run's tokenizer, which must be the one that the checkpoint was trained with.

    Raises:
        MissingArtifact: there is none.
        IntegrityError: it is damaged, or another one.
    """
    run = checkpoint.stage.run
    tokenizer = Tokenizer.load(run.tokenizer)
    if tokenizer.sha256 != checkpoint.tokenizer_sha256 or tokenizer.vocab_size != checkpoint.arch.vocab_size:
        raise IntegrityError(
            f"the tokenizer of run `{run.name}` is not the one its stage `{checkpoint.stage.name}` was trained with",
            cause=f"it is {tokenizer.sha256[:12]}… with {tokenizer.vocab_size:,} tokens, the checkpoint names "
            f"{checkpoint.tokenizer_sha256[:12]}… with {checkpoint.arch.vocab_size:,}",
            hint="restore `tokenizer/`, or train again in a new run",
        )
    return tokenizer


def folded_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that `folded` gives, in its order."""
    C, D, width = arch.hidden_size, arch.head_dim, arch.intermediate_size
    queries, keys = arch.num_attention_heads * D, arch.num_key_value_heads * D
    layer = {
        "attn_norm": (C,), "q": (queries, C), "k": (keys, C), "v": (keys, C), "q_norm": (D,), "k_norm": (D,),
        "o": (C, queries), "ffn_norm": (C,), "up": (width, C), "down": (C, width),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (arch.vocab_size, C)}
    for i in range(arch.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"output_norm": (C,), "output": (arch.vocab_size, C)}


def folded(checkpoint: Checkpoint | Path, arch: Architecture) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """The folded tensors in float32 and in the order of `folded_shapes`, read from the disk one at a time.

    Args:
        checkpoint: verified; a path is the folder of one.

    Raises:
        ConfigError: the architecture has features that do not fold, or a residual scalar came too near to zero.
        IntegrityError: the weights cannot be read.
    """
    if blocking := features.blocking_features(arch):
        raise ConfigError(
            "this model does not fold into a stock architecture",
            cause=f"it has {', '.join(blocking)}",
            hint="export it with its own code: `picollm export transformers`",
        )
    weights = (checkpoint if isinstance(checkpoint, Path) else checkpoint.path) / tensors.WEIGHTS
    scales = residual_scales(read_tensor(weights, "resid_theta"))
    for name, shape in folded_shapes(arch).items():
        kind = name.rpartition(".")[2]
        if kind in ("attn_norm", "ffn_norm", "output_norm"):
            yield name, torch.ones(shape)
        elif kind in ("q_norm", "k_norm"):
            yield name, torch.full(shape, arch.qk_scale)
        elif name == "token_embd":
            yield name, normed_embedding(weights, arch)
        elif name == "output":
            yield name, read_tensor(weights, "lm_head", rows=arch.vocab_size)
        else:
            layer = int(name.split(".")[1])
            weight = read_tensor(weights, f"layers.{layer}.{_MATRICES[kind]}.weight")
            yield name, weight.div_(scales[layer]) if kind in ("o", "down") else weight


def read_tensor(path: Path, name: str, *, rows: int | None = None) -> Tensor:
    """A copy of a tensor, or of its first rows, in float32.

    The file is mapped for this tensor only: pages that were read count as this process's memory while it is mapped.

    Raises:
        IntegrityError: the file cannot be read.
    """
    with tensors.open_tensors(path) as file:
        found = file.get_tensor(name) if rows is None else file.get_slice(name)[:rows]
        return found.to(torch.float32, copy=True)


def residual_scales(theta: Float[Tensor, " L"]) -> list[float]:
    """Per layer the product of the residual scalars exp(theta) up to it, by which what the layer adds is divided.

    Raises:
        ConfigError: one is so small that the eps of a norm would show.
    """
    scales = list(accumulate(theta.double().exp().tolist(), mul))
    small = [(layer, scale) for layer, scale in enumerate(scales) if not scale >= LEAST_SCALAR]
    if small:
        layer, scale = small[0]
        raise ConfigError(
            "this model does not fold into a stock architecture",
            cause=f"the product of the residual scalars up to layer {layer} is {scale:.3g}, below {LEAST_SCALAR}",
            hint="export an earlier stage (`--stage pretrain`); its training may have diverged: `picollm report`",
        )
    return scales


def normed_embedding(path: Path, arch: Architecture) -> Float[Tensor, "V C"]:
    """The embedding with each row normed, which is the first thing that the model does with it."""
    rows = read_tensor(path, "embed_tokens", rows=arch.vocab_size)
    for part in rows.split(_ROWS_AT_ONCE):  # in place: an embedding may be a good part of the model
        part.copy_(rms_norm(part, arch.rms_norm_eps))
    return rows


def swiglu(
    up: Float[Tensor, "I C"], down: Float[Tensor, "C I"], c: float = SWIGLU_C
) -> tuple[Float[Tensor, "I C"], Float[Tensor, "I C"], Float[Tensor, "C I"]]:
    """(gate, up, down) with silu(gate x) * (up x), times down, = relu(up x)^2, times down, up to 0.483 / c^2.

    What the gate gains, `up` and `down` lose in equal parts: their product stays within float16 the longest, and
    neither falls among its denormals. With `c` a power of four every weight keeps its bits but the exponent.
    """
    root = math.sqrt(c)
    return up * c, up / root, down / root
