"""The weights of the unordered estimator: those of the ordered one, averaged over all orders of the same set.

With S the cells drawn, a their attention and c = 1 − Σ_S a the mass left (Murthy, 1957; Kool et al., ICLR 2020),

    w_s = a_s · P(S∖s | s drawn first) / P(S)          P(S) = c ∫_0^∞ e^{−cu} Π_{j∈S} (1 − e^{−a_j u}) du

P(S∖s | s first) is the integral without the factor of s, so all N weights are means under one density π of u:

    w_s = E_π[ a_s / (1 − e^{−a_s u}) ]                π(u) ∝ e^{−cu} Π_j (1 − e^{−a_j u})

They are evaluated by the trapezoidal rule in v = log(cu), with nodes that are the same for every row: dividing by its c
has taken out a row's scale. Three bounds, each of an error relative to the integral, choose the nodes. They hold
whatever the attention, for P(S), and with fewer factors for P(S∖s | s).

- Left of the nodes: the product rises with u, so under π cu is stochastically larger than an exponential variable,
  and P(cu < e^v) ≤ e^v.
- Right of them: the product over u^N falls with u, so cu is stochastically smaller than a Gamma(N + 1) variable, and
  P(cu > N + 1 + √(2 (N + 1) l) + l) ≤ e^{−l}.
- Between them, h apart: the integrand is analytic in the strip |Im v| ≤ y < π/2 and, since
  |1 − e^{−z}| ≤ (|z| / Re z) (1 − e^{−Re z}), its integral there is at most cos(y)^{−(N+1)} times that on the real
  line. So the rule is off by at most 2 cos(y)^{−(N+1)} / (e^{2πy/h} − 1).

Each is held at e^{−l} or below, with l = 18 for weights in float32 and l = 32 in float64. What remains is the rounding
of the arguments: c is known no better than log a lets it be.
"""

import math

import torch
from torch import Tensor

ACCURACY = {torch.float32: 18.0, torch.float64: 32.0}  # l, by the dtype of the results
_LEAST_MASS = 1e-250  # stands for a mass of 0: the weights are a then, and nothing overflows


def unordered_weights(log_attention: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights w (B, N) in float64, from log a (B, N) in any order, to the accuracy of `dtype`."""
    attention, inverse, density = quadrature(log_attention, dtype)
    weights = attention * inverse.mul_(density).sum(-1)
    return weights / weights.sum(-1, keepdim=True)  # 1 but for rounding


def leave_one_out(log_attention: Tensor, values: Tensor) -> Tensor:
    """For each draw s an estimate of Σ_i a_i x_i, unbiased given that s was drawn first: (B, N) in float64.

    It is a_s x_s + (1 − a_s) times the unordered estimate from S∖s of the other cells' mean. The weights of that take
    integrals without two factors, which come apart into sums over the nodes: no pair is ever formed.

    Args:
        log_attention: (B, N) log a, N ≥ 2.
        values: (B, N) float32 or float64, x of the drawn cells.

    Source: Kool et al., 2020, section 4.
    """
    attention, inverse, density = quadrature(log_attention, values.dtype)
    own = attention * values.double()  # (B, N) a_s x_s
    shares = own.unsqueeze(-1) * inverse  # (B, N, M) a_s x_s / (1 − e^{−a_s u})
    others = shares.sum(1, keepdim=True) - shares
    without = inverse.mul_(density)  # (B, N, M) up to a factor of s: the density without s
    return own + (others * without).sum(-1) / without.sum(-1)


def quadrature(log_attention: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """a (B, N), 1 / (1 − e^{−a u}) (B, N, M) and π (B, 1, M), which sums to 1, at M nodes."""
    # A cell below e^−600 is weighted as if it were there, and nothing underflows.
    log_a = log_attention.detach().double().clamp(min=-600.0)
    attention = log_a.exp()
    nodes = _nodes(log_a, dtype)  # (M,) log(cu)
    scaled = nodes.exp()
    u = (scaled / _mass_left(log_a, attention)).unsqueeze(1)  # (B, 1, M)
    complement = (attention.unsqueeze(-1) * u).neg_().expm1_().neg_()  # (B, N, M) 1 − e^{−a u}
    log_density = complement.log().sum(1, keepdim=True).add_(nodes - scaled)  # du = u dv
    return attention, complement.reciprocal_(), log_density.softmax(-1)


def _nodes(like: Tensor, dtype: torch.dtype) -> Tensor:
    step, count = node_steps(like.shape[1], dtype)
    return torch.arange(count, dtype=like.dtype, device=like.device) * step - ACCURACY[dtype]


def node_steps(draws: int, dtype: torch.dtype) -> tuple[float, int]:
    """How far the nodes v lie apart, and how many there are from −l on."""
    accuracy, factors = ACCURACY[dtype], draws + 1
    strip = math.atan(math.sqrt(2 * accuracy / factors))  # y: any will do, this one makes h nearly the largest
    step = 2 * math.pi * strip / (accuracy + math.log(3) - factors * math.log(math.cos(strip)))
    last = math.log(factors + math.sqrt(2 * factors * accuracy) + accuracy)
    return step, math.ceil((last + accuracy) / step) + 1


def _mass_left(log_a: Tensor, attention: Tensor) -> Tensor:
    """1 − Σ a (B, 1), positive. A cell of more than half of the mass enters as expm1(log a), which loses nothing."""
    peak = attention > 0.5  # at most one
    taken = torch.where(peak, log_a.expm1(), attention).sum(-1, keepdim=True)
    whole = 1.0 - peak.sum(-1, keepdim=True)
    return (whole - taken).clamp(min=_LEAST_MASS)
