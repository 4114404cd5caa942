"""Logits to tokens, one row per request.

A row's token depends on its own logits, settings and random numbers only: never on which requests share the batch.
Letters: B rows of the batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from picollm.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How one request is decoded.

    Args:
        temperature: 0 takes the most likely token (greedy); larger is more varied.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the most likely tokens that together reach this probability (Holtzman et al. 2020,
            arXiv:1904.09751); at least one token stays.
        max_new_tokens: longest reply in tokens, tool block and its forced result included.
        seed: seeds the request's own generator; equal seeds give equal replies whatever else is decoded.
        require_text: the reply may not end before it holds a visible character.

    Raises:
        ConfigError: a value is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 256
    seed: int = 0
    require_text: bool = False

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < float("inf"), "a number from 0 (greedy) up"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        )
        for name, holds, range_ in rules:
            if not holds:
                found = getattr(self, name)
                raise ConfigError(f"`{name}` must be {range_}", cause=f"it is {found}", hint="choose a value in range")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self) -> torch.Generator | None:
        """A fresh generator for one request (always on the CPU, so that devices agree); None where none is needed."""
        return None if self.greedy else torch.Generator().manual_seed(self.seed)


def choose(
    logits: Float[Tensor, "B V"], settings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[int]:
    """The next token of every row.

    The most likely token of all rows is found in one operation; only rows with a temperature are sampled, those with
    equal settings together.

    Args:
        settings: one per row.
        generators: one per row, from `Sampling.generator`; each sampled row draws exactly one number from its own.
    """
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    groups: dict[tuple[float, int | None, float | None], list[int]] = {}
    for row, sampling in enumerate(settings):
        if not sampling.greedy:
            groups.setdefault((sampling.temperature, sampling.top_k, sampling.top_p), []).append(row)
    for (temperature, top_k, top_p), rows in groups.items():
        chosen = logits if len(rows) == len(tokens) else logits[rows]
        draws = torch.stack([torch.rand((), generator=generators[row], dtype=torch.float64) for row in rows])
        for row, token in zip(rows, sample(chosen, draws, temperature, top_k=top_k, top_p=top_p).tolist(), strict=True):
            tokens[row] = token
    return tokens


def sample(
    logits: Float[Tensor, "B V"],
    draws: Float[Tensor, " B"],
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Tokens (B,) by inverting the cumulative distribution, in order of the vocabulary, at `draws` in [0, 1).

    top-k applies before top-p, both after the temperature. Float64 on the CPU: the sum of a large vocabulary stays
    exact enough that the last token is not favoured.
    """
    logits = logits.detach().to("cpu", torch.float64)
    # Subtracting the maximum first keeps tiny temperatures finite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, ids = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, values)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ordered.masked_fill(before >= top_p, 0))
    cumulative = probabilities.cumsum(dim=-1)
    # right=True skips tokens of probability zero; just below the total no rounding can step over the last token.
    total = cumulative[:, -1:]
    at = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1)
