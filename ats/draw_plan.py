"""Regions or patches: how many draws a level lower the error most, for what they cost.

With σ_d² what the cells of level d add to the variance, a draw each, and c_d the time that reading one takes,

    V = σ_0²/n_0 + σ_1²/(n_0 n_1) + …          time = n_0 (c_0 + n_1 (c_1 + …))

the least variance for the time has n_d = √(c_{d−1}/c_d) · σ_d/σ_{d−1} draws in each cell of the level before, whatever
n_0 is: it is what there is time for.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ats_kernels.checks import check_count, check_number

STEP = 2.0
"""The most that draws of a level change by from one image to the next."""

LEAST = 4
"""Regions that are left at least, where the model's own draws leave as many."""


class DrawPlan:
    """How many cells to draw in each region, from what earlier images showed: a running estimate.

    Pass one plan to `ats.anytime` of image after image. The draws of an image depend on the images before alone, never
    on what was drawn of itself, so that its estimate is as unbiased as with any other number; then it is learned from.

    Args:
        seconds: what reading a cell of each level takes: of all but the last level a region's crop and its attention,
            of the last one a patch and its features. Measured where None, and then draws depend on the machine.
        keep: of what is known, the share that stays when an image is added; 1 forgets nothing.
        most: draws of a level in a region at most.
    """

    def __init__(self, *, seconds: Sequence[float] | None = None, keep: float = 0.95, most: int = 64) -> None:
        if seconds is not None and (len(seconds) < 2 or min(check_number("seconds", one) for one in seconds) <= 0):
            raise ValueError(f"seconds are above 0, one number a level, of two levels or more, got {seconds}")
        if not 0 < check_number("keep", keep) <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}; 0.95 remembers about twenty images")
        self.fixed = None if seconds is None else tuple(float(one) for one in seconds)
        self.keep, self.most = float(keep), check_count("most", most, least=2)
        self.images = 0
        self._variances: Tensor | None = None  # (L,) σ_d², decaying sums
        self._spent: dict[int, tuple[float, float]] = {}  # by level, decaying sums of seconds and of cells
        self._last: tuple[int, ...] = ()

    @property
    def seconds(self) -> tuple[float, ...] | None:
        """What reading a cell of each level takes; None where it is not known yet."""
        if self.fixed is not None:
            return self.fixed
        levels = sorted(self._spent)
        if len(levels) < 2 or levels != list(range(len(levels))):
            return None
        return tuple(spent / count for spent, count in (self._spent[level] for level in levels))

    @property
    def variances(self) -> tuple[float, ...] | None:
        """σ_d² of each level, the mean over images and classes; None before the first image."""
        if self._variances is None:
            return None
        share = self.images if self.keep == 1 else (1 - self.keep**self.images) / (1 - self.keep)
        return tuple((self._variances / share).tolist())

    def inner(self, n: Sequence[int]) -> tuple[int, ...]:
        """Draws of each level but the first, of a model whose levels draw `n`: its own before an image was seen."""
        last = self._last or tuple(n[1:])
        if len(last) != len(n) - 1 or (self.fixed is not None and len(self.fixed) != len(n)):
            raise ValueError(
                f"the plan is of {len(self.fixed or last) + (not self.fixed)} levels, the model has {len(n)}"
            )
        variances, seconds = self.variances, self.seconds
        if variances is None or seconds is None:
            return last
        draws = []
        for depth, before in enumerate(last, 1):
            outer, own = max(variances[depth - 1], 0.0), max(variances[depth], 0.0)
            if outer > 0:
                best = math.sqrt(seconds[depth - 1] / seconds[depth] * own / outer)
            else:
                best = math.inf if own > 0 else float(before)
            best = min(max(best, before / STEP), before * STEP)
            draws.append(min(max(round(best), 2), self.most))
        return tuple(draws)

    def draws(self, n: Sequence[int], budget: int | None = None) -> tuple[int, ...]:
        """Draws of every level in the time of a budget, as `n_patches` of `ats.predict` takes them.

        Args:
            n: draws of each level that the model has.
            budget: patches by those draws, whose time is to be spent otherwise; all of them where None.

        Returns:
            Those of `inner`, or fewer where they would leave less than four regions, which say little of the error.
        """
        own = tuple(check_count("n", one) for one in n)
        regions = (math.prod(own) if budget is None else check_count("budget", budget)) / math.prod(own[1:])
        inner, seconds = list(self.inner(own)), self.seconds
        if seconds is None:
            return int(regions * math.prod(own[1:]) / math.prod(inner)), *inner
        time = regions * _region(seconds, own[1:])
        while _region(seconds, inner) * min(LEAST, int(regions)) > time and max(inner) > 2:
            inner[inner.index(max(inner))] -= 1
        return int(time / _region(seconds, inner) + 1e-9), *inner

    def add(self, parts: Tensor, n: Sequence[int], counts: Tensor) -> None:
        """Learn from images.

        Args:
            parts: (L, B, …) of the variance of their estimates, as `ats.nested_variance.estimate_parts` has them.
            n: draws of each level but the first.
            counts: (B,) those of the first.
        """
        each = parts.flatten(2).mean(-1).double().cpu()  # (L, B)
        times = torch.tensor([1, *n], dtype=torch.float64, device="cpu").cumprod(0).unsqueeze(1) * counts.double().cpu()
        for variances in (each * times).unbind(1):
            self._variances = variances if self._variances is None else self.keep * self._variances + variances
            self.images += 1
        self._last = tuple(n)

    @contextmanager
    def timed(self, level: int, cells: int) -> Iterator[None]:
        """Measure how long reading so many cells of a level takes."""
        _wait()
        start = time.perf_counter()
        yield
        _wait()
        spent, count = self._spent.get(level, (0.0, 0.0))
        self._spent[level] = (
            self.keep * spent + time.perf_counter() - start,
            self.keep * count + cells,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(images={self.images}, variances={self.variances}, seconds={self.seconds})"


def _region(seconds: Sequence[float], n: Sequence[int]) -> float:
    """What a region of the first level takes, with so many draws of each level in it."""
    total = 0.0
    for depth in reversed(range(len(seconds))):
        total = seconds[depth] + (n[depth] * total if depth < len(n) else 0.0)
    return total


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
