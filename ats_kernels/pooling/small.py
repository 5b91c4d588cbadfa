"""`expectation` on the CPU for few numbers, where no compiled loops run: starting an operation is all that it costs.

NumPy starts one in a third of PyTorch's time. The functions are those of `ats_kernels.pooling.loops`, argument for
argument, and the formulas those of `ats_kernels.pooling.weights` and `.unordered`, in float64.
"""

import numpy as np
import torch

REPLACE, ORDERED, UNORDERED = 0, 1, 2
_LEAST_MASS = 1e-250


@np.errstate(all="ignore")  # rows of NaN, and masses of 0, go the way of all numbers
def weigh(log_attention: np.ndarray, way: int, nodes: np.ndarray, scaled: np.ndarray, weights: np.ndarray) -> None:
    """The weights (B, N) of draws with log a (B, N)."""
    weights[...] = _weights(log_attention.astype(np.float64), way, nodes, scaled)


@np.errstate(all="ignore")
def pool(
    features: np.ndarray,
    log_attention: np.ndarray,
    way: int,
    nodes: np.ndarray,
    scaled: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray,
) -> None:
    """Features (B, N, D) pooled to `out` (B, D), and their weights (B, N)."""
    weights[...] = _weights(log_attention.astype(np.float64), way, nodes, scaled)
    np.matmul(weights[:, None], features, out[:, None])


@np.errstate(all="ignore")
def pool_grad(
    grad: np.ndarray,
    features: np.ndarray,
    log_attention: np.ndarray,
    weights: np.ndarray,
    way: int,
    nodes: np.ndarray,
    scaled: np.ndarray,
    centred: bool,
    grad_features: np.ndarray,
    grad_log_attention: np.ndarray,
) -> None:
    """Both gradients of `pool`, the second by centred coefficients or w_k ⟨g, f_k⟩; an empty one is not needed."""
    if len(grad_features):
        np.multiply(weights[..., None], grad[:, None], grad_features)
    if len(grad_log_attention):
        inner = np.matmul(features, grad[..., None])[..., 0]  # (B, N)
        if centred:
            log_a, x = log_attention.astype(np.float64), inner.astype(np.float64)
            grad_log_attention[...] = _centred(x, weights, log_a, way, nodes, scaled)
        else:
            np.multiply(weights, inner, grad_log_attention)


def _weights(log_a: np.ndarray, way: int, nodes: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    n = log_a.shape[1]
    if way == REPLACE:
        return log_a * 0 + 1 / n  # a row of NaN stays one
    if way == UNORDERED:
        attention, inverse, density = _quadrature(log_a, nodes, scaled)
        weights = attention * np.matmul(inverse, density[..., None])[..., 0]
        return weights / np.add.reduce(weights, -1, keepdims=True)  # which is 1 but for rounding
    attention, mass = _masses(log_a)
    attention *= np.arange(n - 1, -1, -1)
    mass += attention
    mass /= n
    return mass


def _masses(log_a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a, and the mass before each draw: (B, N)."""
    attention = np.exp(log_a)
    taken, whole = attention, True
    if np.fmax.reduce(attention, axis=None, initial=0.0) > 0.5:
        peak = attention > 0.5
        taken = np.where(peak, np.expm1(log_a), attention)
        whole = np.add.accumulate(peak, -1, np.int64) <= peak  # no peak before k
    remaining = taken - np.add.accumulate(taken, -1)
    remaining += whole
    return attention, np.maximum(remaining, attention, remaining)


def _quadrature(log_a: np.ndarray, nodes: np.ndarray, scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`ats_kernels.pooling.unordered.quadrature`: (B, N), (B, N, M), (B, M)."""
    log_a = np.maximum(log_a, -600.0)
    attention = np.exp(log_a)
    peak = attention > 0.5
    taken, whole = attention, 1.0
    if peak.any():
        taken = np.where(peak, np.expm1(log_a), attention)
        whole = 1.0 - np.add.reduce(peak, -1, np.float64, keepdims=True)
    left = np.maximum(whole - np.add.reduce(taken, -1, keepdims=True), _LEAST_MASS)  # (B, 1)
    complement = attention[..., None] * (scaled / -left)[:, None]
    tensor = torch.from_numpy(complement)  # NumPy's logarithms are vectorised on some processors only
    tensor.expm1_().neg_()  # 1 − e^{−a u}
    density = np.add.reduce(tensor.log().numpy(), 1)
    density += nodes - scaled
    density -= np.maximum.reduce(density, -1, keepdims=True)
    np.exp(density, density)
    density /= np.add.reduce(density, -1, keepdims=True)
    return attention, np.reciprocal(complement, complement), density


def _centred(
    x: np.ndarray, weights: np.ndarray, log_a: np.ndarray, way: int, nodes: np.ndarray, scaled: np.ndarray
) -> np.ndarray:
    """`ats_kernels.pooling.weights.centred_coefficients` of inner products x (B, N)."""
    n = log_a.shape[1]
    if n == 1:
        return x + 0 * log_a
    if way == REPLACE:
        return (x - x.mean(-1, keepdims=True)) / (n - 1) + 0 * log_a
    if way == UNORDERED:
        attention, inverse, density = _quadrature(log_a, nodes, scaled)
        own = attention * x
        shares = own[..., None] * inverse
        others = np.add.reduce(shares, 1, keepdims=True) - shares
        inverse *= density[:, None]  # up to a factor of s: the density without s
        others *= inverse
        return weights * (x - (own + np.add.reduce(others, -1) / np.add.reduce(inverse, -1)))
    attention, mass = _masses(log_a)
    seen = attention * x
    estimates = np.add.accumulate(seen, -1) - seen + mass * x  # E_k
    baseline = np.zeros_like(x)  # of draw k; 0 of the first
    baseline[:, 1:] = np.add.accumulate(estimates, -1)[:, :-1] / np.arange(1, n)
    sums = np.add.accumulate(baseline, -1)
    after = sums[:, -1:] - sums  # Σ_{j>k} of the baselines
    return (mass * (x - baseline) + attention * (np.arange(n - 1, -1, -1) * x - after)) / n
