"""Names, shapes and values of the tensors in an export for transformers, by architecture (MODEL 4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from picollm.config.model import GATE_CHANNELS, SMEAR_CHANNELS, Architecture
from picollm.export import folding
from picollm.export.folding import Checkpoint
from picollm.export.transformers_files import APERTUS, QWEN3, REMOTE
from picollm.train.checkpoint_tensors import WEIGHTS

# Neutral name within a layer -> name in the file, by architecture.
_COMMON = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_INNER = {
    QWEN3: _COMMON | {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    APERTUS: _COMMON | {"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
}
_OUTER = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight", "output": "lm_head.weight"}
_XIELU: dict[str, tuple[tuple[int, ...], float]] = {
    "alpha_p": ((1,), folding.XIELU_ALPHA_P_SCALED),
    "alpha_n": ((1,), folding.XIELU_ALPHA_N),
    "beta": ((), folding.XIELU_BETA),
    "eps": ((), folding.XIELU_EPS),
}


def table(arch: Architecture, host: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the export, in the order of `tensors`."""
    if host == REMOTE:
        return _remote_shapes(arch)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in folding.folded_shapes(arch).items():
        if host == QWEN3 and name.endswith(".up"):
            found[_name(f"{name[:-2]}gate", host)] = shape
        found[_name(name, host)] = shape
        if host == APERTUS and name.endswith(".down"):
            layer = name.split(".")[1]
            found |= {f"model.layers.{layer}.mlp.act_fn.{key}": of for key, (of, _) in _XIELU.items()}
    return found


def _name(neutral: str, host: str) -> str:
    if neutral in _OUTER:
        return _OUTER[neutral]
    _, layer, kind = neutral.split(".")
    return f"model.layers.{layer}.{_INNER[host][kind]}.weight"


def tensors(checkpoint: Checkpoint, host: str, dtype: str) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """Name and float32 values of each tensor, in the order of `table`, one in memory at a time."""
    if host == REMOTE:
        yield from _remote_tensors(checkpoint)
        return
    c = folding.SWIGLU_C_FLOAT16 if dtype == "float16" else folding.SWIGLU_C
    up: Tensor | None = None
    for name, tensor in folding.folded(checkpoint, checkpoint.arch):
        layer = name.rpartition(".")[0]
        if host == QWEN3 and name.endswith(".up"):
            up = tensor  # until `down` comes, which is the next
        elif host == QWEN3 and name.endswith(".down"):
            assert up is not None
            for kind, part in zip(("gate", "up", "down"), folding.swiglu(up, tensor, c), strict=True):
                yield _name(f"{layer}.{kind}", host), part
            up = None
        elif host == APERTUS and name.endswith(".up"):
            yield _name(name, host), tensor.div_(folding.XIELU_UP_DIVISOR)
        else:
            yield _name(name, host), tensor
            if host == APERTUS and name.endswith(".down"):
                for key, (shape, value) in _XIELU.items():
                    yield f"model.{layer}.mlp.act_fn.{key}", torch.full(shape, value)


# -- the model's own code ---------------------------------------------------------------------------------------------


def _remote_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """As `modeling_picollm.py` names them: the embedding is normed, all else is as in the checkpoint."""
    C, D, V = arch.hidden_size, arch.head_dim, arch.vocab_size
    queries, keys = arch.num_attention_heads * D, arch.num_key_value_heads * D
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C)}
    for i in range(arch.num_hidden_layers):
        layer: dict[str, tuple[int, ...]] = {"resid_scale": (1,)}
        if arch.x0_scalars:
            layer["x0_scale"] = (1,)
        if i in arch.value_embedding_layers:
            layer["self_attn.value_embed.weight"] = (V, keys)
            gate = min(GATE_CHANNELS, C)
            layer["self_attn.value_gate.weight"] = (arch.num_key_value_heads, gate)
        layer |= {"self_attn.q_proj.weight": (queries, C), "self_attn.k_proj.weight": (keys, C)}
        layer |= {"self_attn.v_proj.weight": (keys, C), "self_attn.o_proj.weight": (C, queries)}
        layer |= {
            "mlp.up_proj.weight": (arch.intermediate_size, C),
            "mlp.down_proj.weight": (C, arch.intermediate_size),
        }
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if arch.smear:
        found |= {"model.smear_gate": (min(SMEAR_CHANNELS, C),), "model.smear_scale": (1,)}
    if arch.backout:
        found["model.backout_scale"] = (1,)
    return found | {"lm_head.weight": (V, C)}


_REMOTE_WHOLE = {
    "model.smear_gate": "smear_gate",
    "model.smear_scale": "smear_lambda",
    "model.backout_scale": "backout_lambda",
}


def _remote_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    arch, path = checkpoint.arch, checkpoint.path / WEIGHTS
    for name in _remote_shapes(arch):
        if name == "model.embed_tokens.weight":
            yield name, folding.normed_embedding(path, arch)
        elif name == "lm_head.weight":
            yield name, folding.read_tensor(path, "lm_head", rows=arch.vocab_size)
        elif name in _REMOTE_WHOLE:
            yield name, folding.read_tensor(path, _REMOTE_WHOLE[name])
        else:
            _, _, layer, inner = name.split(".", 3)
            i = int(layer)
            if inner == "resid_scale":
                yield name, folding.read_tensor(path, "resid_theta").exp()[i : i + 1]
            elif inner == "x0_scale":
                yield name, folding.read_tensor(path, "x0_lambdas")[i : i + 1]
            elif inner == "self_attn.value_embed.weight":
                yield name, folding.read_tensor(path, f"value_embeds.{i}", rows=arch.vocab_size)
            else:
                yield name, folding.read_tensor(path, f"layers.{i}.{inner.replace('self_attn', 'attention')}")
