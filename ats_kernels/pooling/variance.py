"""How far an estimate of Φ = Σ_i a_i f_i may be off, told from the very cells that it was made of.

Drawn without replacement, with ``m_k = 1 − Σ_{j<k} a_{q_j}`` the mass left at draw k (paper, eq. 13-17),

    E_k = Σ_{j<k} a_{q_j} f_{q_j} + m_k f_{q_k}                       k = 1..N

are unbiased for Φ and uncorrelated, so that Σ_k (E_k − Ē)² / (N (N − 1)) is unbiased for the variance of their mean,
the ordered estimate (Des Raj, 1956).

The unordered estimate averages it over every order in which the same cells could have been drawn (Murthy, 1957). Let
cell i ring after an exponential time of rate a_i, and the first cell that was not drawn at time u. Given the drawn
cells S, that time has the density

    π(u) ∝ e^{−(1 − Σ_S a) u} Π_{s∈S} (1 − e^{−a_s u})

and with ω_s(u) = a_s / (1 − e^{−a_s u}), one over the probability that s has rung by then, times a_s,

    Φ̂ = Σ_s f_s E_π[ω_s]          Var ≈ Σ_{s<t} Cov_π(ω_s, ω_t) (f_s − f_t)²

the second being Murthy's unbiased estimate of the first's variance, written with the same integral. All ω_s fall with
u, so no covariance is negative, and neither is the variance.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ats_kernels.checks import Estimator, check_floating, check_log_probabilities
from ats_kernels.pooling.op import check_estimator
from ats_kernels.pooling.unordered import quadrature
from ats_kernels.pooling.weights import mass_before
from ats_kernels.sums import running_sum


class Estimate(NamedTuple):
    """An estimate of Σ_i a_i f_i and, unbiased, its variance over draws."""

    value: Tensor  # (B, …)
    variance: Tensor  # (B, …), of each component


def estimate(
    features: Tensor, log_attention: Tensor, *, replace: bool = False, estimator: Estimator = "ordered"
) -> Estimate:
    """Estimate Σ_i a_i f_i from drawn cells as `ats.expectation` does, with an unbiased estimate of the variance.

    Nothing of it is differentiable. Any linear function of the features, e.g. class logits, may stand in their place.

    Args:
        features: (B, N, …) floating point, of the drawn cells in draw order, N ≥ 2.
        log_attention: (B, N) log a of the same cells, as `ats.sample_patches` returns it.
        replace: whether they were drawn with replacement.
        estimator: "ordered" or, of cells drawn without replacement, "unordered".

    Returns:
        `Estimate`: value and variance (B, …) in float64; the variance of each component by itself.

    Raises:
        TypeError: arguments that are not floating point.
        ValueError: shapes that do not match; N < 2, from which no variance can be told; an unknown estimator; a
            log_attention above 0 (looked at on the CPU only).

    Source: paper, section 3; Des Raj, 1956; Murthy, 1957.
    """
    check_floating("features", features)
    check_floating("log_attention", log_attention)
    check_estimator(estimator, replace=replace)
    if log_attention.ndim != 2 or features.shape[:2] != log_attention.shape:
        raise ValueError(
            f"features must be (B, N, …) and log_attention (B, N) of the same cells, got {tuple(features.shape)} and "
            f"{tuple(log_attention.shape)}"
        )
    check_log_probabilities("log_attention", log_attention, distinct=not replace)
    draws = log_attention.shape[1]
    if draws < 2:
        raise ValueError(f"a variance needs at least 2 draws an image, got {draws}; draw more, or repeat the draw")
    values = features.detach().double().flatten(2) if features.ndim > 2 else features.detach().double().unsqueeze(-1)
    log_a = log_attention.detach().double()
    if replace:
        result = Estimate(values.mean(1), values.var(1) / draws)
    elif estimator == "ordered":
        result = _ordered(values, log_a)
    else:
        result = _unordered(values, log_a)
    shape = features.shape[:1] + features.shape[2:]
    return Estimate(result.value.view(shape), result.variance.view(shape))


def _ordered(values: Tensor, log_a: Tensor) -> Estimate:
    attention = log_a.exp()
    known = attention.unsqueeze(-1) * values  # (B, N, D)
    each = running_sum(known, 1) - known + mass_before(log_a, attention).unsqueeze(-1) * values  # E_k
    return Estimate(each.mean(1), each.var(1) / each.shape[1])


def _unordered(values: Tensor, log_a: Tensor) -> Estimate:
    attention, inverse, density = quadrature(log_a, torch.float64)  # (B, N), (B, N, M), (B, 1, M)
    omega = (attention.unsqueeze(-1) * inverse).transpose(1, 2)  # (B, M, N)
    weights = density @ omega  # (B, 1, N)
    weights = weights / weights.sum(-1, keepdim=True)  # 1 but for rounding
    value = weights @ values  # (B, 1, D)
    # Only differences count: with their mean taken off, Σ_{s<t} Cov(ω_s, ω_t)(f_s − f_t)² loses no digits as
    # Cov(Σ_s ω_s f_s², Σ_t ω_t) − Var(Σ_s ω_s f_s).
    centred = values - value
    total = omega.sum(-1, keepdim=True)  # (B, M, 1)
    total = total - density @ total
    first = omega @ centred  # (B, M, D)
    first = first - density @ first
    variance = density @ ((omega @ centred.square()) * total - first.square())  # (B, 1, D)
    return Estimate(value.squeeze(1), variance.squeeze(1).clamp(min=0))
