"""The CPU path of `sample` without compiled loops: one read of the logits, few and coarse operations.

Same algorithm, random numbers and draws as the reference in `sample`. It starts from sums over blocks
(`ats_kernels.sampling.block_sums`), in the logits' precision (float32 at least; float64 with replacement, where the
order of the draws rests on the total of all sums), relative to one of the row's largest logits. Where that loses what
could decide a draw, and for the most probable cells, relative to each block's own. Only what decides the draw and the
precision of log a is computed again in float64: the blocks that may hold drawn cells, and the block of most mass.

All but the sums is small and NumPy's, which starts an operation in half of PyTorch's time and wakes no threads. Few
logits are for `ats_kernels.sampling.small`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ats_kernels import philox
from ats_kernels.backend import loops_run
from ats_kernels.checks import compute_dtype
from ats_kernels.sampling.block_sums import Sums, block_sums
from ats_kernels.sampling.draws import Draw, Statistics, block_size, repeats, ring_times
from ats_kernels.sampling.in_loops import sample_in_loops
from ats_kernels.sampling.small import small_draw

# Up to so many logits in all, operations cost more than what they work on: every block is a candidate.
_SMALL = 2**12

# Ring times of blocks from float32 sums are off by about 1e-6. Where the n-th and the next are no farther apart than
# NEAR, blocks beyond the n first are taken: one missing then would need that many others as near.
NEAR = 1e-4
SPARE_BLOCKS = 4

# Of sums relative to one logit for the whole row: what has lost nothing to underflow. A block that rings first and sums
# to less, or one that sums to more than its inverse, has each block summed by itself.
_LEAST_SUM = 2.0**-90
_NO_LOG = -1e300  # in place of log 0 where it is multiplied by 0


class _Candidates(NamedTuple):
    """Statistics of whole rows, and the blocks that may hold drawn cells; all float64 but `chosen`."""

    top: np.ndarray  # (B,) the largest logit, or that of the block with most mass
    rest: np.ndarray  # (B,) Σ exp(z − top) over all cells but that one
    spread: np.ndarray  # (B,) Σ (z − top) exp(z − top)
    chosen: np.ndarray  # (B, S) int64, numbers of blocks
    log_mass: np.ndarray  # (B, S, block) their logits less that one, −inf past the last cell
    log_e: tuple[np.ndarray, np.ndarray] | None  # log-exponentials (B, S) of blocks and (B, S, block) of cells


def sample_cpu(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """Draw from logits (B, K) on the CPU; like `draw_cells_ref`, `method` being what `seed` is None for."""
    if torch.compiler.is_compiling():
        values = _opaque_sample(logits, n, replace, seed)
        return Draw(*values[:4]), Statistics(*values[4:])
    return _sample(logits.detach(), n, replace, seed)


def _sample(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """The draw, its values in the dtype that comes out, and statistics in float64."""
    if loops_run():
        return sample_in_loops(logits, n, replace, seed)
    if seed is None or replace or logits.numel() > _SMALL:
        draw, statistics = _sample_in_blocks(logits, n, replace, seed)
        return _rounded(draw, compute_dtype(logits.dtype)), statistics
    return _sample_few(logits, n, seed)


def _rounded(draw: Draw, dtype: torch.dtype) -> Draw:
    return Draw(draw.indices, *(value.to(dtype) for value in draw[1:]))


def _sample_few(logits: Tensor, n: int, seed: Tensor) -> tuple[Draw, Statistics]:
    """As `_sample`, without replacement, from few logits."""
    dtype = compute_dtype(logits.dtype)
    values = (logits if logits.dtype == dtype else logits.to(dtype)).numpy()
    with np.errstate(all="ignore"):
        indices, log_attention, peak, log_total, entropy = small_draw(*values.shape).draw(values, n, int(seed))
    logsumexp = peak + log_total
    if not math.isnan(np.add.reduce(log_total)):
        drawn = indices, *(value.astype(values.dtype) for value in (log_attention, logsumexp, entropy))
        return Draw(*map(torch.from_numpy, drawn)), Statistics(*map(torch.from_numpy, (peak, log_total, entropy)))
    rows = torch.from_numpy(np.isnan(log_total))  # that take other means
    draw = Draw(*map(torch.from_numpy, (indices, log_attention, logsumexp, entropy)))
    statistics = Statistics(torch.from_numpy(peak), torch.from_numpy(log_total), draw.entropy)
    for ours, theirs in zip((draw, statistics), _sample_in_blocks(logits, n, False, seed), strict=True):
        for value, other in zip(ours, theirs, strict=True):
            value[rows] = other[rows]
    return _rounded(draw, dtype), statistics


def _sample_in_blocks(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Draw, Statistics]:
    rows, cells = logits.shape
    block = block_size(cells)
    distinct, key = min(n, cells), None if seed is None else int(seed)
    row = np.arange(rows)[:, None]  # (B, 1)
    with np.errstate(all="ignore"):  # −inf − −inf and the like make NaN, as they should
        if logits.numel() <= _SMALL:
            found = _every_block(logits, block, key, row)
        else:
            found = _likely_blocks(logits, block, distinct, replace, key, row)
        top, rest, spread, chosen, log_mass, log_e = found
        log_total = np.log1p(rest)
        entropy = log_total - spread / (1 + rest)
        flat = log_mass.reshape(rows, -1)  # (B, S·block)
        if log_e is None:
            order = np.argsort(-flat, axis=-1, kind="stable")[:, :distinct]
        else:
            times = ring_times(*(torch.from_numpy(values) for values in (log_mass, *log_e)))
            _, order = _smallest(times.flatten(1), distinct)
    indices = chosen[row, order // block] * block + order % block  # (B, min(n, K))
    drawn = flat[row, order]
    bad = np.isnan(rest) | (drawn[:, 0 if replace else -1] == -np.inf)
    # Only a masked cell has no logarithm that the result's dtype holds.
    log_attention = np.maximum(drawn - log_total[:, None], torch.finfo(compute_dtype(logits.dtype)).min)
    if replace and seed is not None:
        again = repeats(torch.from_numpy(np.exp(log_attention)), n, seed).numpy()  # (B, n)
        indices, log_attention = indices[row, again], log_attention[row, again]
    if bad.any():
        indices[bad] = -1
        for value in (log_attention, log_total, entropy):
            value[bad] = np.nan
    values = indices, log_attention, top + log_total, entropy, top, log_total
    *draw, peak, log_totals = (torch.from_numpy(value) for value in values)
    return Draw(*draw), Statistics(peak, log_totals, draw[3])


@torch.library.custom_op(
    "ats_kernels::sample_cpu",
    mutates_args=(),
    schema="(Tensor logits, int n, bool replace, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _opaque_sample(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Tensor, ...]:
    """`_sample` as one operator to a compiler, which cannot look into NumPy."""
    draw, statistics = _sample(logits.detach(), n, replace, seed)
    return *draw, *(value.clone() for value in statistics)


@_opaque_sample.register_fake
def _(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    drawn = logits.new_empty((rows, n), dtype=compute_dtype(logits.dtype))
    wide = (logits.new_empty(rows, dtype=torch.float64) for _ in range(3))
    return (torch.empty_like(drawn, dtype=torch.int64), drawn, drawn.new_empty(rows), drawn.new_empty(rows), *wide)


def _every_block(logits: Tensor, block: int, key: int | None, row: np.ndarray) -> _Candidates:
    """All blocks, in float64 throughout."""
    rows, cells = logits.shape
    n_blocks = -(-cells // block)
    padded = np.full((rows, n_blocks * block), -np.inf)
    padded[:, :cells] = logits.double().numpy()
    top = padded.max(-1, keepdims=True)  # (B, 1)
    log_mass = _difference(padded, top, logits.dtype)
    mass = np.exp(log_mass)
    # The peak's own 1 is left out of the sum, so that log a stays exact where one cell holds nearly all.
    mass[row[:, 0], log_mass.argmax(-1)] = 0
    rest = mass.sum(-1)
    mass *= np.maximum(log_mass, _NO_LOG)
    log_e = None
    if key is not None:  # all random numbers are made in one go
        pairs = np.arange((n_blocks + 1) // 2), np.arange(n_blocks * block // 2)
        stream = np.repeat((philox.BLOCKS, philox.CELLS), [len(pair) for pair in pairs])
        numbers = philox.log_exponential_numpy(philox.paired_bits(key, np.concatenate(pairs), row, stream))
        log_e = numbers[:, :n_blocks], numbers[:, 2 * len(pairs[0]) :].reshape(rows, n_blocks, block)
    chosen = np.zeros_like(row) + np.arange(n_blocks)
    return _Candidates(top[:, 0], rest, mass.sum(-1), chosen, log_mass.reshape(rows, n_blocks, block), log_e)


def _likely_blocks(
    logits: Tensor, block: int, distinct: int, replace: bool, key: int | None, row: np.ndarray
) -> _Candidates:
    """The blocks that hold the first `distinct` cells, from sums over all blocks."""
    if key is not None:
        found = _candidates(logits, block_sums(logits, block, wide=replace, each=False), block, distinct, key, row)
        if found is not None:
            return found
    found = _candidates(logits, block_sums(logits, block, wide=replace, each=True), block, distinct, key, row)
    assert found is not None
    return found


def _candidates(
    logits: Tensor, sums: Sums, block: int, distinct: int, key: int | None, row: np.ndarray
) -> _Candidates | None:
    """`_likely_blocks` from `sums`; None if these have lost too much to overflow or underflow."""
    n_blocks = sums.mass.shape[1]
    least, most = (0.0, np.inf) if sums.reference.shape == sums.mass.shape else (_LEAST_SUM, 1 / _LEAST_SUM)
    if (sums.mass > most).any():
        return None
    log_mass = np.maximum(sums.mass, least)
    torch.from_numpy(log_mass).log_()
    # (B, K/block) less something of the row, so that no random number is lost beside large logits
    log_mass += sums.reference - sums.reference.max(-1, keepdims=True)
    top_block = log_mass.argmax(-1)[:, None]  # (B, 1)
    few = distinct + SPARE_BLOCKS < n_blocks
    chosen = np.zeros_like(row) + np.arange(n_blocks)
    log_e = None
    if key is not None:
        bits = philox.paired_bits(key, np.arange((n_blocks + 1) // 2), row, philox.BLOCKS)[:, :n_blocks]
        block_log_e = philox.log_exponential_numpy(bits)
        if few:
            times, chosen = _smallest(torch.from_numpy(block_log_e - log_mass), distinct + SPARE_BLOCKS)
            if SPARE_BLOCKS and (times[:, distinct] > times[:, distinct - 1] + NEAR).all():
                chosen = chosen[:, :distinct]
            if (sums.mass[row, chosen] < least).any():
                return None
            block_log_e = block_log_e[row, chosen]
        pair = (chosen * (block // 2))[..., None] + np.arange(block // 2)  # (B, S, block/2)
        bits = philox.paired_bits(key, pair, row[..., None], philox.CELLS)
        log_e = block_log_e, philox.log_exponential_numpy(bits)  # (B, S), (B, S, block)
    elif few:
        chosen = np.argsort(-sums.reference, axis=-1, kind="stable")[:, :distinct]
        chosen.sort(axis=-1)  # ascending, so that ties go to the cell of the lowest index

    # The block of most mass goes along, so that what is not the peak's can be summed to its full precision. Where the
    # row's largest logit lies elsewhere, this block's is as good: the rest is then not small.
    cells = _gather_blocks(logits, np.concatenate((chosen, top_block), -1), block)
    top = cells[:, -1].max(-1)
    cells = _difference(cells, top[:, None, None], logits.dtype)
    top_mass = np.exp(cells[:, -1])  # (B, block)
    top_mass[row[:, 0], top_mass.argmax(-1)] = 0
    below = sums.reference - top[:, None]  # (B, T)
    scale = np.exp(below)
    mass = sums.mass * scale  # (B, K/block) Σ exp(z − top)
    total = mass if sums.reference.shape == mass.shape else mass.sum(-1, keepdims=True)  # (B, T)
    spread = (scale * sums.spread + total * np.maximum(below, _NO_LOG)).sum(-1)
    mass[row, top_block] = 0
    rest = top_mass.sum(-1) + mass.sum(-1)
    return _Candidates(top, rest, spread, chosen, cells[:, :-1], log_e)


def _difference(logits: np.ndarray, top: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """`logits` less `top`, finite unless masked: where `dtype` is float64 the difference may overflow."""
    below = logits - top
    if dtype == torch.float64:
        np.maximum(below, -np.finfo(np.float64).max, out=below, where=logits > -np.inf)
    return below


def _smallest(keys: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's smallest keys (B, count), in ascending order, and their places."""
    values, places = keys.topk(count, largest=False)  # NumPy's selection takes three times as long
    return values.numpy(), places.numpy()


def _gather_blocks(logits: Tensor, chosen: np.ndarray, block: int) -> np.ndarray:
    """The logits (B, S, block) of the chosen blocks (B, S) in float64, −inf past the last cell."""
    rows, cells = logits.shape
    index = (chosen * block)[..., None] + np.arange(block)  # (B, S, block)
    inside = index if cells % block == 0 else np.minimum(index, cells - 1)
    values = logits.gather(-1, torch.from_numpy(inside.reshape(rows, -1))).double().numpy().reshape(index.shape)
    if inside is not index:
        values[index >= cells] = -np.inf
    return values
