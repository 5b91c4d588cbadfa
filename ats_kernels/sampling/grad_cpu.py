"""The backward of `sample` on the CPU, in loops, in few operations or chunk by chunk."""

import math

import numpy as np
import torch
from torch import Tensor

from ats_kernels.backend import loops_run
from ats_kernels.checks import compute_dtype
from ats_kernels.sampling.cpu import CHUNK, chunks
from ats_kernels.sampling.draws import Statistics
from ats_kernels.sampling.in_loops import grad_in_loops

_SMALL = 2**15  # up to so many logits, operations cost more than what they work on
_NO_MASS = {4: -110.0, 8: -750.0}  # by bytes: e to this is 0, and finite where it multiplies that
_LOG2_E = 1 / math.log(2)


def grad_cpu(logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient (B, K) of the logits in one read and one write, chunk by chunk in cache.

    With w = z − peak and T = logsumexp − peak it is ``e^w (A − g_H e^-T w)``, A = (g_lse − Σ g − g_H (H − T)) e^-T, and
    at drawn cells g more. z − peak is exact where it matters; z − logsumexp would lose what a large logsumexp has no
    digits for.
    """
    rows, cells = logits.shape
    dtype = compute_dtype(logits.dtype)
    if rows * cells <= _SMALL and logits.dtype == dtype and not torch.compiler.is_compiling():
        if loops_run():
            return grad_in_loops(logits, indices, statistics, grads)
        return _small_grad(logits, indices, statistics, grads)
    floor = -150.0 if dtype == torch.float32 else -1080.0  # 2 to this is 0, and so is 0 · floor
    grad_log_attention, grad_logsumexp, grad_entropy = grads
    peak, log_total, entropy = statistics  # (B,) float64
    constant = grad_logsumexp - grad_log_attention.sum(-1, dtype=torch.float64)
    constant = constant - grad_entropy * (entropy - log_total)
    scale = log_total.neg().exp()
    constant, slope, peak = (
        value.to(dtype).unsqueeze(-1) for value in (constant * scale, grad_entropy * scale * -math.log(2), peak)
    )  # (B, 1)
    grad = logits.new_empty(logits.shape)
    buffers = logits.new_empty(2, min(rows * cells, CHUNK), dtype=dtype)
    for r, c in chunks(rows, cells):
        x, out = logits[r, c], grad[r, c]
        below, mass = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
        torch.sub(x, peak[r], out=below).mul_(_LOG2_E).clamp_(min=floor)
        torch.exp2(below, out=mass)
        below.mul_(slope[r]).add_(constant[r])
        torch.mul(below, mass, out=out)
    # Few cells: not worth rounding to half precision twice.
    return grad.scatter_add_(-1, indices.clamp(min=0), grad_log_attention.to(grad.dtype))


def _small_grad(logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient (B, K) of few float32 or float64 logits, by the formula of `grad_cpu`."""
    values = logits.numpy()
    grad_log_attention, grad_logsumexp, grad_entropy = (grad.numpy() for grad in grads)
    peak, log_total, entropy = (value.numpy() for value in statistics)  # (B,) float64
    scale = np.exp(-log_total)
    constant = grad_logsumexp - np.add.reduce(grad_log_attention, -1, np.float64)
    constant -= grad_entropy * (entropy - log_total)
    constant *= scale
    scale *= grad_entropy
    with np.errstate(invalid="ignore"):  # of a row that could not be drawn from
        grad = values - peak.astype(values.dtype)[:, None]
    np.maximum(grad, _NO_MASS[values.dtype.itemsize], grad)
    mass = np.exp(grad)
    grad *= -scale.astype(values.dtype)[:, None]
    grad += constant.astype(values.dtype)[:, None]
    grad *= mass
    return torch.from_numpy(grad).scatter_add_(-1, indices.clamp(min=0), grads[0])
