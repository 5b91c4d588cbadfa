"""Variance and bias of each estimator: exactly, over every ordered draw of a few cells, and by Monte Carlo of many."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ats.experiments.study.methods import METHODS, estimate
from ats_kernels import sample


@dataclass(frozen=True)
class VarianceOptions:
    """What is measured. The logits are `sharpness` times standard normal numbers."""

    sharpness: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
    n_patches: tuple[int, ...] = (5, 10, 25, 50)
    cells: int = 100
    enumerated_n_patches: tuple[int, ...] = (2, 4)
    enumerated_cells: int = 6
    features: int = 16
    problems: int = 3  # attentions and features of each sharpness
    draws: int = 3000  # of each problem, by Monte Carlo
    seed: int = 0


QUICK = VarianceOptions(sharpness=(0.0, 4.0), n_patches=(5, 25), problems=1, draws=400)


@dataclass(frozen=True)
class Problem:
    """An attention (K,) in logarithms, features (K, D) of length 1 and a gradient g (D,) that arrives at Φ̂.

    Features are not negative, as a network's are that ends in a ReLU.
    """

    log_attention: Tensor
    features: Tensor
    direction: Tensor

    @property
    def pooled(self) -> Tensor:
        """Φ (D,)."""
        return self.log_attention.exp() @ self.features

    @property
    def gradient(self) -> Tensor:
        """The exact gradient of ⟨g, Φ⟩ to the logits (K,)."""
        attention, values = self.log_attention.exp(), self.features @ self.direction
        return attention * (values - attention @ values)


def make_problem(cells: int, features: int, sharpness: float, generator: torch.Generator) -> Problem:
    """A problem in float64."""
    normal = torch.randn(cells * (features + 1) + features, dtype=torch.float64, generator=generator, device="cpu")
    logits, rows, direction = normal.split([cells, cells * features, features])
    return Problem(
        (sharpness * logits).log_softmax(0),
        torch.nn.functional.normalize(rows.view(cells, features).relu()),
        direction,
    )


@dataclass
class Moments:
    """Sums over problems that the figures are made of; variances and squared lengths add up over coordinates."""

    variance: float = 0.0
    squared_bias: float = 0.0  # of the mean of the draws, which has a variance itself
    mean_variance: float = 0.0  # that one: 0 where every draw was visited
    squared_length: float = 0.0
    along: float = 0.0  # of the mean, along the exact one
    squared_mean: float = 0.0

    def add(self, estimates: Tensor, exact: Tensor, probability: Tensor | None) -> None:
        """Add the moments of estimates (R, M) of `exact` (M,), whose probabilities are given, or all the same."""
        rows = len(estimates)
        share = torch.full((rows,), 1 / rows, dtype=exact.dtype, device="cpu") if probability is None else probability
        mean = share @ estimates
        variance = float(share @ (estimates - mean).square().sum(1))
        if probability is None:
            variance *= rows / (rows - 1)
            self.mean_variance += variance / rows
        self.variance += variance
        self.squared_bias += float((mean - exact).square().sum())
        self.squared_length += float(exact.square().sum())
        self.along += float(mean @ exact)
        self.squared_mean += float(mean.square().sum())

    def summary(self) -> dict[str, float]:
        """Standard deviation and bias of one draw, and the bias's noise, as shares of the exact length.

        `along` is the part of the expectation that lies along the exact one, `cosine` that of the angle between them.
        """
        length = self.squared_length
        expected = max(self.squared_mean - self.mean_variance, 1e-300)
        return {
            "noise": (self.variance / length) ** 0.5,
            "bias": (max(0.0, self.squared_bias - self.mean_variance) / length) ** 0.5,
            "bias_noise": (self.mean_variance / length) ** 0.5,
            "along": self.along / length,
            "cosine": min(1.0, self.along / (expected * length) ** 0.5),
        }


@dataclass(frozen=True)
class Row:
    """What one method reached at one sharpness with one number of draws."""

    method: str
    how: str  # "enumerated" or "sampled"
    cells: int
    n_patches: int
    sharpness: float
    effective_cells: float  # exp(entropy), the geometric mean over the problems
    pooled: dict[str, float] = field(default_factory=dict)
    gradient: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def settings(options: VarianceOptions) -> list[tuple[str, int, int, float]]:
    """How, cells, draws an image and sharpness of each group of rows, in the order of `measure`."""
    enumerated = [("enumerated", options.enumerated_cells, n) for n in options.enumerated_n_patches]
    sampled = [("sampled", options.cells, n) for n in options.n_patches]
    return [(*group, sharpness) for group in enumerated + sampled for sharpness in options.sharpness]


def measure(options: VarianceOptions) -> Iterator[list[Row]]:
    """The rows of each of `settings`, one for each method."""
    for how, cells, n, sharpness in settings(options):
        pooled, gradient = ({name: Moments() for name in METHODS} for _ in range(2))
        entropies = []
        for number in range(options.problems):
            # The same problems for every number of draws: what differs between two rows is what they name.
            generator = torch.Generator().manual_seed(options.seed + 1000 * number)
            problem = make_problem(cells, options.features, sharpness, generator)
            entropies.append(float(torch.special.entr(problem.log_attention.exp()).sum()))
            for replace in (False, True):
                draws, probability = _draw(problem, n, replace, how, options.draws, generator)
                for name, method in METHODS.items():
                    if method.replace == replace:
                        estimates, gradients = estimate(
                            method, problem.log_attention, problem.features, problem.direction, draws
                        )
                        pooled[name].add(estimates, problem.pooled, probability)
                        gradient[name].add(gradients, problem.gradient, probability)
        effective = float(torch.tensor(entropies, device="cpu").mean().exp())
        yield [
            Row(name, how, cells, n, sharpness, effective, pooled[name].summary(), gradient[name].summary())
            for name in METHODS
        ]


def _draw(
    problem: Problem, n: int, replace: bool, how: str, rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Draws (R, N), and their probabilities where they are all that there are."""
    log_attention = problem.log_attention
    if how == "sampled":
        return sample(log_attention.expand(rows, -1), n, replace=replace, generator=generator).indices, None
    cells = range(len(log_attention))
    every = itertools.product(cells, repeat=n) if replace else itertools.permutations(cells, n)
    draws = torch.tensor(list(every), device="cpu")
    drawn = log_attention.exp()[draws]
    if replace:
        return draws, drawn.prod(1)
    chosen = torch.nn.functional.one_hot(draws, len(log_attention))  # (R, N, K)
    left = ((1 - chosen.cumsum(1) + chosen) * log_attention.exp()).sum(2)
    return draws, (drawn / left).prod(1)
