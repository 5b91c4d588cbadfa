"""Draw cells of an attention map: logits in, draws out.

With ``a = softmax(z)`` over the K cells of a row, cells q_1..q_N are drawn one after the other,

    P(q_k | q_1..q_{k−1}) = a_{q_k} / (1 − Σ_{j<k} a_{q_j})        without replacement (paper, eq. 13-14)
    P(q_k) = a_{q_k}                                               with replacement (paper, eq. 4)

in draw order, which the estimator's weights depend on. On the side come log a of the drawn cells, the
logsumexp of the logits and the entropy ``H = −Σ a log a`` in nats (paper, eq. 21), all differentiable:

    ∂/∂z_i = Σ_k g_k ([i = q_k] − a_i) + g_lse a_i − g_H a_i (log a_i + H)

The drawn indices are constants: how they enter the gradient is the estimator's business (see `expectation`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ats_kernels._checks import check_choice, check_count, check_floating, compute_dtype

METHODS = ("sample", "topk")


class Draw(NamedTuple):
    """What `sample` returns."""

    indices: Tensor  # (B, N) int64, in draw order; −1 in a row that could not be drawn from
    log_attention: Tensor  # (B, N) log a of the drawn cells, ≤ 0; NaN in such a row
    logsumexp: Tensor  # (B,)
    entropy: Tensor  # (B,) nats


def sample_ref(
    logits: Tensor,  # (B, K)
    n: int,
    *,
    replace: bool = False,
    method: str = "sample",
    generator: torch.Generator | None = None,
) -> Draw:
    """The op in plain PyTorch, in float64 throughout, without a gradient. Arguments are as in `sample`."""
    z = logits.detach().double()  # (B, K)
    top, peak = z.max(-1, keepdim=True)  # (B, 1)
    shifted = z - top  # (B, K), NaN where a row has only −inf
    mass = shifted.exp()  # (B, K), 1 at the peak
    # The peak's own 1 is left out of the sum, so that log a stays exact where one cell holds nearly all.
    rest = mass.scatter(-1, peak, 0.0).sum(-1)  # (B,)
    log_total = torch.log1p(rest)  # (B,)
    logsumexp = top.squeeze(-1) + log_total
    entropy = log_total + torch.special.entr(mass).sum(-1) / (1 + rest)

    if method == "topk":
        indices = shifted.topk(n).indices
    elif replace:
        indices = _inverse_cdf(mass, n, generator)
    else:
        indices = _gumbel_top_k(shifted, n, generator)
    log_attention = shifted.gather(-1, indices) - log_total.unsqueeze(-1)

    bad = ~_can_be_drawn(logits, 1 if replace else n)  # (B,)
    nan = torch.tensor(torch.nan, dtype=z.dtype, device=z.device)
    return Draw(
        torch.where(bad.unsqueeze(-1), -1, indices),
        torch.where(bad.unsqueeze(-1), nan, log_attention),
        torch.where(bad, nan, logsumexp),
        torch.where(bad, nan, entropy),
    )


def _gumbel_top_k(log_mass: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw n cells without replacement: the n largest of log a + Gumbel noise, largest first."""
    # 53-bit uniforms: with 24 bits, keys tie in large maps and the ties decide the draw. A uniform of
    # exactly 0 would make an infinite key, also for a masked cell, hence the floor below the smallest step.
    exponential = torch.rand(log_mass.shape, dtype=log_mass.dtype, device=log_mass.device, generator=generator)
    exponential.neg_().log1p_().neg_().clamp_(min=2.0**-54)
    return (log_mass - exponential.log_()).topk(n).indices


def _inverse_cdf(mass: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw n cells with replacement. A 53-bit uniform below 1 times the total stays below the total."""
    cdf = mass.cumsum(-1)  # (B, K)
    uniform = torch.rand(mass.shape[0], n, dtype=cdf.dtype, device=cdf.device, generator=generator)
    # right=True: the first cell whose cumulative mass is above the target has mass of its own.
    indices = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    return indices.clamp_(max=mass.shape[-1] - 1)  # only a row of NaN runs past the end


def _can_be_drawn(logits: Tensor, n: int) -> Tensor:
    """Which rows (B,) are free of NaN and +inf and have at least n cells that are not masked."""
    sane = ~(torch.isnan(logits) | torch.isposinf(logits)).any(-1)
    return sane & ((~torch.isneginf(logits)).sum(-1) >= n)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        n: int,
        replace: bool,
        method: str,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, ...]:
        draw = sample_ref(logits, n, replace=replace, method=method, generator=generator)
        ctx.save_for_backward(logits, draw.indices, draw.logsumexp, draw.entropy)
        ctx.mark_non_differentiable(draw.indices)
        dtype = compute_dtype(logits.dtype)
        return draw.indices, *(value.to(dtype) for value in draw[1:])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: Tensor, grad_log_attention: Tensor, grad_logsumexp: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, indices, logsumexp, entropy = ctx.saved_tensors
        log_attention = logits.double() - logsumexp.unsqueeze(-1)  # (B, K)
        attention = log_attention.exp()
        grad_log_attention = grad_log_attention.double()
        dense = grad_logsumexp.double() - grad_log_attention.sum(-1) - grad_entropy.double() * entropy  # (B,)
        # entr(a) = −a log a is 0 at a masked cell, where the product of the factors would be NaN.
        grad = attention * dense.unsqueeze(-1)
        grad += torch.special.entr(attention) * grad_entropy.double().unsqueeze(-1)
        grad.scatter_add_(-1, indices.clamp(min=0), grad_log_attention)
        return grad.to(logits.dtype), None, None, None, None


def sample(
    logits: Tensor,
    n: int,
    *,
    replace: bool = False,
    method: str = "sample",
    generator: torch.Generator | None = None,
    validate: bool | None = None,
) -> Draw:
    """Draw `n` cells a row from ``softmax(logits)``, in draw order.

    Args:
        logits: (B, K) floating point; −inf masks a cell. float16 and bfloat16 give float32 results.
        n: cells to draw a row.
        replace: draw with replacement; without is the default.
        method: "sample", or "topk": the n most probable cells, most probable first, no randomness.
        generator: random numbers on the logits' device; torch's default generator where None.
        validate: look at the values, which makes the host wait for the device. None: on the CPU only.

    Returns:
        `Draw`: indices (B, n) int64, log_attention (B, n), logsumexp (B,) and entropy (B,) in nats, the last
        three differentiable with respect to the logits. Without validation, a row that cannot be drawn from
        comes back with index −1 and NaN everywhere else.

    Raises:
        TypeError: logits that are not floating point, an `n` that is not an int.
        ValueError: logits that are not (B, K); n < 1 or more than can be drawn; an unknown method; "topk" with
            replacement; with validation also NaN or +inf logits and rows with too few unmasked cells.

    Source: paper, section 3.1 (with replacement) and 3.3 (without).
    """
    check_floating("logits", logits)
    n = check_count("n", n)
    check_choice("method", method, METHODS)
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"logits must be (B, K), both at least 1, got {tuple(logits.shape)}")
    if method == "topk" and replace:
        raise ValueError(
            "method='topk' takes distinct cells and cannot be combined with replace=True; drop one of them"
        )
    if not replace and n > logits.shape[1]:
        raise ValueError(
            f"cannot draw n={n} cells without replacement from K={logits.shape[1]}; draw fewer or use replace=True"
        )
    if validate or (validate is None and logits.device.type == "cpu"):
        _validate(logits.detach(), n, replace)
    return Draw(*_Sample.apply(logits, n, replace, method, generator))


def _validate(logits: Tensor, n: int, replace: bool) -> None:
    if torch.isnan(logits).any():
        raise ValueError(_first_row("NaN", torch.isnan(logits)) + "; look for a diverged attention network")
    if torch.isposinf(logits).any():
        raise ValueError(_first_row("+inf", torch.isposinf(logits)) + "; only −inf, for a masked cell, is allowed")
    available = (~torch.isneginf(logits)).sum(-1)
    fewest, row = (int(value) for value in available.min(0))
    if fewest == 0:
        raise ValueError(f"logits of row {row} are all −inf: every cell is masked, nothing can be drawn")
    if not replace and fewest < n:
        raise ValueError(
            f"cannot draw n={n} cells without replacement from row {row}: only {fewest} of its "
            f"{logits.shape[1]} cells are not masked; draw fewer or use replace=True"
        )


def _first_row(what: str, where: Tensor) -> str:
    row, cell = (int(value) for value in where.nonzero()[0])
    return f"logits hold {int(where.sum())} {what} value(s), first in row {row}, cell {cell}"
