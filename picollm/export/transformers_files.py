"""The small files of an export for transformers: configuration, tokenizer, generation defaults, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from picollm.config.model import GATE_CHANNELS, SMEAR_CHANNELS, Architecture
from picollm.export.provenance import Provenance
from picollm.files import write_atomic, write_json
from picollm.tokenizer.chat_format import CHAT_TEMPLATE
from picollm.tokenizer.special import ASSISTANT_END, BOS
from picollm.tokenizer.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer

QWEN3, APERTUS, REMOTE = "qwen3", "apertus", "picollm"
ARCHES = (QWEN3, APERTUS, REMOTE)
CLASSES = {QWEN3: "Qwen3ForCausalLM", APERTUS: "ApertusForCausalLM", REMOTE: "PicollmForCausalLM"}
# The release that brought the class, or what our own code was run with.
OLDEST = {QWEN3: "4.51", APERTUS: "4.56", REMOTE: "5.0"}
REMOTE_CODE = Path(__file__).with_name("remote_code")
CARD = "README.md"


def config(arch: Architecture, host: str, dtype: str, tokenizer: Tokenizer, provenance: Provenance) -> dict[str, Any]:
    """`config.json`."""
    end = [tokenizer.special[ASSISTANT_END], tokenizer.bos] if provenance.is_chat else tokenizer.bos
    found: dict[str, Any] = {
        "architectures": [CLASSES[host]],
        "model_type": host,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_hidden_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_key_value_heads,
        "head_dim": arch.head_dim,
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.rms_norm_eps,
        # Readers before transformers 5 know `rope_theta` and `torch_dtype` only.
        "rope_theta": arch.rope_theta,
        "dtype": dtype,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": end,
        # A padding row would be frozen in fine-tuning, and every row of ours is a token.
        "pad_token_id": None,
        "picollm": _origin(provenance),
    }
    if host == REMOTE:
        return found | _remote(arch)
    found |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    if host == QWEN3:
        return found | {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}
    return found | {"hidden_act": "xielu"}


def _remote(arch: Architecture) -> dict[str, Any]:
    return {
        "auto_map": {
            "AutoConfig": "configuration_picollm.PicollmConfig",
            "AutoModelForCausalLM": "modeling_picollm.PicollmForCausalLM",
        },
        "windows": list(arch.windows),
        "qk_scale": arch.qk_scale,
        "final_logit_softcapping": arch.final_logit_softcapping,
        "value_embedding_layers": list(arch.value_embedding_layers),
        "value_gate_channels": min(GATE_CHANNELS, arch.hidden_size),
        "x0_scalars": arch.x0_scalars,
        "smear_channels": min(SMEAR_CHANNELS, arch.hidden_size) if arch.smear else 0,
        "backout": arch.backout,
    }


def _origin(provenance: Provenance) -> dict[str, Any]:
    return {
        "version": provenance.picollm,
        "run": provenance.run,
        "stage": provenance.stage,
        "step": provenance.step,
        "datasets": provenance.datasets,
        "training_tokens": provenance.training_tokens,
        "checkpoint_sha256": provenance.checkpoint_sha256,
        "recipe_sha256": provenance.recipe_sha256,
        "tokenizer_sha256": provenance.tokenizer_sha256,
    }


def generation_config(tokenizer: Tokenizer, *, is_chat: bool) -> dict[str, Any]:
    """`generation_config.json`: where a reply ends; a stray bos ends it too. Padding has no id of its own."""
    end = tokenizer.special[ASSISTANT_END]
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [end, tokenizer.bos] if is_chat else tokenizer.bos,
        "pad_token_id": tokenizer.bos,
    }


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The run's `tokenizer.json` with a post-processor that puts bos first, as in every text the model was trained on.

    `apply_chat_template` adds none: the template has its own.
    """
    value = json.loads(tokenizer.json)
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.bos], "tokens": [BOS]}},
    }
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def write(
    folder: Path, arch: Architecture, host: str, dtype: str, tokenizer: Tokenizer, provenance: Provenance
) -> None:
    """Write all of them into a folder.

    Raises:
        HostError: the disk is full or cannot be written.
    """
    chat = provenance.is_chat
    write_json(folder / "config.json", config(arch, host, dtype, tokenizer, provenance))
    write_json(folder / "generation_config.json", generation_config(tokenizer, is_chat=chat))
    write_atomic(folder / TOKENIZER_FILE, tokenizer_json(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": ASSISTANT_END if chat else BOS,
        "pad_token": BOS,
        "padding_side": "left",
        "add_bos_token": True,  # for readers of this file alone; transformers goes by `tokenizer.json`
        "clean_up_tokenization_spaces": False,
        "model_max_length": arch.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
        write_atomic(folder / TEMPLATE_FILE, CHAT_TEMPLATE)
    write_json(folder / CONFIG_FILE, settings)
    write_atomic(folder / CARD, card(arch, host, dtype, provenance))
    if host == REMOTE:
        for source in sorted(REMOTE_CODE.glob("*_picollm.py")):
            write_atomic(folder / source.name, source.read_text(encoding="utf-8"))


def card(arch: Architecture, host: str, dtype: str, provenance: Provenance) -> str:
    """`README.md`, which hubs show as the model's card. The licence is left open unless the user gave one."""
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if provenance.license:
        front.append(f"license: {provenance.license}")
    front += ["tags:", *(f"- {tag}" for tag in provenance.tags)]
    datasets = ", ".join(f"{name} (`{sha256[:12]}`)" for name, sha256 in provenance.datasets.items()) or "none recorded"
    kind = "A chat model" if provenance.is_chat else "A base model: it continues text and knows no turns"
    remote = ", trust_remote_code=True" if host == REMOTE else ""
    notes = [_SPECIAL_NOTE] if provenance.is_chat else []
    notes += {APERTUS: [_APERTUS_NOTE], REMOTE: [_REMOTE_NOTE]}.get(host, [])
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {provenance.name}", "",
            f"{kind}, {provenance.size_label} parameters, trained with picollm {provenance.picollm}.", "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            'path = "."  # this folder, or its name on a hub',
            f"tokenizer = AutoTokenizer.from_pretrained(path{remote})",
            f"model = AutoModelForCausalLM.from_pretrained(path{remote})",
            *(_CHAT_EXAMPLE if provenance.is_chat else _BASE_EXAMPLE),
            "```", "",
            f"Needs transformers {OLDEST[host]} or later.", "",
            *(f"{note}\n" for note in notes),
            "| | |", "| --- | --- |",
            f"| run, stage, step | {provenance.run}, {provenance.stage}, {provenance.step:,} |",
            f"| class | `{CLASSES[host]}`, {dtype} |",
            f"| shape | {arch.num_hidden_layers} layers, width {arch.hidden_size}, {arch.num_attention_heads} heads, "
            f"{arch.vocab_size:,} tokens, context of {arch.max_position_embeddings:,} |",
            f"| datasets | {datasets} |",
            f"| tokens of training | {provenance.training_tokens:,} |",
            f"| sha256 of the checkpoint's weights | `{provenance.checkpoint_sha256}` |",
            f"| sha256 of the recipe | `{provenance.recipe_sha256}` |",
            f"| licence | {provenance.license or 'to be chosen by whoever publishes it'} |", "",
            "`export.json` lists the checks that this export passed.", "",
        ]
    )  # fmt: skip


_CHAT_EXAMPLE = (
    'messages = [{"role": "user", "content": "Who are you?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
    "reply = model.generate(**inputs, max_new_tokens=128)",
    'print(tokenizer.decode(reply[0, inputs["input_ids"].size(1) :], skip_special_tokens=True))',
)
_BASE_EXAMPLE = (
    'inputs = tokenizer("Once upon a time", return_tensors="pt")',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))",
)
_SPECIAL_NOTE = (
    "transformers reads the text of a special token, such as `<|assistant_start|>`, as that token, in what a user "
    "writes too. Where users are not trusted, encode their text with `split_special_tokens=True`, as picollm's own "
    "engine does, or refuse such text. The calculator of picollm's engine does not run here: the model then writes "
    "the result of a calculation itself."
)
_APERTUS_NOTE = (
    "Do not install the optional fused `xielu` CUDA package beside this model: transformers then ignores the stored "
    "constants of the activation. An export with `--arch qwen3` has no such limit."
)
_REMOTE_NOTE = (
    "The model has features that no stock architecture has, so its code comes with it: `modeling_picollm.py`, which "
    "needs torch and transformers only."
)
