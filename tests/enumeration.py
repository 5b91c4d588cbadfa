"""Every ordered draw of n cells from K with its exact probability: what unbiasedness is proved with."""

import itertools

import torch
from torch import Tensor


def attention_logits(kind: str, cells: int) -> Tensor:
    """Logits (K,) float64 of a flat, a peaked or a random attention."""
    if kind == "flat":
        return torch.zeros(cells, dtype=torch.float64)
    if kind == "peaked":
        return -3.0 * torch.arange(cells, dtype=torch.float64).flip(0)
    generator = torch.Generator().manual_seed(cells)
    return 1.5 * torch.randn(cells, dtype=torch.float64, generator=generator)


def ordered_draws(cells: int, n: int, *, replace: bool = False) -> Tensor:
    """All draws (M, n): K^n with replacement, K!/(K − n)! without."""
    outcomes = itertools.product(range(cells), repeat=n) if replace else itertools.permutations(range(cells), n)
    return torch.tensor(list(outcomes))


def mass_left(attention: Tensor, draws: Tensor) -> Tensor:
    """m_k (M, n): the attention (M, K) of the cells not among a draw's first k − 1, summed and not subtracted."""
    chosen = torch.nn.functional.one_hot(draws, attention.shape[-1])  # (M, n, K)
    before = chosen.cumsum(1) - chosen
    return ((1 - before) * attention.unsqueeze(1)).sum(-1)


def step_probabilities(attention: Tensor, draws: Tensor, *, replace: bool = False) -> Tensor:
    """P(q_k | q_1..q_{k−1}) (M, n) under the attention (M, K), differentiable in it."""
    drawn = attention.gather(1, draws)
    return drawn if replace else drawn / mass_left(attention, draws)


def enumerate_draws(attention: Tensor, n: int, *, replace: bool = False) -> tuple[Tensor, Tensor]:
    """All draws (M, n) from the attention (K,) and their probabilities (M,), float64, which sum to 1."""
    draws = ordered_draws(len(attention), n, replace=replace)
    rows = attention.double().expand(len(draws), -1)
    return draws, step_probabilities(rows, draws, replace=replace).prod(-1)
