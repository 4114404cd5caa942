from __future__ import annotations

import pytest
import torch

from picollm.errors import ConfigError
from picollm.generate.sampler import Sampling, choose, sample


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequencies(probabilities: list[float], count: int = 20_000, **settings: object) -> list[float]:
    """How often each token comes out of `count` draws at temperature 1."""
    logits = torch.tensor(probabilities).log().expand(count, -1)
    settings = {"temperature": 1.0, **settings}
    tokens = sample(logits, draws(count), **settings)  # type: ignore[arg-type]
    return (torch.bincount(tokens, minlength=len(probabilities)) / count).tolist()


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose(logits, [Sampling(), Sampling()], [None, None]) == [1, 0]


def test_frequencies_are_the_probabilities() -> None:
    assert frequencies([0.1, 0.6, 0.3]) == pytest.approx([0.1, 0.6, 0.3], abs=0.015)


def test_temperature_sharpens() -> None:
    # p^2 normalised: .01, .36, .09 over .46
    assert frequencies([0.1, 0.6, 0.3], temperature=0.5) == pytest.approx([0.0217, 0.7826, 0.1957], abs=0.015)


def test_tiny_temperature_is_greedy_and_finite() -> None:
    assert sample(torch.tensor([[1.0, 2.0, 3.0]]), draws(1), 1e-9).tolist() == [2]


def test_top_k_keeps_exactly_k_even_when_tied() -> None:
    found = frequencies([0.25, 0.25, 0.25, 0.25], top_k=2)
    assert sum(share > 0 for share in found) == 2
    assert frequencies([0.1, 0.5, 0.4], top_k=2) == pytest.approx([0, 0.556, 0.444], abs=0.015)
    assert frequencies([0.1, 0.5, 0.4], top_k=1) == [0, 1, 0]


def test_top_k_beyond_the_vocabulary_changes_nothing() -> None:
    assert frequencies([0.1, 0.9], top_k=50) == frequencies([0.1, 0.9])


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert frequencies([0.1, 0.6, 0.3], top_p=0.7) == pytest.approx([0, 0.667, 0.333], abs=0.015)
    assert frequencies([0.1, 0.6, 0.3], top_p=0.01) == [0, 1, 0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, edges, 1.0).tolist() == [1, 3]


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    settings = [
        Sampling(temperature=1.0, seed=1),
        Sampling(),
        Sampling(temperature=1.0, seed=2, top_k=5),
        Sampling(temperature=0.7, seed=3, top_p=0.8),
        Sampling(temperature=1.0, seed=4),
        Sampling(temperature=1.0, seed=1, top_k=5, top_p=0.5),
    ]
    together = choose(logits, settings, [s.generator() for s in settings])
    alone = [choose(logits[i : i + 1], [s], [s.generator()])[0] for i, s in enumerate(settings)]
    assert together == alone


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)  # type: ignore[arg-type]
    assert next(iter(values)) in caught.value.message
