"""What a model can be exported to, computed from its architecture; the reason where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from picollm.config.model import Architecture
from picollm.tokenizer.special import SPECIALS

GGUF = "gguf"
TRANSFORMERS = "transformers"
REMOTE_CODE = "transformers (remote code)"
BYTES = 256  # tokens that every tokenizer has, before the first that is merged of them
TARGETS = (GGUF, TRANSFORMERS, REMOTE_CODE)


@dataclass(frozen=True)
class Export:
    """Whether a run's model can be written in a format, and why or why not."""

    possible: bool
    reason: str


def blocking_features(arch: Architecture) -> list[str]:
    """What stock architectures (Qwen3, Apertus) do not have, each with the key that brought it."""
    features = [
        (any(arch.windows), f"windows (`model.window_pattern` {arch.window_pattern})"),
        (arch.final_logit_softcapping, f"soft-capped logits (`model.logit_softcap` {arch.final_logit_softcapping})"),
        (arch.value_embeddings, "value embeddings (`model.value_embeddings`)"),
        (arch.x0_scalars, "the embedding in every layer (`model.x0_scalars`)"),
        (arch.smear, "smear (`model.smear`)"),
        (arch.backout, "backout (`model.backout`)"),
    ]
    return [text for present, text in features if present]


def blockers(arch: Architecture, *, digits: int = 1) -> dict[str, list[str]]:
    """Target -> what keeps the model from it; an empty list where nothing does.

    Args:
        digits: longest run of digits that the tokenizer keeps together. llama.cpp splits numbers into single digits,
            or into threes, and knows no pairs; nor does it read a tokenizer of single bytes.
    """
    stock = blocking_features(arch)
    return {GGUF: [*stock, *_blocking_tokenizer(arch, digits)], TRANSFORMERS: stock, REMOTE_CODE: []}


def _blocking_tokenizer(arch: Architecture, digits: int) -> dict[str, str]:
    """What of a tokenizer no reader of GGUF has -> what to train one with instead."""
    found = {}
    if digits == 2:
        found[f"tokens of {digits} digits (`tokenizer.digits`)"] = "`tokenizer.digits=1`"
    if arch.vocab_size <= BYTES + len(SPECIALS):
        found["a tokenizer that merges nothing"] = "more text for its tokenizer"
    return found


def gguf_cure(arch: Architecture, *, digits: int) -> str:
    """How a run must be made for its model to become a GGUF file, where `blockers` names something."""
    cures = ["`model.arch=portable`"] if blocking_features(arch) else []
    return f"a run with {', '.join([*cures, *_blocking_tokenizer(arch, digits).values()])} exports as GGUF"


def exports(arch: Architecture, *, digits: int = 1) -> dict[str, Export]:
    """Each target with whether it is possible, and why or why not (MODEL 2-4)."""
    blocking = blockers(arch, digits=digits)
    gguf = Export(True, _gguf_types(arch))
    stock = Export(True, "every feature folds into a stock architecture")
    if names := blocking[GGUF]:
        cure = gguf_cure(arch, digits=digits)
        gguf = Export(False, f"no program that reads GGUF has {', '.join(names)}; {cure}")
    if names := blocking[TRANSFORMERS]:
        cure = "`model.arch=portable` has none of it"
        stock = Export(False, f"no stock architecture has {', '.join(names)}; {cure}")
    return {
        GGUF: gguf,
        TRANSFORMERS: stock,
        REMOTE_CODE: Export(True, "the model's own code goes with it: readers must set `trust_remote_code`"),
    }


def row_widths(arch: Architecture) -> tuple[int, ...]:
    """Weights in the rows of the matrices."""
    return arch.hidden_size, arch.head_dim * arch.num_attention_heads, arch.intermediate_size


def _gguf_types(arch: Architecture) -> str:
    """Which types the rows of the matrices are long enough for."""
    widths = row_widths(arch)
    if any(width % 32 for width in widths):
        return "quantised rows need widths that are multiples of 32: matrices of other widths stay F16"
    if all(width % 256 for width in widths):
        return "all but K-quants, whose rows need widths that are multiples of 256"
    if any(width % 256 for width in widths):
        return "K-quants need widths that are multiples of 256: matrices of other widths get another type"
    return "every feature folds into a stock architecture"
