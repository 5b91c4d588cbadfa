"""Draw cells of an attention map: logits in, draws out.

With ``a = softmax(z)`` over the K cells of a row, cells q_1..q_N are drawn one after the other,

    P(q_k | q_1..q_{k−1}) = a_{q_k} / (1 − Σ_{j<k} a_{q_j})        without replacement (paper, eq. 13-14)
    P(q_k) = a_{q_k}                                               with replacement (paper, eq. 4)

in draw order, which the estimator's weights depend on. On the side come log a of the drawn cells, the
logsumexp of the logits and the entropy ``H = −Σ a log a`` in nats (paper, eq. 21), all differentiable:

    ∂/∂z_i = Σ_k g_k ([i = q_k] − a_i) + g_lse a_i − g_H a_i (log a_i + H)

The drawn indices are constants: how they enter the gradient is the estimator's business (see `expectation`).

How it is drawn, by every backend. Let cell i ring at time E_i / a_i with E_i exponential: the first N cells to ring, in
order, are a draw without replacement (Gumbel top-k in other words: −log of the time is log a_i + Gumbel noise). A block
of cells first rings at E_b / a_b, a_b its total mass, so one random number a block tells which blocks hold the first N,
and only their cells need numbers of their own: drawn as if alone, then, the exponential being memoryless, moved so
that the first of the block rings when the block does (Kool et al., "Stochastic beams", ICML 2019). The random numbers
are functions of seed, row and cell (see `_philox`), what decides the order is computed in float64, and so the same seed
gives the same draws on every device.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ats_kernels import _philox
from ats_kernels._backend import backend_for, device_guard
from ats_kernels._checks import check_choice, check_count, check_floating, check_generator, compute_dtype

METHODS = ("sample", "topk")


class Draw(NamedTuple):
    """What `sample` returns."""

    indices: Tensor  # (B, N) int64, in draw order; −1 in a row that could not be drawn from
    log_attention: Tensor  # (B, N) log a of the drawn cells, ≤ 0; NaN in such a row
    logsumexp: Tensor  # (B,)
    entropy: Tensor  # (B,) nats


class Statistics(NamedTuple):
    """What a draw's backward needs of a row beside its logits; NaN in a row that could not be drawn from."""

    peak: Tensor  # (B,) the largest logit
    log_total: Tensor  # (B,) logsumexp − peak ≥ 0, which keeps its relative precision near 0
    entropy: Tensor  # (B,)


def block_size(cells: int) -> int:
    """Cells a block, part of what a seed means: near sqrt(K / N), where the random numbers needed are fewest."""
    return 64 if cells <= 2**17 else 128 if cells <= 2**19 else 256 if cells <= 2**21 else 512


def draw_seed(logits: Tensor, method: str, generator: torch.Generator | None) -> Tensor | None:
    """One number from the generator, on the device: the host does not wait, and the replay of a graph draws anew."""
    if method == "topk":
        return None
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=logits.device, generator=generator)


def sample_ref(
    logits: Tensor,  # (B, K)
    n: int,
    *,
    replace: bool = False,
    method: str = "sample",
    generator: torch.Generator | None = None,
) -> Draw:
    """The op in plain PyTorch, in float64 throughout, without a gradient. Arguments are as in `sample`."""
    return _sample_ref(logits.detach(), n, replace, method, draw_seed(logits, method, generator))[0]


def _sample_ref(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    z = logits.double()  # (B, K)
    top, peak = z.max(-1, keepdim=True)  # (B, 1)
    shifted = z - top  # (B, K), NaN where a row has only −inf
    mass = shifted.exp()  # (B, K), 1 at the peak
    # The peak's own 1 is left out of the sum, so that log a stays exact where one cell holds nearly all.
    rest = mass.scatter(-1, peak, 0.0).sum(-1)  # (B,)
    log_total = torch.log1p(rest)  # (B,)
    entropy = log_total + torch.special.entr(mass).sum(-1) / (1 + rest)

    cells = min(n, z.shape[1])  # distinct ones: n, unless drawn with replacement
    if seed is None:
        indices = shifted.sort(stable=True, dim=-1, descending=True).indices[:, :cells]
    else:
        indices = _times_ref(shifted, seed).topk(cells, largest=False).indices
    drawn = shifted.gather(-1, indices)  # (B, N)
    bad = rest.isnan() | (drawn[:, 0 if replace else -1] == -torch.inf)
    return finish(indices, drawn, top.squeeze(-1), log_total, entropy, bad, n, seed if replace else None)


def _times_ref(shifted: Tensor, seed: Tensor) -> Tensor:
    """The logarithm of the time (B, K) at which each cell rings, with a random number for every block and cell."""
    rows, cells = shifted.shape
    block = block_size(cells)
    blocks = F.pad(shifted, (0, -cells % block), value=-torch.inf).unflatten(-1, (-1, block))  # (B, K/block, block)
    row = torch.arange(rows, device=seed.device).unsqueeze(-1)
    number = torch.arange(blocks[0].numel(), device=seed.device)
    block_bits = _philox.random_bits(seed, number[: blocks.shape[1]], row, _philox.BLOCKS)
    cell_bits = _philox.random_bits(seed, number, row, _philox.CELLS).view(blocks.shape)
    times = ring_times(blocks, _philox.log_exponential(block_bits), _philox.log_exponential(cell_bits))
    return times.flatten(1)[:, :cells]


def ring_times(log_mass: Tensor, log_e_block: Tensor, log_e_cell: Tensor) -> Tensor:
    """The logarithm of the time (B, S, block) at which each cell rings; inf at a cell without mass.

    `log_mass` (B, S, block) are the cells' logits less the row's largest, `log_e_block` (B, S) and `log_e_cell` (B, S,
    block) the logarithms of their exponential variables. All float64.
    """
    block_time = log_e_block.unsqueeze(-1) - log_mass.logsumexp(-1, keepdim=True)  # (B, S, 1)
    alone = log_e_cell - log_mass  # as if the block were not known
    first = alone.amin(-1, keepdim=True).clamp_(max=torch.finfo(alone.dtype).max)  # finite also without mass
    # log(e^block_time + e^alone − e^first)
    excess = (first - alone).exp_().neg_().log1p_().add_(alone)
    return torch.logaddexp(block_time, excess)


def finish(
    indices: Tensor,  # (B, min(n, K)) distinct cells in draw order
    log_mass: Tensor,  # (B, min(n, K)) float64, their logits less the largest
    peak: Tensor,  # (B,) float64, and so are the next two
    log_total: Tensor,
    entropy: Tensor,
    bad: Tensor,  # (B,) bool: rows that cannot be drawn from
    n: int,
    repeats_seed: Tensor | None,  # the seed, where drawn with replacement
) -> tuple[Draw, Statistics]:
    """Put together what `sample` returns, poison in bad rows."""
    log_attention = log_mass - log_total.unsqueeze(-1)
    if repeats_seed is not None:
        order = _repeats(log_attention.exp(), n, repeats_seed)
        indices, log_attention = indices.gather(-1, order), log_attention.gather(-1, order)
    poison = torch.where(bad, torch.nan, 0.0)  # (B,)
    log_total, entropy = log_total + poison, entropy + poison
    draw = Draw(
        indices.masked_fill(bad.unsqueeze(-1), -1),
        log_attention + poison.unsqueeze(-1),
        peak + log_total,
        entropy,
    )
    return draw, Statistics(peak, log_total, entropy)


def _repeats(attention: Tensor, n: int, seed: Tensor) -> Tensor:
    """Which of its distinct cells (B, N) in the order they first came each of n draws with replacement gives: (B, n).

    The cells that came so far come again with probability a each; what is left of 1 brings the next new cell.
    """
    rows = attention.shape[0]
    number = torch.arange(n, device=seed.device)
    row = torch.arange(rows, device=seed.device).unsqueeze(-1)
    target = _philox.uniform(_philox.random_bits(seed, number, row, _philox.REPEATS))  # (B, n)
    # Once every cell that can come has come, one of them must: its share of the line ends above any target.
    more = attention.roll(-1, -1) > 0
    more[:, -1] = False
    until = attention.cumsum(-1).masked_fill_(~more, 2.0)  # (B, N)
    where = torch.searchsorted(until, target, right=True)  # (B, n) a cell, new or not, by its share
    came = torch.zeros_like(where[:, 0])  # (B,) cells so far
    order = []
    for cell in where.unbind(-1):
        order.append(torch.minimum(cell, came))
        came = torch.maximum(came, order[-1] + 1)
    return torch.stack(order, -1)


def _grad_ref(logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor, ...]) -> Tensor:
    grad_log_attention, grad_logsumexp, grad_entropy = (grad.double() for grad in grads)
    peak, log_total, entropy = statistics
    attention = (logits.double() - peak.unsqueeze(-1) - log_total.unsqueeze(-1)).exp()  # (B, K)
    dense = grad_logsumexp - grad_log_attention.sum(-1) - grad_entropy * entropy  # (B,)
    # entr(a) = −a log a is 0 at a masked cell, where the product of the factors would be NaN.
    grad = attention * dense.unsqueeze(-1) + torch.special.entr(attention) * grad_entropy.unsqueeze(-1)
    grad.scatter_add_(-1, indices.clamp(min=0), grad_log_attention)
    return grad.to(logits.dtype)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None, backend: str
    ) -> tuple[Tensor, ...]:
        if backend == "triton":
            from ats_kernels.sample_triton import sample_triton as draw_cells
        elif backend == "cpu":
            from ats_kernels.sample_cpu import sample_cpu as draw_cells
        else:
            draw_cells = _sample_ref
        with device_guard(logits):
            draw, statistics = draw_cells(logits, n, replace, method, seed)
        ctx.save_for_backward(logits, draw.indices, *statistics)
        ctx.backend, ctx.replace = backend, replace
        ctx.mark_non_differentiable(draw.indices)
        dtype = compute_dtype(logits.dtype)
        return draw.indices, *(value.to(dtype) for value in draw[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, indices, *values = ctx.saved_tensors
        statistics = Statistics(*values)
        if ctx.backend == "triton":
            from ats_kernels.sample_triton import grad_triton

            with device_guard(logits):
                grad_logits = grad_triton(logits, indices, statistics, grads, ctx.replace)
        elif ctx.backend == "cpu":
            from ats_kernels.sample_cpu import grad_cpu

            grad_logits = grad_cpu(logits, indices, statistics, grads)
        else:
            grad_logits = _grad_ref(logits, indices, statistics, grads)
        return grad_logits, None, None, None, None, None


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
        TypeError: logits that are not floating point, an `n` that is not an int, a `generator` that is none.
        ValueError: logits that are not (B, K); n < 1 or more than can be drawn; an unknown method; "topk" with
            replacement; a generator on another device; with validation also NaN or +inf logits and rows with too few
            unmasked cells.

    Source: paper, section 3.1 (with replacement) and 3.3 (without).
    """
    check_floating("logits", logits)
    n = check_count("n", n)
    check_choice("method", method, METHODS)
    check_generator(generator, logits.device)
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
    backend = "reference" if logits.dtype == torch.float64 and logits.device.type != "cpu" else backend_for(logits)
    seed = draw_seed(logits, method, generator)
    draw = Draw(*_Sample.apply(logits, n, replace, method, seed, backend))
    if validate is None:
        validate = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate and (draw.indices[:, 0] < 0).any():
        _explain(logits.detach(), n, replace)
    return draw


def _explain(logits: Tensor, n: int, replace: bool) -> None:
    """Raise the error that says why a row cannot be drawn from."""
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
