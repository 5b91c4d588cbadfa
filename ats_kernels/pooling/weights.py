"""The weights w of the estimators of `expectation`, and the centred coefficients of the attention's gradient.

Everything here is computed in float64, in a few operators on (B, N), and is constant to autograd.
"""

import torch
from torch import Tensor

from ats_kernels.pooling.unordered import leave_one_out, unordered_weights
from ats_kernels.sums import running_sum


def estimator_weights_ref(log_attention: Tensor, *, replace: bool = False, estimator: str = "ordered") -> Tensor:
    """The weights w (B, N) in float64 from log a (B, N) in draw order, without a gradient."""
    log_a = log_attention.detach().double()
    n = log_a.shape[1]
    if replace:
        return torch.full_like(log_a, 1 / n) + 0 * log_a  # a row of NaN stays one
    if estimator == "unordered":
        return unordered_weights(log_a, torch.float64)
    attention = log_a.exp()
    # 1 − Σ_{j<k} a_{q_j}, with the largest a_{q_p} taken off as −expm1(log a): a rounded 1 − a would lose a
    # remainder below 1e-16, and the first draw of peaked attention leaves less than that.
    largest = log_a.argmax(-1, keepdim=True)  # (B, 1)
    others = attention.scatter(-1, largest, 0.0)
    before = running_sum(others) - others  # exclusive: of the cells before k, less the largest
    drawn = torch.arange(n, device=log_a.device) > largest  # (B, N): whether the largest is among them
    remaining = torch.where(drawn, -torch.expm1(log_a.gather(-1, largest)), 1.0) - before
    remaining = torch.maximum(remaining, attention)  # the mass left holds at least the cell drawn next
    later = torch.arange(n - 1, -1, -1, device=log_a.device)  # N − k
    return (remaining + later * attention) / n


def estimator_weights_lean(
    log_attention: Tensor, dtype: torch.dtype, *, replace: bool = False, estimator: str = "ordered"
) -> Tensor:
    """`estimator_weights_ref` in fewer and cheaper operators, to the accuracy of `dtype`, float32 or float64.

    At B = 16, N = 10 the number of operators is what costs.
    """
    log_a = log_attention.detach().double()
    n = log_a.shape[1]
    if replace:
        return log_a * 0 + 1 / n  # a row of NaN stays one
    if estimator == "unordered":
        return unordered_weights(log_a, dtype)
    attention = log_a.exp()
    remaining = mass_before(log_a, attention)
    return remaining.addcmul_(attention, _later(log_a)).div_(float(n))


def mass_before(log_a: Tensor, attention: Tensor) -> Tensor:
    """m (B, N): the mass before each draw, 1 − Σ_{j<k} a_{q_j}."""
    # Only a cell of more than half of the mass can leave so little that 1 − a loses it; there is at most one.
    # Before it 1 − Σ a is left, after it 0 − Σ e, where e is a for the others and a − 1 for that one.
    peak = attention > 0.5
    taken = torch.where(peak, log_a.expm1(), attention)
    whole = peak.cumsum(-1) <= peak  # (B, N): no peak before k
    remaining = (taken - running_sum(taken)).add_(whole)  # less the exclusive sum
    return torch.maximum(remaining, attention, out=remaining)  # it holds at least the cell drawn next


def _later(log_a: Tensor) -> Tensor:
    return torch.arange(log_a.shape[1] - 1, -1, -1, dtype=torch.float64, device=log_a.device)  # N − k


def centred_coefficients(
    inner: Tensor, weights: Tensor, log_attention: Tensor, *, replace: bool = False, estimator: str = "ordered"
) -> Tensor:
    """c (B, N) in float64: the gradient to log a with features less a baseline, Σ_k c_k ∂log a_{q_k}.

    Without a baseline c_k = w_k x_k. Since Σ_i a_i ∂log a_i = 0, whatever does not depend on a draw may be taken off
    its features without a bias. The three ways of drawing leave different things to take:

    - with replacement, the mean of the other draws' x;
    - ordered, in all of E_k = Σ_{j<k} a_{q_j} x_{q_j} + m_k x_{q_k} the mean of E_1 … E_{k−1}, fixed before q_k is
      drawn; E_1 keeps its x;
    - unordered, `leave_one_out`, whose expectation is the same whichever cell it leaves out.

    Args:
        inner: (B, N) float32 or float64, x = ⟨g, f⟩ with g the gradient that arrives.
        weights: (B, N) w of the same draws.
        log_attention: (B, N) log a, in draw order.
        replace: whether the cells were drawn with replacement.
        estimator: as in `expectation`.
    """
    log_a, x = log_attention.detach().double(), inner.double()
    n = log_a.shape[1]
    if n == 1:  # there is nothing to make a baseline of
        return x + 0 * log_a
    if replace:
        return (x - x.mean(-1, keepdim=True)) / (n - 1) + 0 * log_a
    if estimator == "unordered":
        return weights * (x - leave_one_out(log_a, inner))
    attention = log_a.exp()
    mass = mass_before(log_a, attention)
    seen = attention * x
    estimates = running_sum(seen) - seen + mass * x  # E_k
    counts = torch.arange(1, n, dtype=torch.float64, device=log_a.device)
    baseline = torch.nn.functional.pad(running_sum(estimates)[:, :-1] / counts, (1, 0))  # of draw k; 0 of the first
    after = baseline.sum(-1, keepdim=True) - running_sum(baseline)  # Σ_{j>k} of the baselines
    return (mass * (x - baseline) + attention * (_later(log_a) * x - after)) / n
