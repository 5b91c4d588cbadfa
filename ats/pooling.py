"""Pool the features of a sample as is right for the way it was drawn."""

import torch
from torch import Tensor

from ats.samples import CellSample, Estimator
from ats_kernels import expectation
from ats_kernels.checks import check_drawn_features, check_floating, compute_dtype
from ats_kernels.pooling.op import check_estimator
from ats_kernels.pooling.variance import Estimate, estimate


def pool(
    features: Tensor, sample: CellSample, *, estimator: Estimator = "ordered", control_variate: bool = False
) -> Tensor:
    """Pool features of a sample into an estimate of Σ_i a_i f_i over all cells, as is right for how it was drawn.

    - Drawn without replacement or with: `ats.expectation`, unbiased, and so is its gradient.
    - The most probable cells ("topk") are no random draw: they are weighted by their attention, scaled to sum to 1.
    - An image of which all live cells were read, with draws left over: the sum itself.

    Args:
        features: (B, N, …) floating point, of the patches in draw order.
        sample: `PatchSample`, or the `CellSample` that it was read for.
        estimator, control_variate: as in `ats.expectation`, for what was drawn at random.

    Returns:
        (B, …) of the features' dtype.
    """
    if not isinstance(sample, CellSample):
        raise TypeError(
            f"sample must be what ats.sample_patches or ats.sample_cells gave, got {type(sample).__name__}; plain "
            "tensors are pooled by ats.expectation"
        )
    replace, log_attention = sample.replace, sample.log_attention
    check_estimator(estimator, replace=replace)
    if sample.selection == "topk":
        return _weighted(features, log_attention, log_attention.softmax(-1))
    if not sample.padded:
        return expectation(
            features, log_attention, replace=replace, estimator=estimator, control_variate=control_variate
        )
    short, full_rows = sample.split_short()
    drawn = expectation(features, full_rows, replace=replace, estimator=estimator, control_variate=control_variate)
    exact = _weighted(features, log_attention, log_attention.exp())
    return torch.where(short.view(-1, *[1] * (drawn.ndim - 1)), exact, drawn)


def estimate_pooled(features: Tensor, sample: CellSample, *, estimator: Estimator = "ordered") -> Estimate:
    """`ats.estimate` for a sample of any N ≥ 2 that was drawn at random: what `pool` gives, and its variance."""
    if sample.selection == "topk":
        raise ValueError("the most probable cells are no random draw, whose variance could be told; draw a sample")
    replace = sample.replace
    if not sample.padded:
        return estimate(features, sample.log_attention, replace=replace, estimator=estimator)
    short, log_attention = sample.split_short()
    value, variance = estimate(features, log_attention, replace=replace, estimator=estimator)
    log_attention = sample.log_attention.detach().double()
    exact = _weighted(features.detach().double(), log_attention, log_attention.exp())
    rows = short.view(-1, *[1] * (value.ndim - 1))
    return Estimate(torch.where(rows, exact, value), variance.masked_fill(rows, 0.0))


def _weighted(features: Tensor, log_attention: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k f_k (B, …), with the gradient of both."""
    check_floating("features", features)
    check_drawn_features(features, "the sample", weights)
    dtype = compute_dtype(features.dtype, log_attention.dtype)
    weights = weights.to(dtype).view(*weights.shape, *[1] * (features.ndim - 2))
    return (weights * features.to(dtype)).sum(1).to(features.dtype)
