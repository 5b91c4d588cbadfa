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
from typing import Any, get_args

import torch
from torch import Tensor

from ats_kernels.backend import backend_for, is_transformed, wants_graph
from ats_kernels.checks import (
    Estimator,
    check_choice,
    check_drawn_features,
    check_flag,
    check_floating,
    check_log_probabilities,
    compute_dtype,
)
from ats_kernels.pooling.cpu import pool_cpu, pool_grad_cpu, pools_on_cpu, weigh_cpu, weighs_on_cpu
from ats_kernels.pooling.weights import centred_coefficients, estimator_weights_lean, estimator_weights_ref

ESTIMATORS = get_args(Estimator)


def expectation_ref(features: Tensor, weights: Tensor) -> Tensor:
    """The op in plain PyTorch, given the weights: what kernels are compared with. Arguments as `_weighted_sum`'s."""
    return _weighted_sum(features, weights)


def _weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k f_k over dim 1: features (B, N, …), weights (B, N) -> (B, …), accumulated in float32 or float64."""
    flat = _flat(features).to(weights.dtype)  # (B, N, D)
    pooled = torch.bmm(weights.unsqueeze(1), flat)  # (B, 1, D)
    return pooled.view(features.shape[:1] + features.shape[2:]).to(features.dtype)


def _flat(features: Tensor) -> Tensor:
    if features.ndim == 3:
        return features
    return features.reshape(*features.shape[:2], math.prod(features.shape[2:]))  # (B, N, D)


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A batched product under autocast would round the weights to half precision."""
    kind = tensor.device.type  # "meta" has no autocast
    active = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if active else contextlib.nullcontext()


class _Expectation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, log_attention: Tensor, how: tuple[bool, str, bool, str]) -> Tensor:
        ctx.replace, ctx.estimator, ctx.control_variate, ctx.backend = replace, estimator, _, backend = how
        ctx.by = pools_on_cpu(features, log_attention, unordered=estimator == "unordered") if backend == "cpu" else ""
        if backend == "triton":
            if torch.compiler.is_compiling():
                from ats_kernels.pooling.opaque import pool

                pooled, weights = pool(_flat(features), log_attention, replace, estimator == "unordered")
            else:
                from ats_kernels.pooling.triton import expectation_triton

                pooled, weights = expectation_triton(
                    _flat(features), log_attention, replace=replace, unordered=estimator == "unordered"
                )
            pooled = pooled.view(features.shape[:1] + features.shape[2:])
        elif ctx.by:
            pooled, weights = pool_cpu(features, log_attention, ctx.by, replace=replace, estimator=estimator)
        else:
            dtype = compute_dtype(features.dtype, log_attention.dtype)
            weights = _weigh(log_attention, dtype, replace=replace, estimator=estimator, backend=backend)
            with _without_autocast(features):
                pooled = _weighted_sum(features, weights)
        ctx.save_for_backward(features, log_attention, weights)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        features, log_attention, weights = ctx.saved_tensors
        if wants_graph():
            return *_gradients_again(grad_out, features, log_attention, weights), None
        needs_features, needs_log_attention = ctx.needs_input_grad[:2]
        if ctx.by:
            way = {"replace": ctx.replace, "estimator": ctx.estimator, "centred": ctx.control_variate}
            needs = needs_features, needs_log_attention
            both = pool_grad_cpu(grad_out, features, log_attention, weights, ctx.by, needs=needs, **way)
            return *both, None
        grad = _flat(grad_out.unsqueeze(1)).squeeze(1)  # (B, D)
        gradients = _gradients_triton if ctx.backend == "triton" else _gradients
        centred = ctx.control_variate and needs_log_attention
        grad_features, grad_log_attention = gradients(
            grad,
            features,
            weights,
            needs_features=needs_features,
            needs_log_attention=needs_log_attention,
            weighted=not centred,
        )
        if centred:
            assert grad_log_attention is not None
            centre = _centre_triton if ctx.backend == "triton" else centred_coefficients
            grad_log_attention = centre(
                grad_log_attention, weights, log_attention, replace=ctx.replace, estimator=ctx.estimator
            )
        if grad_log_attention is not None:
            grad_log_attention = grad_log_attention.to(log_attention.dtype)
        return grad_features, grad_log_attention, None


def _grown_weights(weights: Tensor, log_attention: Tensor) -> Tensor:
    """w (B, N), constant but for a factor a_{q_k} over its own value, which is 1.

    ∂w_k is then w_k ∂log a_{q_k}, and the derivative of Σ_k w_k h_{q_k} estimates that of Σ_i a_i h_i without bias. It
    has the same form again, with h_i ∂log a_i + ∂h_i in place of h_i, so that all derivatives do.
    """
    log_a = log_attention.to(weights.dtype)
    return weights.detach() * (log_a - log_a.detach()).exp()


def _gradients_again(
    grad_out: Tensor, features: Tensor, log_attention: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of features and log_attention, differentiable in all that they are made of.

    Without a baseline: what is taken off a first derivative without a bias would leave one in the second.
    """
    grown = _grown_weights(weights, log_attention)  # (B, N)
    flat = _flat(features).to(grown.dtype)  # (B, N, D)
    grad = _flat(grad_out.unsqueeze(1)).to(grown.dtype)  # (B, 1, D)
    grad_features = (grown.unsqueeze(-1) * grad).view(features.shape).to(features.dtype)
    return grad_features, (grown * (flat * grad).sum(-1)).to(log_attention.dtype)


def _weigh(log_attention: Tensor, dtype: torch.dtype, *, replace: bool, estimator: str, backend: str) -> Tensor:
    """The weights (B, N) of `dtype`."""
    if backend == "triton" and estimator == "unordered":
        if torch.compiler.is_compiling():
            from ats_kernels.pooling.opaque import unordered_weights

            return unordered_weights(log_attention.detach(), dtype)
        from ats_kernels.pooling.triton import unordered_weights_triton

        return unordered_weights_triton(log_attention.detach(), dtype)
    if backend == "reference":
        weights = estimator_weights_ref(log_attention, replace=replace, estimator=estimator)
    elif backend == "cpu" and (by := weighs_on_cpu(log_attention, unordered=estimator == "unordered")):
        return weigh_cpu(log_attention, dtype, by, replace=replace, estimator=estimator)
    else:
        weights = estimator_weights_lean(log_attention, dtype, replace=replace, estimator=estimator)
    return weights.to(dtype)


def _gradients(
    grad: Tensor,  # (B, D)
    features: Tensor,  # (B, N, …)
    weights: Tensor,  # (B, N)
    *,
    needs_features: bool,
    needs_log_attention: bool,
    weighted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """w_k g, as the features are, and w_k ⟨g, f_k⟩ or, unless `weighted`, ⟨g, f_k⟩ (B, N), as the weights are; None for
    one that is not needed."""
    grad_features = grad_log_attention = None
    grad = grad.to(weights.dtype).unsqueeze(1)  # (B, 1, D)
    if needs_features:
        grad_features = (weights.unsqueeze(-1) * grad).view(features.shape).to(features.dtype)
    if needs_log_attention:
        with _without_autocast(features):
            inner = torch.bmm(_flat(features).to(weights.dtype), grad.transpose(1, 2)).squeeze(-1)  # (B, N)
        grad_log_attention = weights * inner if weighted else inner
    return grad_features, grad_log_attention


def _gradients_triton(
    grad: Tensor,
    features: Tensor,
    weights: Tensor,
    *,
    needs_features: bool,
    needs_log_attention: bool,
    weighted: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`_gradients` in one launch."""
    if torch.compiler.is_compiling():
        from ats_kernels.pooling.opaque import backward

        found = backward(grad, _flat(features), weights, needs_features, needs_log_attention, weighted)
        return found[0].view(features.shape) if needs_features else None, found[1] if needs_log_attention else None
    from ats_kernels.pooling.triton import expectation_backward_triton

    grad_features, grad_log_attention = expectation_backward_triton(
        grad,
        _flat(features),
        weights,
        needs_features=needs_features,
        needs_log_attention=needs_log_attention,
        weighted=weighted,
    )
    return None if grad_features is None else grad_features.view(features.shape), grad_log_attention


def _centre_triton(inner: Tensor, weights: Tensor, log_attention: Tensor, *, replace: bool, estimator: str) -> Tensor:
    """`centred_coefficients` in one launch."""
    if torch.compiler.is_compiling():
        from ats_kernels.pooling.opaque import coefficients

        return coefficients(inner, weights, log_attention, replace, estimator)
    from ats_kernels.pooling.triton import coefficients_triton

    return coefficients_triton(inner, weights, log_attention, replace=replace, estimator=estimator)


def estimator_weights(log_attention: Tensor, *, replace: bool = False, estimator: Estimator = "ordered") -> Tensor:
    """The weights w with which `expectation` pools features; constants to autograd.

    Args:
        log_attention: (B, N) log a of the drawn cells, in draw order, as `sample` returns it.
        replace: whether they were drawn with replacement.
        estimator: "ordered", the paper's, or "unordered", as in `expectation`.

    Returns:
        (B, N) of log_attention's dtype (float32 at least); each row sums to 1.

    Raises:
        TypeError: log_attention that is not floating point.
        ValueError: log_attention that is not (B, N) with N ≥ 1, or cannot be one (looked at on the CPU only); an
            unknown estimator; "unordered" with `replace`.

    Source: paper, eq. 4 and 13-17; without replacement also Des Raj, 1956, and unordered Murthy, 1957.
    """
    check_estimator(estimator, replace=replace)
    backend = _check_log_attention(log_attention, replace=replace)
    dtype = compute_dtype(log_attention.dtype)
    return _weigh(log_attention, dtype, replace=replace, estimator=estimator, backend=backend)


def expectation(
    features: Tensor,
    log_attention: Tensor,
    *,
    replace: bool = False,
    estimator: Estimator = "ordered",
    control_variate: bool = False,
) -> Tensor:
    """Pool the features of drawn cells into an unbiased estimate of Σ_i a_i f_i over all cells.

    Args:
        features: (B, N, …) floating point, of the drawn cells in draw order.
        log_attention: (B, N) log a of the same cells, as `sample` returns it.
        replace: whether they were drawn with replacement.
        estimator: "ordered", the paper's, or "unordered", its mean over all orders of the draw: never a larger
            variance, and a much smaller one where the attention is sharp.
        control_variate: take a baseline made of the other draws off the features in log_attention's gradient, which
            stays unbiased. Its variance falls where features have much in common, as those of a network that ends in
            a ReLU do, and rises where they have not. Nothing else changes. It is left out of a gradient made with
            ``create_graph=True``, whose own derivatives it would bias.

    Returns:
        (B, …) of the features' dtype. Its gradient with respect to both arguments makes the gradient of the
        whole model unbiased, and so do the second derivative and those after it.

    Raises:
        TypeError: arguments that are not floating point.
        ValueError: features that are not (B, N, …), a log_attention that does not match them in batch, draws
            and device, or cannot be one (looked at on the CPU only); an unknown estimator; "unordered" with `replace`.

    Source: paper, eq. 4, 12 and 13-17; the unordered estimator is Murthy's, 1957, its baseline Kool et al.'s, 2020.
    """
    check_estimator(estimator, replace=replace)
    check_flag("control_variate", control_variate)
    check_floating("features", features)
    backend = _check_log_attention(log_attention, replace=replace)
    check_drawn_features(features, "log_attention", log_attention)
    if is_transformed():
        dtype = compute_dtype(features.dtype, log_attention.dtype)
        weights = _weigh(log_attention, dtype, replace=replace, estimator=estimator, backend="reference")
        with _without_autocast(features):
            return _weighted_sum(features, _grown_weights(weights, log_attention))
    return _Expectation.apply(features, log_attention, (replace, estimator, control_variate, backend))


def check_estimator(estimator: str, *, replace: bool) -> None:
    """Raise unless `estimator` is known and goes with the way of drawing."""
    check_choice("estimator", estimator, ESTIMATORS)
    check_flag("replace", replace)
    if replace and estimator == "unordered":
        raise ValueError(
            "estimator='unordered' is for cells drawn without replacement, got replace=True; draw with replace=False, "
            "or leave the estimator out"
        )


def _check_log_attention(log_attention: Tensor, *, replace: bool) -> str:
    """Raise unless log_attention (B, N) can be one, and return the backend that it asks for."""
    check_floating("log_attention", log_attention)
    if log_attention.ndim != 2 or log_attention.shape[1] == 0:
        raise ValueError(f"log_attention must be (B, N) with N ≥ 1, got {tuple(log_attention.shape)}")
    backend = backend_for(log_attention)
    if backend != "triton":  # where kernels run nothing may read a value
        check_log_probabilities("log_attention", log_attention, distinct=not replace)
    return backend
