"""The backward of `sample` on the CPU, in loops, in few operations or chunk by chunk."""

import math

import numpy as np
import torch
from torch import Tensor

from ats_kernels.backend import loops_run
from ats_kernels.checks import compute_dtype
from ats_kernels.sampling import block_sums
from ats_kernels.sampling.draws import Statistics
from ats_kernels.sampling.in_loops import grad_in_loops

_SMALL = 2**15  # up to so many logits, operations cost more than what they work on
_NO_MASS = {4: -110.0, 8: -750.0}  # by bytes: e to this is 0, and finite where it multiplies that
_LOG2_E = 1 / math.log(2)


def grad_cpu(logits: Tensor, indices: Tensor, statistics: Statistics, arriving: tuple[Tensor | None, ...]) -> Tensor:
    """The gradient (B, K) of the logits in one read and one write, chunk by chunk in cache.

    With w = z − peak and T = logsumexp − peak it is ``e^w (A − g_H e^-T w)``, A = (g_lse − Σ g − g_H (H − T)) e^-T, and
    at drawn cells g more. z − peak is exact where it matters; z − logsumexp would lose what a large logsumexp has no
    digits for. What arrives are g (B, N), g_lse (B,) and g_H (B,); None means 0.
    """
    rows, cells = logits.shape
    dtype = compute_dtype(logits.dtype)
    compiling = torch.compiler.is_compiling()
    if not compiling and rows * cells <= _SMALL and logits.dtype == dtype:
        if loops_run():
            return grad_in_loops(logits, indices, statistics, arriving)
        return _small_grad(logits, indices, statistics, arriving)
    floor = -150.0 if dtype == torch.float32 else -1080.0  # 2 to this is 0, and so is 0 · floor
    peak, log_total, entropy = statistics  # (B,) float64
    zero = torch.zeros_like(log_total)
    grad_logsumexp, grad_entropy = (zero if grad is None else grad for grad in arriving[1:])
    constant = grad_logsumexp if arriving[0] is None else grad_logsumexp - arriving[0].sum(-1, dtype=torch.float64)
    constant = constant - grad_entropy * (entropy - log_total)
    scale = log_total.neg().exp()
    constant, slope, peak = (
        value.to(dtype).unsqueeze(-1) for value in (constant * scale, grad_entropy * scale * -math.log(2), peak)
    )  # (B, 1)
    if compiling:  # it fuses all of it, and would compile anew for each number of chunks
        below = ((logits - peak) * _LOG2_E).clamp(min=floor)
        grad = ((below * slope + constant) * below.exp2()).to(logits.dtype)
    else:
        grad = logits.new_empty(logits.shape)
        buffers = logits.new_empty(2, min(rows * cells, block_sums.CHUNK), dtype=dtype)
        for r, c in block_sums.chunks(rows, cells):
            x, out = logits[r, c], grad[r, c]
            below, mass = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
            torch.sub(x, peak[r], out=below).mul_(_LOG2_E).clamp_(min=floor)
            torch.exp2(below, out=mass)
            below.mul_(slope[r]).add_(constant[r])
            torch.mul(below, mass, out=out)
    if arriving[0] is None:
        return grad
    # Few cells: not worth rounding to half precision twice.
    return grad.scatter_add_(-1, indices.clamp(min=0), arriving[0].to(grad.dtype))


@np.errstate(invalid="ignore", over="ignore")  # of a row that could not be drawn from
def _small_grad(logits: Tensor, indices: Tensor, statistics: Statistics, arriving: tuple[Tensor | None, ...]) -> Tensor:
    """The gradient (B, K) of few float32 or float64 logits, by the formula of `grad_cpu`."""
    values = logits.numpy()
    kind = values.dtype
    peak, log_total = statistics.peak.numpy(), statistics.log_total.numpy()  # (B,) float64
    grad_log_attention, grad_logsumexp, grad_entropy = arriving
    scale = np.exp(-log_total)
    constant = np.zeros(len(scale)) if grad_logsumexp is None else grad_logsumexp.numpy().astype(np.float64)
    if grad_log_attention is not None:
        constant -= np.add.reduce(grad_log_attention.numpy(), -1, np.float64)
    if grad_entropy is not None:
        constant -= grad_entropy.numpy() * (statistics.entropy.numpy() - log_total)
    constant *= scale
    below = values - peak.astype(kind)[:, None]
    np.maximum(below, _NO_MASS[kind.itemsize], below)
    if grad_entropy is None:
        grad = np.exp(below, below)
        grad *= constant.astype(kind)[:, None]
    else:
        scale *= grad_entropy.numpy()
        grad = np.exp(below)
        below *= -scale.astype(kind)[:, None]
        below += constant.astype(kind)[:, None]
        grad *= below
    if grad_log_attention is None:
        return torch.from_numpy(grad)
    # Where a row could not be drawn from, whose indices are −1, all is NaN as it is.
    np.add.at(grad, (np.arange(len(grad))[:, None], indices.numpy()), grad_log_attention.numpy())
    return torch.from_numpy(grad)
