"""The kernels' launches as operators that `torch.compile` does not look into: it has no numbers of what it traces as
symbols."""

import torch
from torch import Tensor

from ats_kernels.checks import compute_dtype
from ats_kernels.pooling import triton as launchers


@torch.library.custom_op(
    "ats_kernels::expectation",
    mutates_args=(),
    schema="(Tensor features, Tensor log_attention, bool replace, bool unordered) -> (Tensor, Tensor)",
)
def pool(features: Tensor, log_attention: Tensor, replace: bool, unordered: bool) -> tuple[Tensor, Tensor]:
    """Φ̂ (B, D) and the weights (B, N) from features (B, N, D)."""
    return launchers.expectation_triton(features, log_attention, replace=replace, unordered=unordered)


@pool.register_fake
def _(features: Tensor, log_attention: Tensor, replace: bool, unordered: bool) -> tuple[Tensor, Tensor]:
    pooled = torch.empty((features.shape[0], features.shape[2]), dtype=features.dtype, device=features.device)
    dtype = compute_dtype(features.dtype, log_attention.dtype)
    return pooled, torch.empty(log_attention.shape, dtype=dtype, device=features.device)


@torch.library.custom_op(
    "ats_kernels::expectation_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor features, Tensor weights, bool needs_features, bool needs_log_attention, "
    "bool weighted) -> (Tensor, Tensor)",
)
def backward(
    grad_out: Tensor,
    features: Tensor,
    weights: Tensor,
    needs_features: bool,
    needs_log_attention: bool,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """`expectation_backward_triton`, with an empty tensor for what is not needed."""
    found = launchers.expectation_backward_triton(
        grad_out,
        features,
        weights,
        needs_features=needs_features,
        needs_log_attention=needs_log_attention,
        weighted=weighted,
    )
    empty = _backward_like(features, weights, False, False)
    grad_features, grad_log_attention = (kept if got is None else got for got, kept in zip(found, empty, strict=True))
    return grad_features, grad_log_attention


@backward.register_fake
def _(
    grad_out: Tensor,
    features: Tensor,
    weights: Tensor,
    needs_features: bool,
    needs_log_attention: bool,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    return _backward_like(features, weights, needs_features, needs_log_attention)


def _backward_like(
    features: Tensor, weights: Tensor, needs_features: bool, needs_log_attention: bool
) -> tuple[Tensor, Tensor]:
    shape = features.shape if needs_features else (0,)
    grad_features = torch.empty(shape, dtype=features.dtype, device=features.device)
    return grad_features, torch.empty_like(weights) if needs_log_attention else weights.new_empty((0,))


@torch.library.custom_op(
    "ats_kernels::centred_coefficients",
    mutates_args=(),
    schema="(Tensor inner, Tensor weights, Tensor log_attention, bool replace, str estimator) -> Tensor",
)
def coefficients(inner: Tensor, weights: Tensor, log_attention: Tensor, replace: bool, estimator: str) -> Tensor:
    """`coefficients_triton`."""
    return launchers.coefficients_triton(inner, weights, log_attention, replace=replace, estimator=estimator)


@coefficients.register_fake
def _(inner: Tensor, weights: Tensor, log_attention: Tensor, replace: bool, estimator: str) -> Tensor:
    return torch.empty(log_attention.shape, dtype=log_attention.dtype, device=log_attention.device)


@torch.library.custom_op(
    "ats_kernels::unordered_weights",
    mutates_args=(),
    schema="(Tensor log_attention, ScalarType dtype) -> Tensor",
)
def unordered_weights(log_attention: Tensor, dtype: torch.dtype) -> Tensor:
    """`unordered_weights_triton`."""
    return launchers.unordered_weights_triton(log_attention, dtype)


@unordered_weights.register_fake
def _(log_attention: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(log_attention.shape, dtype=dtype, device=log_attention.device)
