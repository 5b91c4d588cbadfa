"""The variance of what draws within draws estimate, and how much of it is each level's.

With φ̂_k the estimate of region k and v̂_k that of its variance, Durbin's rule (1953) makes an unbiased estimate of the
whole's variance from the outer draw's own V̂, which takes the φ̂_k as if they were exact, and recurses:

    V̂ = V̂_outer(φ̂) + Σ_k w_k a_k v̂_k           drawn without replacement, the unordered estimator
    V̂ = V̂_outer(φ̂)                              with replacement

Given the regions, the inner draws are independent: Σ_k w_k² v̂_k of V̂ is from within them, the rest from between them.
The ordered estimator has no such rule here: its E_k share the errors of the regions before.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ats.pooling import estimate_pooled
from ats.samples import CellSample, Estimator
from ats_kernels.pooling.variance import Estimate


class LevelEstimate(NamedTuple):
    """An estimate of draws within draws.

    Attributes:
        value: (B, …).
        variance: (B, …) of the value, unbiased.
        parts: (L, B, …) of the variance, each unbiased: what would be left if all inside of a level's cells were known,
            less what would be if its own were too. One of them may come out negative.
    """

    value: Tensor
    variance: Tensor
    parts: Tensor


def estimate_parts(
    features: Tensor, levels: Sequence[CellSample], *, estimator: Estimator = "unordered"
) -> LevelEstimate:
    """Estimate Φ from the patches of draws within draws, with the variance by levels; as `estimate_levels`."""
    if estimator == "ordered" and len(levels) > 1 and not levels[0].replace:
        raise ValueError(
            "the ordered estimator of draws within draws has no standard error: its terms share the errors of the "
            "regions drawn before; use estimator='unordered', which has less variance"
        )
    value, variance = estimate_pooled(features, levels[-1], estimator=estimator)
    found = LevelEstimate(value, variance, variance.unsqueeze(0))
    for level in reversed(levels[:-1]):
        found = join_regions(found, level, estimator=estimator)
    return found


def join_regions(inner: LevelEstimate, level: CellSample, *, estimator: Estimator) -> LevelEstimate:
    """The estimate of a level from those of its regions (R, …), by Durbin's rule."""
    shape = tuple(level.indices.shape)
    weights, attention = level.weights(estimator).double(), level.log_attention.detach().double().exp()
    value, variance = estimate_pooled(inner.value.unflatten(0, shape), level, estimator=estimator)
    if not level.replace:
        within = inner.variance.unflatten(0, shape)  # (B, n, …) of each region's estimate
        variance = variance + torch.einsum("bn,bn...->b...", weights * attention, within)
    deeper = torch.einsum("bn,lbn...->lb...", weights.square(), inner.parts.unflatten(1, shape))
    return LevelEstimate(value, variance, torch.cat([(variance - deeper.sum(0)).unsqueeze(0), deeper]))


def estimate_levels(features: Tensor, levels: Sequence[CellSample], *, estimator: Estimator = "unordered") -> Estimate:
    """Estimate Φ from the patches of draws within draws, with an unbiased estimate of the variance.

    Args:
        features: (R, n, …) of the last level's patches.
        levels: every draw, the outermost first, each of at least two.
        estimator: "unordered", or "ordered" of cells drawn with replacement.

    Returns:
        `ats.Estimate`: value and variance (B, …) in float64. Nothing of it is differentiable.

    Source: Durbin, "Some results in sampling theory when the units are selected with unequal probabilities", 1953.
    """
    found = estimate_parts(features, levels, estimator=estimator)
    return Estimate(found.value, found.variance)
