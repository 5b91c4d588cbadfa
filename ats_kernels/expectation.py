"""Estimate Φ = Σ_i a_i f_i, the attention's expectation of the features, from N drawn cells.

    Φ̂ = Σ_k w_k f_{q_k}          w_k = 1/N                            with replacement (paper, eq. 4)
                                  w_k = (m_k + (N − k) a_{q_k}) / N    without (paper, eq. 13-17)

where ``m_k = 1 − Σ_{j<k} a_{q_j}`` is the mass still there at draw k. Σ_k w_k = 1, and Φ̂ is unbiased.
The gradient is taken in log space with the weights held fixed,

    ∂Φ̂/∂f_{q_k} = w_k            ∂Φ̂/∂log a_{q_k} = w_k f_{q_k}

which estimates ∂Φ/∂θ = Σ_i ∂(a_i f_i)/∂θ without bias for either way of drawing: the terms of that sum are
a_i (f_i ∂log a_i + ∂f_i), and Σ_k w_k h_{q_k} is unbiased for Σ_i a_i h_i whatever h is. It is not the
derivative of Φ̂'s formula, whose expectation is another quantity.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ats_kernels._backend import backend_for
from ats_kernels._checks import check_choice, check_floating, compute_dtype

ESTIMATORS = ("ordered",)


def estimator_weights_ref(log_attention: Tensor, *, replace: bool = False) -> Tensor:
    """The weights w (B, N) in float64 from log a (B, N) in draw order, without a gradient."""
    log_a = log_attention.detach().double()
    n = log_a.shape[1]
    if replace:
        return torch.full_like(log_a, 1 / n) + 0 * log_a  # a row of NaN stays one
    attention = log_a.exp()
    # 1 − Σ_{j<k} a_{q_j}, with the largest a_{q_p} taken off as −expm1(log a): a rounded 1 − a would lose a
    # remainder below 1e-16, and the first draw of peaked attention leaves less than that.
    largest = log_a.argmax(-1, keepdim=True)  # (B, 1)
    others = attention.scatter(-1, largest, 0.0)
    before = others.cumsum(-1) - others  # exclusive: of the cells before k, less the largest
    drawn = torch.arange(n, device=log_a.device) > largest  # (B, N): whether the largest is among them
    remaining = torch.where(drawn, -torch.expm1(log_a.gather(-1, largest)), 1.0) - before
    remaining = torch.maximum(remaining, attention)  # the mass left holds at least the cell drawn next
    later = torch.arange(n - 1, -1, -1, device=log_a.device)  # N − k
    return (remaining + later * attention) / n


def expectation_ref(features: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k f_k over dim 1: features (B, N, …), weights (B, N) -> (B, …), accumulated in float32 or float64."""
    flat = _flat(features).to(weights.dtype)  # (B, N, D)
    pooled = torch.bmm(weights.unsqueeze(1), flat)  # (B, 1, D)
    return pooled.view(features.shape[:1] + features.shape[2:]).to(features.dtype)


def _flat(features: Tensor) -> Tensor:
    if features.ndim == 3:
        return features
    return features.reshape(*features.shape[:2], math.prod(features.shape[2:]))  # (B, N, D)


def _estimator_weights_cpu(log_attention: Tensor, *, replace: bool = False) -> Tensor:
    """`estimator_weights_ref` in fewer and cheaper operators: at B = 16, N = 10 their number is what costs."""
    log_a = log_attention.detach().double()
    n = log_a.shape[1]
    if replace:
        return log_a * 0 + 1 / n  # a row of NaN stays one
    attention = log_a.exp()
    # Only a cell of more than half of the mass can leave so little that 1 − a loses it; there is at most one.
    # Before it 1 − Σ a is left, after it 0 − Σ e, where e is a for the others and a − 1 for that one.
    peak = attention > 0.5
    taken = torch.where(peak, log_a.expm1(), attention)
    whole = peak.cumsum(-1) <= peak  # (B, N): no peak before k
    remaining = (taken - taken.cumsum(-1)).add_(whole)  # less the exclusive sum
    remaining = torch.maximum(remaining, attention, out=remaining)  # it holds at least the cell drawn next
    later = torch.arange(n - 1, -1, -1, dtype=torch.float64, device=log_a.device)  # N − k
    return remaining.addcmul_(attention, later).div_(float(n))


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A batched product under autocast would round the weights to half precision."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class _Expectation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, log_attention: Tensor, replace: bool, backend: str) -> Tensor:
        ctx.log_attention_dtype, ctx.backend = log_attention.dtype, backend
        if backend == "triton":
            from ats_kernels.expectation_triton import expectation_triton

            pooled, weights = expectation_triton(_flat(features), log_attention, replace=replace)
            pooled = pooled.view(features.shape[:1] + features.shape[2:])
        else:
            weigh = _estimator_weights_cpu if backend == "cpu" else estimator_weights_ref
            weights = weigh(log_attention, replace=replace).to(compute_dtype(features.dtype, log_attention.dtype))
            with _without_autocast(features):
                pooled = expectation_ref(features, weights)
        ctx.save_for_backward(features, weights)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        features, weights = ctx.saved_tensors
        needs_features, needs_log_attention = ctx.needs_input_grad[:2]
        grad_features = grad_log_attention = None
        grad = _flat(grad_out.unsqueeze(1))  # (B, 1, D)
        if ctx.backend == "triton":
            from ats_kernels.expectation_triton import expectation_backward_triton

            grad_features, grad_log_attention = expectation_backward_triton(
                grad.squeeze(1),
                _flat(features),
                weights,
                log_attention_dtype=ctx.log_attention_dtype,
                needs_features=needs_features,
                needs_log_attention=needs_log_attention,
            )
            return None if grad_features is None else grad_features.view(features.shape), grad_log_attention, None, None
        grad = grad.to(weights.dtype)
        if needs_features:
            grad_features = (weights.unsqueeze(-1) * grad).view(features.shape).to(features.dtype)
        if needs_log_attention:
            with _without_autocast(features):
                inner = torch.bmm(_flat(features).to(weights.dtype), grad.transpose(1, 2)).squeeze(-1)  # (B, N)
            grad_log_attention = (weights * inner).to(ctx.log_attention_dtype)
        return grad_features, grad_log_attention, None, None


def estimator_weights(log_attention: Tensor, *, replace: bool = False, estimator: str = "ordered") -> Tensor:
    """The weights w with which `expectation` pools features; constants to autograd.

    Args:
        log_attention: (B, N) log a of the drawn cells, in draw order, as `sample` returns it.
        replace: whether they were drawn with replacement.
        estimator: "ordered", the paper's.

    Returns:
        (B, N) of log_attention's dtype (float32 at least); each row sums to 1.

    Raises:
        TypeError: log_attention that is not floating point.
        ValueError: log_attention that is not (B, N) with N ≥ 1; an unknown estimator.

    Source: paper, eq. 4 and 13-17; without replacement also Des Raj, 1956.
    """
    _check_log_attention(log_attention)
    check_choice("estimator", estimator, ESTIMATORS)
    weigh = estimator_weights_ref if backend_for(log_attention) == "reference" else _estimator_weights_cpu
    return weigh(log_attention, replace=replace).to(compute_dtype(log_attention.dtype))


def expectation(
    features: Tensor, log_attention: Tensor, *, replace: bool = False, estimator: str = "ordered"
) -> Tensor:
    """Pool the features of drawn cells into an unbiased estimate of Σ_i a_i f_i over all cells.

    Args:
        features: (B, N, …) floating point, of the drawn cells in draw order.
        log_attention: (B, N) log a of the same cells, as `sample` returns it.
        replace: whether they were drawn with replacement.
        estimator: "ordered", the paper's.

    Returns:
        (B, …) of the features' dtype. Its gradient with respect to both arguments makes the gradient of the
        whole model unbiased; there is no second derivative.

    Raises:
        TypeError: arguments that are not floating point.
        ValueError: features that are not (B, N, …), a log_attention that does not match them in batch, draws
            and device, an unknown estimator.

    Source: paper, eq. 4, 12 and 13-17.
    """
    check_floating("features", features)
    _check_log_attention(log_attention)
    check_choice("estimator", estimator, ESTIMATORS)
    if features.ndim < 2 or features.shape[:2] != log_attention.shape:
        raise ValueError(
            f"features must be (B, N, …) with (B, N) = {tuple(log_attention.shape)} as log_attention has, got "
            f"{tuple(features.shape)}; patches that went through a network as one batch need "
            "features.unflatten(0, (B, N))"
        )
    if features.device != log_attention.device:
        raise ValueError(
            f"features are on {features.device} but log_attention is on {log_attention.device}; move one to the other"
        )
    return _Expectation.apply(features, log_attention, replace, backend_for(features))


def _check_log_attention(log_attention: Tensor) -> None:
    check_floating("log_attention", log_attention)
    if log_attention.ndim != 2 or log_attention.shape[1] == 0:
        raise ValueError(f"log_attention must be (B, N) with N ≥ 1, got {tuple(log_attention.shape)}")
