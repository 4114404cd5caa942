"""What the probe measures at which size, and how one figure is written down."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shapes:
    """Sizes of every section; the defaults are those of GPU.md section 5, tests take tiny ones.

    Attributes:
        copy_bytes: read and written together. square: side of the matrices of the ceilings.
        tokens: rows of the GEMMs and of the pointwise kernels.
        widths: hidden sizes of GEMMs and attention. pointwise_widths: of the pointwise kernels.
        vocab_size, loss_rows: of head and loss. chunks: in how many parts the loss is taken.
        rows, row: B and T. head_dim: D. window: keys behind a query.
        depths: of the steps in sections 6, 7 and 8. batches: device batches of section 6.
        micro_steps: timed ones per variant. learn_steps: steps of the comparison of losses.
        repeats, warmup: of every timing but those of steps.
    """

    copy_bytes: int = 8_600_000_000
    square: int = 8192
    tokens: int = 65_536
    widths: tuple[int, ...] = (768, 1280, 1536)
    pointwise_widths: tuple[int, ...] = (768, 1536)
    vocab_size: int = 32_768
    loss_rows: int = 16_384
    chunks: tuple[int, ...] = (1, 4, 8)
    rows: int = 32
    row: int = 2048
    head_dim: int = 128
    window: int = 512
    depths: tuple[int, int, int] = (12, 20, 24)
    batches: tuple[int, ...] = (32, 64)
    micro_steps: int = 8
    learn_steps: int = 30
    repeats: int = 20
    warmup: int = 5

    @classmethod
    def of(cls, values: dict[str, Any]) -> Shapes:
        """From JSON, where tuples have become lists."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """One figure. `passed` is None where nothing is asked of it.

    Attributes:
        value: the figure, or words where the question is what, or why not.
        bound: what it must reach, `at_most` what it must not exceed.
    """

    name: str
    value: float | str
    unit: str = ""
    bound: float | None = None
    at_most: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    passed: bool | None = None

    def judged(self) -> Row:
        """With `passed` from the bounds."""
        passed = self.passed
        if isinstance(self.value, int | float) and (self.bound is not None or self.at_most is not None):
            passed = (self.bound is None or self.value >= self.bound) and (
                self.at_most is None or self.value <= self.at_most
            )
        return Row(**{**self.__dict__, "passed": passed})

    def to_json(self) -> dict[str, Any]:
        row = self.judged()
        value = float(f"{row.value:.5g}") if isinstance(row.value, float) else row.value
        return {**asdict(row), "value": value}
