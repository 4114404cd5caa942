"""What is in a GGUF file of ours: every key with its value and every tensor with its type and shape (MODEL 3 and 5).

One table for whoever writes the file and for whoever checks it. Knows no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from picollm.config.model import Architecture
from picollm.export.gguf_types import FALLBACK, Quant
from picollm.export.provenance import Provenance
from picollm.tokenizer.chat_format import CHAT_TEMPLATE
from picollm.tokenizer.special import ASSISTANT_END, SPECIALS
from picollm.tokenizer.tokenizer import Tokenizer

Value = str | int | float | bool | list[str] | list[int] | list[float]

# llama.cpp's name for how our regex splits text: see `tokenizer/special.py`.
PRE_TOKENIZER = "qwen2"
_NORMAL, _CONTROL = 1, 3
_QUANTIZATION_VERSION = 2

# Neutral name in `folding` -> name in the file.
_OUTER = {"token_embd": "token_embd.weight", "output_norm": "output_norm.weight", "output": "output.weight"}
_INNER = {
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A metadata entry; `kind` names its GGUF type as `GGUFWriter.add_KIND` does."""

    kind: str
    value: Value


@dataclass(frozen=True)
class Entry:
    """A tensor: its name in the file, the type it gets, and its shape as torch has it."""

    name: str
    tensor_type: str
    shape: tuple[int, ...]


def tensor_name(neutral: str) -> str:
    """`layers.3.q` -> `blk.3.attn_q.weight`."""
    if neutral in _OUTER:
        return _OUTER[neutral]
    _, layer, kind = neutral.split(".")
    return f"blk.{layer}.{_INNER[kind]}.weight"


def tensor_type(shape: tuple[int, ...], quant: Quant) -> str:
    """The type a tensor gets: vectors stay F32, and matrices whose rows fit no block stay F16."""
    if len(shape) < 2:
        return "F32"
    if not quant.direct:
        return "F32"  # what `llama-quantize` starts from
    return quant.name if quant.fits(shape[-1]) else FALLBACK


def entries(shapes: dict[str, tuple[int, ...]], host: str, quant: Quant) -> list[Entry]:
    """Every tensor of the file, in its order.

    Args:
        shapes: of `folding.folded_shapes`.
        host: `qwen3` has a gate beside every up projection.
    """
    listed = []
    for neutral, shape in shapes.items():
        if host == "qwen3" and neutral.endswith(".up"):
            listed.append((neutral[: -len("up")] + "gate", shape))
        listed.append((neutral, shape))
    return [Entry(tensor_name(name), tensor_type(shape, quant), shape) for name, shape in listed]


def keys(
    arch: Architecture, tokenizer: Tokenizer, host: str, quant: Quant, provenance: Provenance, xielu: dict[str, float]
) -> dict[str, Key]:
    """Every key but `general.architecture`, which the writer puts first.

    Args:
        xielu: the activation's four constants, written per layer where the host is `apertus`.
    """
    found = {"general.type": Key("string", "model"), **_general(provenance)}
    found["general.quantization_version"] = Key("uint32", _QUANTIZATION_VERSION)
    found |= {f"{host}.{name}": key for name, key in _shape(arch).items()}
    if host == "apertus":
        found |= {f"xielu.{name}": Key("array", [value] * arch.num_hidden_layers) for name, value in xielu.items()}
    return found | _vocabulary(tokenizer, chat=provenance.is_chat)


def _general(provenance: Provenance) -> dict[str, Key]:
    """Who made it from what. Keys without a value are left out: nobody but the user can say the licence."""
    found: dict[str, Key] = {
        "general.name": Key("string", provenance.name),
        "general.size_label": Key("string", provenance.size_label),
        "general.finetune": Key("string", provenance.stage),
        "general.description": Key("string", provenance.description),
        "general.license": Key("string", provenance.license or ""),
        "general.tags": Key("array", provenance.tags),
        "general.dataset.count": Key("uint32", len(provenance.datasets)),
    }
    for i, (name, sha256) in enumerate(provenance.datasets.items()):
        found[f"general.dataset.{i}.name"] = Key("string", name)
        found[f"general.dataset.{i}.version"] = Key("string", sha256)
    found |= {
        "picollm.version": Key("string", provenance.picollm),
        "picollm.stage": Key("string", provenance.stage),
        "picollm.step": Key("uint32", provenance.step),
        "picollm.training_tokens": Key("uint64", provenance.training_tokens),
        "picollm.checkpoint_sha256": Key("string", provenance.checkpoint_sha256),
        "picollm.recipe_sha256": Key("string", provenance.recipe_sha256),
        "picollm.tokenizer_sha256": Key("string", provenance.tokenizer_sha256),
    }
    return {name: key for name, key in found.items() if key.value not in ("", [])}


def _shape(arch: Architecture) -> dict[str, Key]:
    return {
        "block_count": Key("uint32", arch.num_hidden_layers),
        "context_length": Key("uint32", arch.max_position_embeddings),
        "embedding_length": Key("uint32", arch.hidden_size),
        "feed_forward_length": Key("uint32", arch.intermediate_size),
        "attention.head_count": Key("uint32", arch.num_attention_heads),
        "attention.head_count_kv": Key("uint32", arch.num_key_value_heads),
        "attention.key_length": Key("uint32", arch.head_dim),
        "attention.value_length": Key("uint32", arch.head_dim),
        "attention.layer_norm_rms_epsilon": Key("float32", arch.rms_norm_eps),
        "rope.dimension_count": Key("uint32", arch.head_dim),
        "rope.freq_base": Key("float32", arch.rope_theta),
        "vocab_size": Key("uint32", arch.vocab_size),
    }


def _vocabulary(tokenizer: Tokenizer, *, chat: bool) -> dict[str, Key]:
    """The tokenizer as llama.cpp reads it; a base model ends at bos and has no turns."""
    model: dict[str, Any] = json.loads(tokenizer.json)["model"]
    num_learned = tokenizer.vocab_size - len(SPECIALS)
    by_id = {index: token for token, index in model["vocab"].items()}
    tokens = [by_id[i] for i in range(num_learned)] + list(SPECIALS)
    # tokenizers 0.20 began to write a merge as a pair.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    bos, end = tokenizer.bos, tokenizer.special[ASSISTANT_END]
    found = {
        "tokenizer.ggml.model": Key("string", "gpt2"),
        "tokenizer.ggml.pre": Key("string", PRE_TOKENIZER),
        "tokenizer.ggml.tokens": Key("array", tokens),
        "tokenizer.ggml.token_type": Key("array", [_NORMAL] * num_learned + [_CONTROL] * len(SPECIALS)),
        "tokenizer.ggml.merges": Key("array", merges),
        "tokenizer.ggml.bos_token_id": Key("uint32", bos),
        "tokenizer.ggml.eos_token_id": Key("uint32", end if chat else bos),
        "tokenizer.ggml.add_bos_token": Key("bool", True),
        "tokenizer.ggml.add_eos_token": Key("bool", False),
    }
    if chat:
        # No program has our end of turn on its list of end tokens, so it must be both; a stray bos ends a reply too.
        found["tokenizer.ggml.eot_token_id"] = Key("uint32", end)
        found["tokenizer.ggml.eom_token_id"] = Key("uint32", bos)
        found["tokenizer.chat_template"] = Key("string", CHAT_TEMPLATE)
    return {name: key for name, key in found.items() if key.value != []}
