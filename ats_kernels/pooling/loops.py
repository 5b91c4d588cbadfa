"""`expectation` on the CPU as compiled loops: weights, pooled features and both gradients, a row after the other.

The formulas are those of `ats_kernels.pooling.weights` and `.unordered`, in float64.
"""

import math

import numpy as np

from ats_kernels.loops import SUMS, compiled, exp, kept, log, one_minus_exp
from ats_kernels.pooling.small import ORDERED, REPLACE

_LEAST_MASS = 1e-250


@compiled()
def _masses(log_a, attention, remaining):
    """a, and the mass before each draw, to `attention` and `remaining` (N,)."""
    before, whole = 0.0, 1.0
    for k in range(len(log_a)):
        value = np.float64(log_a[k])
        a = math.exp(value)
        left = whole - before
        if a > left or a != a:
            left = a
        attention[k], remaining[k] = a, left
        if a > 0.5:
            before += math.expm1(value)
            whole = 0.0
        else:
            before += a


@compiled(fastmath=SUMS)
def _dot(one, other):
    total = 0.0
    for i in range(len(one)):
        total += np.float64(one[i]) * np.float64(other[i])
    return total


@compiled()
def _quadrature(log_a, nodes, scaled, attention, inverse, density):
    """`ats_kernels.pooling.unordered.quadrature` of one row, to the last three: (N,), (N, M), (M,)."""
    taken, lost, whole = 0.0, 0.0, 1.0  # what is left may be a small part of what is added up: no digit may be lost
    for k in range(len(log_a)):
        value = np.float64(log_a[k])
        value = -600.0 if value < -600.0 else value
        attention[k] = part = math.exp(value)
        if part > 0.5:
            part = math.expm1(value)
            whole -= 1.0
        total = taken + part
        lost += (taken - total) + part if abs(taken) >= abs(part) else (part - total) + taken
        taken = total
    left = (whole - taken) - lost
    left = _LEAST_MASS if left < _LEAST_MASS else left
    for m in range(len(nodes)):
        density[m] = nodes[m] - scaled[m]
    for k in range(len(log_a)):
        rate = -attention[k] / left
        for m in range(len(nodes)):
            complement = one_minus_exp(rate * scaled[m])
            density[m] += log(complement)
            inverse[k, m] = 1.0 / complement
    highest = density.max()
    total = 0.0
    for m in range(len(nodes)):
        density[m] = exp(density[m] - highest)
        total += density[m]
    for m in range(len(nodes)):
        density[m] /= total


@compiled()
def _has_nan(values):
    found = False
    for k in range(len(values)):
        found |= values[k] != values[k]
    return found


@compiled()
def _weigh_row(log_a, way, nodes, scaled, weights):
    n = len(log_a)
    if way == ORDERED:
        attention, remaining = np.empty(n), np.empty(n)
        _masses(log_a, attention, remaining)
        for k in range(n):
            weights[k] = (remaining[k] + (n - 1 - k) * attention[k]) / n
        return
    if _has_nan(log_a):
        weights[:] = np.nan
    elif way == REPLACE:
        weights[:] = 1 / n
    else:
        attention, inverse, density = np.empty(n), np.empty((n, len(nodes))), np.empty(len(nodes))
        _quadrature(log_a, nodes, scaled, attention, inverse, density)
        own = np.empty(n)
        total = 0.0
        for k in range(n):
            own[k] = attention[k] * _dot(inverse[k], density)
            total += own[k]
        for k in range(n):
            weights[k] = own[k] / total  # which is 1 but for rounding


@kept()
def weigh(log_attention, way, nodes, scaled, weights):
    """The weights (B, N) of draws with log a (B, N)."""
    for row in range(len(log_attention)):
        _weigh_row(log_attention[row], way, nodes, scaled, weights[row])


@kept()
def pool(features, log_attention, way, nodes, scaled, weights, out):
    """Features (B, N, D) pooled to `out` (B, D), and their weights (B, N)."""
    rows, draws, size = features.shape
    total = np.empty(size)
    for row in range(rows):
        _weigh_row(log_attention[row], way, nodes, scaled, weights[row])
        total[:] = 0.0
        for k in range(draws):
            _add(total, np.float64(weights[row, k]), features[row, k])
        out[row, :] = total


@compiled()
def _add(total, weight, values):
    for d in range(len(values)):
        total[d] += weight * values[d]


@compiled()
def _centre(log_a, way, nodes, scaled, weights, inner):
    """`ats_kernels.pooling.weights.centred_coefficients` of one row, in place of the inner products (N,) float64."""
    n = len(log_a)
    if n == 1:
        return
    attention = np.empty(n)
    if way == REPLACE:
        mean = inner.sum() / n
        for k in range(n):
            inner[k] = (inner[k] - mean) / (n - 1)
    elif way == ORDERED:
        mass, baseline = np.empty(n), np.empty(n)
        _masses(log_a, attention, mass)
        seen = estimates = after = 0.0
        for k in range(n):
            baseline[k] = estimates / max(k, 1)
            estimates += seen + mass[k] * inner[k]
            seen += attention[k] * inner[k]
            after += baseline[k]
        for k in range(n):
            after -= baseline[k]
            inner[k] = (mass[k] * (inner[k] - baseline[k]) + attention[k] * ((n - 1 - k) * inner[k] - after)) / n
    else:
        inverse, density = np.empty((n, len(nodes))), np.empty(len(nodes))
        _quadrature(log_a, nodes, scaled, attention, inverse, density)
        shares = np.zeros(len(nodes))
        for k in range(n):
            _add(shares, attention[k] * inner[k], inverse[k])
        for k in range(n):
            own = attention[k] * inner[k]
            others = _others(shares, own, inverse[k], density)
            inner[k] = np.float64(weights[k]) * (inner[k] - (own + others))


@compiled(fastmath=SUMS)
def _others(shares, own, inverse, density):
    """The mean of the other cells' shares without s, whose a_s x_s is `own`."""
    above = below = 0.0
    for m in range(len(shares)):
        without = inverse[m] * density[m]
        above += (shares[m] - own * inverse[m]) * without
        below += without
    return above / below


@kept()
def pool_grad(grad, features, log_attention, weights, way, nodes, scaled, centred, grad_features, grad_log_attention):
    """Both gradients of `pool`, the second by centred coefficients or w_k ⟨g, f_k⟩; an empty one is not needed."""
    rows, draws, _ = features.shape
    inner = np.empty(draws)
    for row in range(rows):
        if len(grad_features):
            for k in range(draws):
                _scale(grad[row], weights[row, k], grad_features[row, k])
        if len(grad_log_attention):
            for k in range(draws):
                inner[k] = _dot(grad[row], features[row, k])
                if not centred:
                    inner[k] *= weights[row, k]
            if centred:
                if _has_nan(log_attention[row]):
                    inner[:] = np.nan
                _centre(log_attention[row], way, nodes, scaled, weights[row], inner)
            grad_log_attention[row, :] = inner


@compiled()
def _scale(values, by, out):
    for d in range(len(values)):
        out[d] = values[d] * by
