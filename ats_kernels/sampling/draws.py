"""What every backend's draw is made of: what it returns, the size of its blocks, its seed, and how it is finished.

How a draw is made is described in `ats_kernels.sampling.op`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from ats_kernels import philox
from ats_kernels.sums import running_sum

METHODS = ("sample", "topk")
_RANK_KEY = 0x9E3779B97F4A7C15  # odd, so that no two ranks share a product


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


def any_failed(indices: Tensor, *, looks: bool) -> bool:
    """Whether a row of indices (B, N) could not be drawn from; the host waits for it unless it may `look` anyway."""
    if looks:  # NumPy's small operations cost less
        return bool(np.minimum.reduce(indices.numpy()[:, 0]) < 0)
    return bool((indices[:, 0] < 0).any())


def block_size(cells: int) -> int:
    """Cells a block, part of what a seed means: near sqrt(K / N), where the random numbers needed are fewest."""
    return 64 if cells <= 2**17 else 128 if cells <= 2**19 else 256 if cells <= 2**21 else 512


def draw_seed(logits: Tensor, method: str, generator: torch.Generator | None) -> Tensor | None:
    """One number from the generator, on the device: the host does not wait, and the replay of a graph draws anew.

    Data-parallel processes are usually all seeded alike, and would draw the same cells for their different images: what
    the default generator gives is therefore changed by the process's rank, if torch.distributed is set up. A generator
    that is passed is taken as it is: its owner decides, as is needed where processes share an image.
    """
    if method == "topk":
        return None
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=logits.device, generator=generator)
    if generator is None and distributed.is_available() and distributed.is_initialized():
        # Rank 0 draws as a process alone does. The seed is a key, of which any change gives other numbers.
        seed = seed.bitwise_xor(distributed.get_rank() * _RANK_KEY % 2**63)
    return seed


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
    dtype: torch.dtype,  # what log a will be stored in
) -> tuple[Draw, Statistics]:
    """Put together what `sample` returns, poison in bad rows."""
    log_attention = (log_mass - log_total.unsqueeze(-1)).clamp(min=torch.finfo(dtype).min)
    if repeats_seed is not None:
        order = repeats(log_attention.exp(), n, repeats_seed)
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


def repeats(attention: Tensor, n: int, seed: Tensor) -> Tensor:
    """Which of its distinct cells (B, N) in the order they first came each of n draws with replacement gives: (B, n).

    The cells that came so far come again with probability a each; what is left of 1 brings the next new cell.
    """
    rows = attention.shape[0]
    number = torch.arange(n, device=seed.device)
    row = torch.arange(rows, device=seed.device).unsqueeze(-1)
    target = philox.uniform(philox.random_bits(seed, number, row, philox.REPEATS))  # (B, n)
    # Once every cell that can come has come, one of them must: its share of the line ends above any target.
    more = attention.roll(-1, -1) > 0
    more[:, -1] = False
    until = running_sum(attention).masked_fill_(~more, 2.0)  # (B, N)
    where = torch.searchsorted(until, target, right=True)  # (B, n) a cell, new or not, by its share
    came = torch.zeros_like(where[:, 0])  # (B,) cells so far
    order = []
    for cell in where.unbind(-1):
        order.append(torch.minimum(cell, came))
        came = torch.maximum(came, order[-1] + 1)
    return torch.stack(order, -1)
