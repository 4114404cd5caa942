"""The types a GGUF's matrices can have: their blocks, who writes them, and how far they may be off. Knows no torch.

Letters: KL is the Kullback-Leibler divergence of the exported model from ours, in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from picollm.errors import ConfigError, did_you_mean

K_BLOCK = 256
FALLBACK = "F16"


@dataclass(frozen=True)
class Quant:
    """One value of `--quant`.

    Attributes:
        tensor_type: of the matrices, as GGML names it; None where `llama-quantize` mixes several.
        file_type: name of `general.file_type`.
        block: a row must be a multiple of so many weights.
        bits: per weight, with the scales of blocks.
        max_error: of a tensor read back, root mean square relative to the tensor's own: rounding to the type gives less
            on any weights, another tensor or another scale more.
        max_kl: of a trained model. None: not bounded, only told.
    """

    name: str
    tensor_type: str | None
    file_type: str
    block: int
    bits: float
    max_error: float
    max_kl: float | None

    @property
    def is_float(self) -> bool:
        return self.block == 1

    @property
    def direct(self) -> bool:
        """True where picollm writes it itself."""
        return self.tensor_type is not None

    def fits(self, row: int) -> bool:
        """Whether rows of so many weights can be stored in it."""
        return row % self.block == 0


def _direct(name: str, block: int, bits: float, max_error: float, max_kl: float, file_type: str = "") -> Quant:
    return Quant(name, name, file_type or f"MOSTLY_{name}", block, bits, max_error, max_kl)


# In a block of 32 one outlier can be sqrt(32) times the root mean square, and the rounding error of n steps up to it is
# its share of sqrt(1/12): 5.7 / 127 / 3.5 for Q8_0.
DIRECT: dict[str, Quant] = {
    quant.name: quant
    for quant in (
        _direct("F32", 1, 32, 0.0, 1e-5, "ALL_F32"),
        _direct("F16", 1, 16, 5e-3, 1e-3),
        _direct("BF16", 1, 16, 4e-3, 5e-3),
        _direct("Q8_0", 32, 8.5, 0.015, 5e-3),
        _direct("Q5_1", 32, 6.0, 0.12, 0.1),
        _direct("Q5_0", 32, 5.5, 0.12, 0.1),
        _direct("Q4_1", 32, 5.0, 0.25, 0.4),
        _direct("Q4_0", 32, 4.5, 0.25, 0.4),
    )
}
# What `llama-quantize` makes: name -> bits per weight, about.
_BY_LLAMA_QUANTIZE = {
    "Q2_K": 3.0, "Q3_K_S": 3.6, "Q3_K_M": 4.0, "Q3_K_L": 4.3, "Q4_K_S": 4.7, "Q4_K_M": 4.9, "Q5_K_S": 5.6,
    "Q5_K_M": 5.7, "Q6_K": 6.6, "IQ3_XXS": 3.3, "IQ3_XS": 3.5, "IQ3_S": 3.7, "IQ3_M": 3.8, "IQ4_XS": 4.5,
    "IQ4_NL": 4.8,
}  # fmt: skip
QUANTS: dict[str, Quant] = DIRECT | {
    name: Quant(name, None, f"MOSTLY_{name}", 32 if name == "IQ4_NL" else K_BLOCK, bits, 0.6, None)
    for name, bits in _BY_LLAMA_QUANTIZE.items()
}
HOSTS = ("apertus", "qwen3")


def find_quant(name: str) -> Quant:
    """The type of that name, in either case.

    Raises:
        ConfigError: there is none.
    """
    if found := QUANTS.get(name.upper()):
        return found
    raise ConfigError(
        f"`{name}` is not a type of a GGUF file",
        cause=f"picollm writes {', '.join(DIRECT)}; `llama-quantize` makes {', '.join(_BY_LLAMA_QUANTIZE)}",
        hint=did_you_mean(name.upper(), list(QUANTS), "--quant ", otherwise="choose `--quant Q8_0`"),
    )


def find_host(name: str) -> str:
    """The stock architecture of that name.

    Raises:
        ConfigError: it is not one we fold into.
    """
    if name in HOSTS:
        return name
    raise ConfigError(
        f"`{name}` is not an architecture for a GGUF file",
        cause=f"picollm's models fold into {' or '.join(f'`{host}`' for host in HOSTS)}",
        hint=did_you_mean(name, list(HOSTS), "--arch ", otherwise="choose `--arch apertus`"),
    )
