"""What a model can be exported to, computed from its architecture; the reason where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from picollm.config.model import Architecture

GGUF = "gguf"
TRANSFORMERS = "transformers"
REMOTE_CODE = "transformers (remote code)"
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
            or into threes, and knows no pairs.
    """
    stock = blocking_features(arch)
    pairs = [f"tokens of {digits} digits (`tokenizer.digits`)"] if digits == 2 else []
    return {GGUF: [*stock, *pairs], TRANSFORMERS: stock, REMOTE_CODE: []}


def exports(arch: Architecture, *, digits: int = 1) -> dict[str, Export]:
    """Each target with whether it is possible, and why or why not (MODEL 2-4)."""
    blocking = blockers(arch, digits=digits)
    return {
        GGUF: _stock(blocking[GGUF], _gguf_types(arch), "no program that reads GGUF has"),
        TRANSFORMERS: _stock(
            blocking[TRANSFORMERS], "every feature folds into a stock architecture", "no stock architecture has"
        ),
        REMOTE_CODE: Export(True, "the model's own code goes with it: readers must set `trust_remote_code`"),
    }


def _stock(blocking: list[str], reason: str, nobody_has: str) -> Export:
    if not blocking:
        return Export(True, reason)
    cure = "`model.arch=portable` has none of it" if len(blocking) > 1 or "digits" not in blocking[0] else None
    cure = cure or "train the tokenizer with `tokenizer.digits=1`"
    return Export(False, f"{nobody_has} {', '.join(blocking)}; {cure}")


def _gguf_types(arch: Architecture) -> str:
    """Which types the rows of the matrices are long enough for."""
    widths = (arch.head_dim * arch.num_attention_heads, arch.hidden_size, arch.intermediate_size)
    if any(width % 32 for width in widths):
        return "quantised rows need widths that are multiples of 32: matrices of other widths stay F16"
    if any(width % 256 for width in widths):
        return "all but K-quants, whose rows need widths that are multiples of 256"
    return "every feature folds into a stock architecture"
