"""The op in plain PyTorch, in float64 throughout: what every faster implementation is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_kernels import philox
from ats_kernels.checks import compute_dtype
from ats_kernels.sampling.draws import Draw, Statistics, block_size, draw_seed, finish, ring_times


def sample_ref(
    logits: Tensor,  # (B, K)
    n: int,
    *,
    replace: bool = False,
    method: str = "sample",
    generator: torch.Generator | None = None,
) -> Draw:
    """The op in plain PyTorch, in float64 throughout, without a gradient. Arguments are as in `sample`."""
    return draw_cells_ref(logits.detach(), n, replace, method, draw_seed(logits, method, generator))[0]


def draw_cells_ref(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """The draw from a given seed, and what its backward needs."""
    z = logits.double()  # (B, K)
    top, peak = z.max(-1, keepdim=True)  # (B, 1)
    # (B, K), NaN where a row has only −inf; elsewhere finite unless masked, also where the difference overflows
    shifted = torch.where(z.isneginf(), z - top, (z - top).clamp(min=torch.finfo(z.dtype).min))
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
    dtype = compute_dtype(logits.dtype)
    return finish(indices, drawn, top.squeeze(-1), log_total, entropy, bad, n, seed if replace else None, dtype)


def drawn_values(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log a of drawn cells (B, N), logsumexp (B,) and entropy (B,) by operators that can be differentiated over and
    over: what a second derivative, or a transform of ``torch.func``, goes through. float64."""
    z = logits.double()
    log_attention = z.log_softmax(-1)  # (B, K)
    # −∞ · 0 of a masked cell would be NaN in every derivative.
    entropy = -(log_attention.exp() * log_attention.masked_fill(z.isneginf(), 0.0)).sum(-1)
    poison = torch.where(indices[:, 0] < 0, torch.nan, 0.0).to(z)  # (B,)
    drawn = log_attention.gather(-1, indices.clamp(min=0))
    return drawn + poison.unsqueeze(-1), z.logsumexp(-1) + poison, entropy + poison


def grad_again(logits: Tensor, indices: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the logits (B, K), differentiable in the logits and in the gradients that arrive."""
    values = drawn_values(logits, indices)
    grads = tuple(grad.double() for grad in grads)
    return torch.autograd.grad(values, logits, grads, create_graph=True)[0]


def _times_ref(shifted: Tensor, seed: Tensor) -> Tensor:
    """The logarithm of the time (B, K) at which each cell rings, with a random number for every block and cell."""
    rows, cells = shifted.shape
    block = block_size(cells)
    blocks = F.pad(shifted, (0, -cells % block), value=-torch.inf).unflatten(-1, (-1, block))  # (B, K/block, block)
    row = torch.arange(rows, device=seed.device).unsqueeze(-1)
    number = torch.arange(blocks[0].numel(), device=seed.device)
    block_bits = philox.random_bits(seed, number[: blocks.shape[1]], row, philox.BLOCKS)
    cell_bits = philox.random_bits(seed, number, row, philox.CELLS).view(blocks.shape)
    times = ring_times(blocks, philox.log_exponential(block_bits), philox.log_exponential(cell_bits))
    return times.flatten(1)[:, :cells]


def grad_ref(logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient of the logits (B, K)."""
    grad_log_attention, grad_logsumexp, grad_entropy = (grad.double() for grad in grads)
    peak, log_total, entropy = statistics
    attention = (logits.double() - peak.unsqueeze(-1) - log_total.unsqueeze(-1)).exp()  # (B, K)
    dense = grad_logsumexp - grad_log_attention.sum(-1) - grad_entropy * entropy  # (B,)
    # entr(a) = −a log a is 0 at a masked cell, where the product of the factors would be NaN.
    grad = attention * dense.unsqueeze(-1) + torch.special.entr(attention) * grad_entropy.unsqueeze(-1)
    grad.scatter_add_(-1, indices.clamp(min=0), grad_log_attention)
    return grad.to(logits.dtype)
