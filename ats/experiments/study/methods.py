"""The estimators that the study compares: the library's, and two gradients that others use.

A gradient here is that of ⟨g, Φ̂⟩ to the logits z of one attention of K cells, for each of R draws from it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ats.samples import Estimator
from ats_kernels import estimator_weights, expectation


@dataclass(frozen=True)
class Method:
    """One way to estimate Φ and its gradient.

    Attributes:
        label: in tables and plots.
        replace: whether it draws with replacement.
        estimator: of the library, whose weights it pools with.
        gradient: "library", or the name of another formula.
        control_variate: the library's.
    """

    label: str
    replace: bool = False
    estimator: Estimator = "ordered"
    gradient: str = "library"
    control_variate: bool = False


_ROWS = 200  # of draws at a time, for the cache

METHODS = {
    "replace": Method("with replacement", replace=True),
    "ordered": Method("ordered"),
    "unordered": Method("unordered", estimator="unordered"),
    "unordered-centred": Method("unordered, control variate", estimator="unordered", control_variate=True),
    "score": Method("score function", gradient="score"),
    "released": Method("released code", gradient="released"),
}


def estimate(
    method: Method, log_attention: Tensor, features: Tensor, direction: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Φ̂ (R, D) and the estimated gradients (R, K) of ⟨g, Φ̂⟩ to the logits.

    Args:
        method: that estimates.
        log_attention: (K,) float64, of all cells.
        features: (K, D) float64, of all cells.
        direction: (D,) float64, g.
        draws: (R, N) cells in draw order.
    """
    pooled, gradients = [], []
    for rows in draws.split(_ROWS):
        leaf = log_attention[rows].requires_grad_()
        estimates = expectation(
            features[rows],
            leaf,
            replace=method.replace,
            estimator=method.estimator,
            control_variate=method.control_variate,
        )
        pooled.append(estimates.detach())
        attention, values = log_attention.exp(), features @ direction
        if method.gradient == "score":
            gradients.append(_score_function(attention, values, rows))
            continue
        if method.gradient == "released":
            coefficients = released_coefficients(log_attention[rows], values[rows])
        else:
            (coefficients,) = torch.autograd.grad((estimates @ direction).sum(), leaf)
        gradients.append(through_softmax(attention, rows, coefficients))
    return torch.cat(pooled), torch.cat(gradients)


def through_softmax(attention: Tensor, draws: Tensor, coefficients: Tensor) -> Tensor:
    """Σ_k c_k ∂log a_{q_k}/∂z (R, K), with ∂log a_q/∂z_i = [i = q] − a_i."""
    dense = torch.zeros(len(draws), len(attention), dtype=coefficients.dtype, device="cpu")
    dense.scatter_add_(1, draws, coefficients)
    return dense - attention * coefficients.sum(1, keepdim=True)


def released_coefficients(log_attention: Tensor, values: Tensor) -> Tensor:
    """The gradient to log a in the code that was released with the paper, without replacement: (R, N). It is biased.

    In idiap/attention-sampling, ats/core/expectation.py, the gradient to a_{q_k} is the mean over k, from 0, of
    F_k / p_k + Σ_{j<k} f_j − k·f_k, with F_k what method.md calls E_k and p_k = a_{q_k} / m_k. Times a_{q_k}:

    Args:
        log_attention: (R, N) of the drawn cells, in draw order.
        values: (R, N) their f, or ⟨g, f⟩.
    """
    attention, n = log_attention.exp(), log_attention.shape[1]
    number = torch.arange(n, dtype=attention.dtype, device="cpu")
    mass = n * estimator_weights(log_attention) - (n - 1 - number) * attention  # m_k
    seen = attention * values
    estimate = seen.cumsum(1) - seen + mass * values  # F_k
    before = values.cumsum(1) - values  # Σ_{j<k} f_j
    return (estimate * mass + attention * (before - number * values)) / n


def _score_function(attention: Tensor, values: Tensor, draws: Tensor) -> Tensor:
    """The mean over k of E_k Σ_{j≤k} ∂log p_j + ∂E_k: the paper's eq. 41-44, which differentiate Π p_j(q_j)·E_k."""
    rows, n = draws.shape
    left = attention.repeat(rows, 1)  # (R, K) of the cells not drawn yet
    masses, steps = [], []
    for cell in draws.unbind(1):
        masses.append(left.sum(1))
        steps.append(left.clone())
        left.scatter_(1, cell.unsqueeze(1), 0.0)
    mass = torch.stack(masses, 1)  # (R, N) m_k
    x, a = values[draws], attention[draws]
    seen = a * x
    estimates = seen.cumsum(1) - seen + mass * x  # E_k
    onwards = estimates.flip(1).cumsum(1).flip(1)  # Σ_{k≥j} E_k, which ∂log p_j is multiplied with
    gradient = torch.zeros(rows, len(attention), dtype=attention.dtype, device="cpu").scatter_add_(1, draws, onwards)
    for j, step in enumerate(steps):  # log p_j = log a − log m_j: a softmax over the cells left
        gradient.addcmul_(step, (onwards[:, j] / mass[:, j]).unsqueeze(1), value=-1)
    # ∂E_k = Σ_{j<k} (x_j − x_k) ∂a_j, since m_k = 1 − Σ_{j<k} a_j.
    later = torch.arange(n - 1, -1, -1, dtype=attention.dtype, device="cpu")
    after = x.sum(1, keepdim=True) - x.cumsum(1)  # Σ_{k>j} x_k
    return (gradient + through_softmax(attention, draws, a * (later * x - after))) / n
