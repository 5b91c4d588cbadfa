"""The CPU path of `sample`: one read of the logits, few and coarse operations, no compiler needed.

Same algorithm, random numbers and draws as the reference in `sample`. It reads the logits in chunks that stay in cache
for each block's largest logit, sum of exponentials and share of the entropy, in the logits' precision (float32 at
least; float64 with replacement, where the order of the draws rests on the total of all sums). Only what decides the
draw and the precision of log a is computed again in float64: the blocks that may hold drawn cells, and the block of
the largest logit.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_kernels import _philox
from ats_kernels._checks import compute_dtype
from ats_kernels.sample import Draw, Statistics, block_size, finish, ring_times

# Logits a chunk: a few arrays of it fit the cache of one core.
_CHUNK = 2**18

# Up to so many logits in all, operations cost more than what they work on: every block is a candidate.
_SMALL = 2**12

# Blocks taken beyond the n first. Ring times of blocks from float32 sums are off by about 1e-6, so a block missing
# from these would need that many others within 1e-6 of the n-th time.
SPARE_BLOCKS = 4


def sample_cpu(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """Draw from logits (B, K) on the CPU; like `_sample_ref`."""
    rows, cells = logits.shape
    block = block_size(cells)
    n_blocks = -(-cells // block)
    distinct = min(n, cells)
    row = torch.arange(rows).unsqueeze(-1)  # (B, 1)

    block_log_e = cell_log_e = None
    if rows * cells <= _SMALL:
        chosen = torch.arange(n_blocks).expand(rows, -1)
        padded = F.pad(logits.double(), (0, n_blocks * block - cells), value=-torch.inf)
        top = padded.amax(-1, keepdim=True)  # (B, 1)
        log_mass = (padded - top).unflatten(-1, (n_blocks, block))  # (B, S, block)
        mass = log_mass.exp().flatten(1)
        rest = mass.scatter(-1, padded.argmax(-1, keepdim=True), 0.0).sum(-1)
        spread = mass.mul_(log_mass.flatten(1).clamp(min=-1e300)).sum(-1)
        if seed is not None:
            block_log_e, cell_log_e = _all_numbers(seed, row, n_blocks, block)
    else:
        block_peak, block_sum, block_slope = (
            value.double() for value in _block_statistics(logits, block, wide=replace)
        )
        top, top_block = block_peak.max(-1, keepdim=True)  # (B, 1)
        below = block_peak - top  # (B, n_blocks) ≤ 0
        share = below.exp().mul_(block_sum)
        spread = (share * block_slope.add_(below.clamp(min=-1e300))).sum(-1)
        chosen, block_log_e = _candidates(block_peak, below, block_sum, distinct, seed, row)  # (B, S)
        # The block of the largest logit goes along, so that what is not the peak's can be summed to its full precision.
        log_mass = _gather_blocks(logits, torch.cat((chosen, top_block), -1), block).sub_(top.unsqueeze(-1))
        peak_mass = log_mass[:, -1].exp()  # (B, block)
        rest = peak_mass.scatter_(-1, peak_mass.argmax(-1, keepdim=True), 0.0).sum(-1)
        rest += share.scatter_(-1, top_block, 0.0).sum(-1)
        log_mass = log_mass[:, :-1]
        if seed is not None:
            pair = (chosen * (block // 2)).unsqueeze(-1) + torch.arange(block // 2)  # (B, S, block/2)
            cell_log_e = _philox.log_exponential(
                _philox.paired_bits(seed, pair, row.unsqueeze(-1), _philox.CELLS)
            )  # (B, S, block)
    log_total = torch.log1p(rest)
    entropy = log_total - spread / (1 + rest)

    flat = log_mass.flatten(1)
    if block_log_e is not None and cell_log_e is not None:
        times = ring_times(log_mass, block_log_e, cell_log_e).flatten(1)
        order = times.topk(distinct, largest=False).indices
    else:
        order = flat.sort(stable=True, dim=-1, descending=True).indices[:, :distinct]
    indices = chosen.gather(-1, order.div(block, rounding_mode="floor")).mul_(block).add_(order % block)
    drawn = flat.gather(-1, order)
    bad = rest.isnan() | (drawn[:, 0 if replace else -1] == -torch.inf)
    return finish(indices, drawn, top.squeeze(-1), log_total, entropy, bad, n, seed if replace else None)


def _chunks(rows: int, cells: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of whole blocks of columns with about _CHUNK logits each."""
    columns = min(-(-cells // block), max(1, _CHUNK // block)) * block
    height = max(1, _CHUNK // columns)
    for first in range(0, rows, height):
        for left in range(0, cells, columns):
            yield slice(first, min(first + height, rows)), slice(left, min(left + columns, cells))


def _block_statistics(logits: Tensor, block: int, *, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block (B, K/block): the largest logit m, the sum s = Σ exp(z − m) and Σ (z − m) exp(z − m) / s."""
    rows, cells = logits.shape
    dtype = torch.float64 if wide else compute_dtype(logits.dtype)
    # exp is 0 from here down, and 0 · floor too where 0 · −inf would be NaN.
    floor = -104.0 if dtype == torch.float32 else -746.0
    lowest = torch.finfo(dtype).min
    peak, total, slope = torch.empty(3, rows, -(-cells // block), dtype=dtype).unbind(0)
    for r, c in _chunks(rows, cells, block):
        x = logits[r, c].to(dtype)
        missing = -x.shape[1] % block
        if missing:
            x = F.pad(x, (0, missing), value=-torch.inf)
        x = x.unflatten(-1, (-1, block))
        m = x.amax(-1)
        shifted = (x - m.clamp(min=lowest).unsqueeze(-1)).clamp_(min=floor)
        # softmax has a faster exp inside than exp; the peak's share is 1 in the sum.
        share = shifted.softmax(-1)
        b = slice(c.start // block, -(-c.stop // block))
        peak[r, b], total[r, b], slope[r, b] = m, share.amax(-1).reciprocal_(), share.mul_(shifted).sum(-1)
    return peak, total, slope


def _candidates(
    block_peak: Tensor, below: Tensor, block_sum: Tensor, distinct: int, seed: Tensor | None, row: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The blocks (B, S) that hold the first `distinct` cells, and their log-exponentials."""
    n_blocks = below.shape[1]
    if seed is None:
        if distinct >= n_blocks:
            return torch.arange(n_blocks).expand(below.shape), None
        chosen = block_peak.sort(stable=True, dim=-1, descending=True).indices[:, :distinct]
        return chosen.sort(-1).values, None  # ascending, so that ties go to the cell of the lowest index
    log_e = _philox.log_exponential(_philox.paired_bits(seed, torch.arange((n_blocks + 1) // 2), row, _philox.BLOCKS))[
        :, :n_blocks
    ]
    if distinct + SPARE_BLOCKS >= n_blocks:
        return torch.arange(n_blocks).expand(below.shape), log_e
    times = log_e - below - block_sum.log()
    chosen = times.topk(distinct + SPARE_BLOCKS, largest=False, sorted=False).indices
    return chosen, log_e.gather(-1, chosen)


def _gather_blocks(logits: Tensor, chosen: Tensor, block: int) -> Tensor:
    """The logits (B, S, block) of the chosen blocks (B, S) in float64, −inf past the last cell."""
    cells = logits.shape[1]
    index = (chosen * block).unsqueeze(-1) + torch.arange(block)  # (B, S, block)
    if cells % block == 0:
        return logits.gather(-1, index.flatten(1)).double().view(index.shape)
    values = logits.gather(-1, index.clamp(max=cells - 1).flatten(1)).double().view(index.shape)
    return values.masked_fill_(index >= cells, -torch.inf)


def _all_numbers(seed: Tensor, row: Tensor, n_blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """The log-exponentials of all blocks (B, n_blocks) and cells (B, n_blocks, block), made in one go."""
    block_pairs = (n_blocks + 1) // 2
    pair = torch.cat((torch.arange(block_pairs), torch.arange(n_blocks * block // 2)))
    stream = torch.full_like(pair, _philox.CELLS)
    stream[:block_pairs] = _philox.BLOCKS
    numbers = _philox.log_exponential(_philox.paired_bits(seed, pair, row, stream))
    return numbers[:, :n_blocks], numbers[:, 2 * block_pairs :].unflatten(-1, (n_blocks, block))


def grad_cpu(logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient (B, K) of the logits in one read and one write, chunk by chunk in cache."""
    dtype = compute_dtype(logits.dtype)
    floor = -104.0 if dtype == torch.float32 else -746.0
    grad_log_attention, grad_logsumexp, grad_entropy = grads
    peak, log_total, entropy = (value.unsqueeze(-1) for value in statistics)  # (B, 1) float64
    dense = (grad_logsumexp - grad_log_attention.sum(-1, dtype=torch.float64)).unsqueeze(-1)
    dense = (dense - grad_entropy.unsqueeze(-1) * entropy).to(dtype)  # (B, 1)
    peak, log_total, slope = peak.to(dtype), log_total.to(dtype), grad_entropy.unsqueeze(-1).to(dtype)
    grad = torch.empty(logits.shape, dtype=logits.dtype)
    for r, c in _chunks(logits.shape[0], logits.shape[1], 1):
        # z − peak is exact where it matters; z − logsumexp would lose what a large logsumexp has no digits for.
        log_attention = (logits[r, c].to(dtype) - peak[r]).sub_(log_total[r]).clamp_(min=floor)
        attention = log_attention.exp()
        grad[r, c] = log_attention.mul_(slope[r]).neg_().add_(dense[r]).mul_(attention)
    # Few cells: not worth rounding to half precision twice.
    return grad.scatter_add_(-1, indices.clamp(min=0), grad_log_attention.to(grad.dtype))
