"""Triton kernels of `sample`: the algorithm, random numbers and draws of the reference there.

Pass 1 (`_statistics_kernel`) reads the logits once. Then, for maps of up to 2,048 blocks and up to 28 draws, one
program a row does all the rest (`_draw_kernel`): two launches. Larger problems rank with torch.topk, on block times and
on the times of the cells in the candidate blocks: `_block_times_kernel`, topk, `_cell_times_kernel`, topk,
`_finish_kernel`. Drawing with replacement adds `_repeats_kernel`.

Precision: sums over a block are float32 (float64 with replacement, where the order of the draws rests on the total),
taken relative to the block's largest logit. Totals, ring times and log a are float64, and so is the sum over the block
(on large maps the program's blocks) of the row's largest logit less its own 1: log a and 1 − a keep a relative
precision of about 1e-6 however near 1 a is. No host synchronisation, no atomics; deterministic.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels.sample import Draw, Statistics, block_size

if TYPE_CHECKING:
    from ats_kernels._offline import OfflineCase

SPARE_BLOCKS = 4  # as in sample_cpu
_SMALL_DRAWS = 28
_SMALL_BLOCKS = 2048
_BARRIER_DRAWS = 64  # up to so many, the backward's own programs add what belongs to the drawn cells

BLOCKS_STREAM = tl.constexpr(0)  # as in _philox
CELLS_STREAM = tl.constexpr(1)
REPEATS_STREAM = tl.constexpr(2)


FLOOR = tl.constexpr(-104.0)  # exp is 0 in float32 from here down


@triton.jit
def _uniform(seed, index, row, STREAM: tl.constexpr):
    """float64 in [2^-54, 1 − 2^-53]; see _philox.uniform. Literals are float32, so these are powers of two."""
    zero = index * 0
    word_0, word_1, word_2, word_3 = tl.philox(seed, index >> 1, zero + row, zero + STREAM, zero)
    odd = (index & 1) == 1
    high = tl.where(odd, word_2, word_0)
    low = tl.where(odd, word_3, word_1)
    u = high.to(tl.float64) * 2.0**-32 + (low >> 11).to(tl.float64) * 2.0**-53 + 2.0**-54
    return u - (u >= 1.0).to(tl.float64) * 2.0**-53


@triton.jit
def _log1p(x):
    """log(1 + x) of float64 x > −1 to full relative precision."""
    y = 1.0 + x
    rounded = y - 1.0
    return tl.where(rounded == 0.0, x, tl.log(y) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def _log_exponential(seed, index, row, STREAM: tl.constexpr):
    return tl.log(-_log1p(-_uniform(seed, index, row, STREAM)))


@triton.jit
def _ring_times(z, top, seed, block, cell, row):
    """Log ring times (S, BLOCK) of the cells of S blocks; see ring_times in sample.py."""
    log_mass = z - top
    largest = tl.max(log_mass, 1)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(tl.exp(log_mass - largest[:, None]), 1)
    block_time = _log_exponential(seed, block, row, BLOCKS_STREAM) - (tl.log(total) + largest)
    alone = _log_exponential(seed, cell, row, CELLS_STREAM) - log_mass
    first = tl.min(alone, 1)
    first = tl.where(first == float("inf"), 0.0, first)
    excess = alone + tl.log(1.0 - tl.exp(first[:, None] - alone))
    late = tl.maximum(block_time[:, None], excess)
    early = tl.minimum(block_time[:, None], excess)
    both = late + tl.log(1.0 + tl.exp(early - tl.where(late == float("inf"), 0.0, late)))
    return tl.where(late == float("inf"), float("inf"), both)


@triton.jit
def _descending_key(z, index):
    """int64 keys whose ascending order is that of z descending, then of the index."""
    bits = (z.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # + 0.0: −0 and 0 are one value
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((~ascending).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def _statistics_kernel(
    logits_ptr,
    stats_ptr,
    chunk_stats_ptr,
    cell_units,
    n_blocks,
    n_chunks,
    stride_logits_b,
    stride_stats,
    stride_chunk_stats,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # One program: of BLOCKS blocks of one row, each block's largest logit m, Σ exp(z − m) and Σ (z − m) exp(z − m);
    # with CHUNKS the same of all of them together. Sizes and strides come in units of UNIT logits, so that vector
    # loads are provably aligned.
    program = tl.program_id(0)
    row = (program // n_chunks).to(tl.int64)
    chunk = program % n_chunks
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    # (slices of a block, blocks, cells): so laid out, a warp holds whole blocks and a thread sums over slices alone.
    SLICE: tl.constexpr = BLOCK if BLOCK < 128 else 128
    SLICES: tl.constexpr = BLOCK // SLICE
    within = tl.arange(0, SLICES)[:, None, None] * SLICE + tl.arange(0, SLICE)[None, None, :]
    cell = block[None, :, None] * BLOCK + within
    logits_row = logits_ptr + row * stride_logits_b * UNIT
    z = tl.load(logits_row + cell, mask=cell < cell_units * UNIT, other=-float("inf"))
    z = z.to(tl.float64) if WIDE else z.to(tl.float32)
    peak = tl.max(tl.max(z, 0), 1)
    # A block of −inf alone sums to 0; NaN and +inf make the sum NaN, which poisons the row.
    shifted = z - tl.where(peak == -float("inf"), 0.0, peak)[None, :, None]
    mass = tl.exp(shifted) if WIDE else tl.exp2(shifted * 1.4426950408889634)
    total = tl.sum(tl.sum(mass, 0), 1)
    # In float64, what lies below FLOOR is 1e-45 of the block at most.
    slope = tl.sum(tl.sum(mass * tl.maximum(shifted, FLOOR), 0), 1)
    stats_row = stats_ptr + row * n_blocks + block
    tl.store(stats_row, peak, mask=block < n_blocks)
    tl.store(stats_row + stride_stats, total, mask=block < n_blocks)
    tl.store(stats_row + 2 * stride_stats, slope, mask=block < n_blocks)
    if CHUNKS:
        chunk_peak = tl.max(peak, 0)
        below = peak - tl.where(chunk_peak == -float("inf"), 0.0, chunk_peak)
        share = tl.exp(below)
        chunk_total = tl.sum(share * total, 0)
        chunk_slope = tl.sum(share * (slope + tl.maximum(below, FLOOR) * total), 0)
        tl.store(chunk_stats_ptr + program, chunk_peak)
        tl.store(chunk_stats_ptr + stride_chunk_stats + program, chunk_total)
        tl.store(chunk_stats_ptr + 2 * stride_chunk_stats + program, chunk_slope)


@triton.jit
def _load_entries(entries_ptr, stride_entries, row, entry, n_entries):
    """Largest logits, sums and slopes of a row's blocks or chunks, float64."""
    at = entries_ptr + row * n_entries + entry
    valid = entry < n_entries
    peak = tl.load(at, mask=valid, other=-float("inf")).to(tl.float64)
    total = tl.load(at + stride_entries, mask=valid, other=0.0).to(tl.float64)
    slope = tl.load(at + 2 * stride_entries, mask=valid, other=0.0).to(tl.float64)
    return peak, total, slope


@triton.jit
def _row_totals(logits_row, peak, total, slope, entry, top, cells, SPAN: tl.constexpr, TILE: tl.constexpr):
    """log Σ exp(z − top) and the entropy of a row, from its entries of SPAN cells; NaN where the row is bad."""
    below = peak - top
    weight = tl.exp(below)
    share = weight * total
    spread = tl.sum(weight * slope + share * tl.where(share > 0.0, below, 0.0), 0)
    top_entry = tl.min(tl.where(peak == top, entry, 2147483647), 0)
    poison = tl.sum(share, 0) * 0.0  # NaN from any entry, the top one too
    rest = tl.sum(tl.where(entry == top_entry, 0.0, share), 0) + poison
    # The entry of the largest logit again, cell by cell, without that cell's own 1.
    top_cell = tl.where(top_entry == 2147483647, 0, top_entry) * SPAN
    ties = 0
    for start in range(0, SPAN, TILE):
        cell = top_cell + start + tl.arange(0, TILE)
        z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(tl.float64)
        rest += tl.sum(tl.where(z == top, 0.0, tl.exp(z - top)), 0)
        ties += tl.sum((z == top).to(tl.int32), 0)
    rest += ties - 1
    log_total = _log1p(rest)
    return log_total, log_total - spread / (1.0 + rest)


@triton.jit
def _store_draw(
    logits_row,
    indices_ptr,
    log_attention_ptr,
    row_stats_ptr,
    picked,
    top,
    log_total,
    entropy,
    cells,
    row,
    rows,
    DRAWS: tl.constexpr,
    N: tl.constexpr,
    NEEDED: tl.constexpr,
):
    """Store the draw of one row from its N picked cells, and poison in place of it unless NEEDED of them have mass."""
    draw = tl.arange(0, DRAWS)
    z = tl.load(logits_row + picked, mask=(draw < N) & (picked < cells), other=-float("inf")).to(tl.float64)
    missing = tl.sum(((draw < NEEDED) & (z == -float("inf"))).to(tl.int32), 0)
    bad = (missing > 0) | (log_total != log_total)
    at = row * N + draw
    tl.store(indices_ptr + at, tl.where(bad, -1, picked).to(tl.int64), mask=draw < N)
    tl.store(log_attention_ptr + at, tl.where(bad, float("nan"), (z - top) - log_total), mask=draw < N)
    tl.store(row_stats_ptr + row, top)
    tl.store(row_stats_ptr + rows + row, tl.where(bad, float("nan"), log_total))
    tl.store(row_stats_ptr + 2 * rows + row, tl.where(bad, float("nan"), entropy))
    tl.store(row_stats_ptr + 3 * rows + row, tl.where(bad, float("nan"), top + log_total))


@triton.jit
def _draw_kernel(
    logits_ptr,
    seed_ptr,
    stats_ptr,
    indices_ptr,
    log_attention_ptr,
    row_stats_ptr,
    cells,
    n_blocks,
    rows,
    stride_logits_b,
    stride_stats,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SLOTS: tl.constexpr,
    N: tl.constexpr,
    DRAWS: tl.constexpr,
    NEEDED: tl.constexpr,
    TOPK: tl.constexpr,
):
    # One program: the draw of one row of a small map. BLOCKS, SLOTS and DRAWS are the powers of two that hold its
    # blocks, the CANDIDATES among them and the N draws.
    row = tl.program_id(0)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits_b
    block = tl.arange(0, BLOCKS)
    peak, total, slope = _load_entries(stats_ptr, stride_stats, row.to(tl.int64), block, n_blocks)
    top = tl.max(peak, 0)
    log_total, entropy = _row_totals(logits_row, peak, total, slope, block, top, cells, BLOCK, BLOCK)

    seed = 0
    if TOPK:
        time = -peak
    else:
        seed = tl.load(seed_ptr)
        time = _log_exponential(seed, block, row, BLOCKS_STREAM) - (peak - top) - tl.log(total)
    # The first to ring; past the last with mass, blocks past the end, which hold none.
    slot = tl.arange(0, SLOTS)
    chosen = n_blocks + slot * 0
    for k in range(CANDIDATES):
        first = tl.min(time, 0)
        ringing = tl.min(tl.where(time == first, block, BLOCKS), 0)
        chosen = tl.where(slot == k, tl.where(first < float("inf"), ringing, n_blocks), chosen)
        time = tl.where(block == ringing, float("inf"), time)

    cell = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(tl.float64)
    cell_time = -z if TOPK else _ring_times(z, top, seed, chosen, cell, row)
    draw = tl.arange(0, DRAWS)
    picked = cells + draw * 0
    for k in range(N):
        first = tl.min(tl.min(cell_time, 1), 0)
        ringing = tl.min(tl.min(tl.where(cell_time == first, cell, 2147483647), 1), 0)
        picked = tl.where(draw == k, tl.where(first < float("inf"), ringing, cells), picked)
        cell_time = tl.where(cell == ringing, float("inf"), cell_time)
    _store_draw(
        logits_row, indices_ptr, log_attention_ptr, row_stats_ptr, picked, top, log_total, entropy, cells,
        row.to(tl.int64), rows, DRAWS, N, NEEDED,
    )  # fmt: skip


@triton.jit
def _block_times_kernel(
    seed_ptr,
    stats_ptr,
    chunk_stats_ptr,
    keys_ptr,
    tops_ptr,
    n_blocks,
    n_chunks,
    n_tiles,
    stride_stats,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    TOPK: tl.constexpr,
):
    # One program: the log ring times of TILE blocks of one row (with TOPK, keys that order them), and the row's
    # largest logit.
    program = tl.program_id(0)
    row = program // n_tiles
    chunk = tl.arange(0, CHUNKS)
    chunk_peak = tl.load(
        chunk_stats_ptr + row.to(tl.int64) * n_chunks + chunk, mask=chunk < n_chunks, other=-float("inf")
    )
    top = tl.max(chunk_peak.to(tl.float64), 0)
    tl.store(tops_ptr + row, top)  # the same from each of the row's programs
    block = (program % n_tiles) * TILE + tl.arange(0, TILE)
    peak, total, _ = _load_entries(stats_ptr, stride_stats, row.to(tl.int64), block, n_blocks)
    if TOPK:
        key = _descending_key(peak, block)
    else:
        seed = tl.load(seed_ptr)
        key = _log_exponential(seed, block, row, BLOCKS_STREAM) - (peak - top) - tl.log(total)
    tl.store(keys_ptr + row.to(tl.int64) * n_blocks + block, key, mask=block < n_blocks)


@triton.jit
def _cell_times_kernel(
    logits_ptr,
    seed_ptr,
    chosen_ptr,
    tops_ptr,
    keys_ptr,
    cells,
    n_candidates,
    stride_logits_b,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
):
    # One program: the log ring times of the cells of one candidate block (with TOPK, keys that order them).
    program = tl.program_id(0)
    row = program // n_candidates
    block = tl.load(chosen_ptr + program).to(tl.int32) + tl.arange(0, 1)
    offset = tl.arange(0, BLOCK)
    cell = block[:, None] * BLOCK + offset[None, :]
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits_b
    z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(tl.float64)
    if TOPK:
        key = _descending_key(z, cell)
    else:
        key = _ring_times(z, tl.load(tops_ptr + row), tl.load(seed_ptr), block, cell, row)
    tl.store(keys_ptr + program.to(tl.int64) * BLOCK + offset[None, :], key)


@triton.jit
def _finish_kernel(
    logits_ptr,
    chunk_stats_ptr,
    chosen_ptr,
    order_ptr,
    indices_ptr,
    log_attention_ptr,
    row_stats_ptr,
    cells,
    n_chunks,
    n_candidates,
    rows,
    stride_logits_b,
    stride_chunk_stats,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    N: tl.constexpr,
    DRAWS: tl.constexpr,
    NEEDED: tl.constexpr,
):
    # One program: the draw of one row of a large map, from the places of its cells among those of the candidate blocks.
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_logits_b
    chunk = tl.arange(0, CHUNKS)
    peak, total, slope = _load_entries(chunk_stats_ptr, stride_chunk_stats, row, chunk, n_chunks)
    top = tl.max(peak, 0)
    log_total, entropy = _row_totals(logits_row, peak, total, slope, chunk, top, cells, SPAN, TILE)
    draw = tl.arange(0, DRAWS)
    place = tl.load(order_ptr + row * N + draw, mask=draw < N, other=0).to(tl.int32)
    block = tl.load(chosen_ptr + row * n_candidates + place // BLOCK).to(tl.int32)
    _store_draw(
        logits_row, indices_ptr, log_attention_ptr, row_stats_ptr, block * BLOCK + place % BLOCK, top, log_total,
        entropy, cells, row, rows, DRAWS, N, NEEDED,
    )  # fmt: skip


@triton.jit
def _repeats_kernel(
    seed_ptr,
    distinct_ptr,
    distinct_log_attention_ptr,
    indices_ptr,
    log_attention_ptr,
    n,
    DISTINCT: tl.constexpr,
    PADDED: tl.constexpr,
):
    # One program: turns one row's DISTINCT cells in the order they first come into n draws with replacement; see
    # _repeats in sample.py.
    row = tl.program_id(0)
    cell = tl.arange(0, PADDED)
    distinct_row = row.to(tl.int64) * DISTINCT
    log_attention = distinct_log_attention_ptr + distinct_row + cell
    attention = tl.exp(tl.load(log_attention, mask=cell < DISTINCT, other=-float("inf")))
    following = tl.exp(tl.load(log_attention + 1, mask=cell + 1 < DISTINCT, other=-float("inf")))
    until = tl.where(following > 0.0, tl.cumsum(attention, 0), 2.0)
    seed = tl.load(seed_ptr)
    came = 0
    for k in range(n):
        target = _uniform(seed, k, row, REPEATS_STREAM)
        pick = tl.minimum(tl.sum((until <= target).to(tl.int32), 0), came)
        came = tl.maximum(came, pick + 1)
        at = row.to(tl.int64) * n + k
        tl.store(indices_ptr + at, tl.load(distinct_ptr + distinct_row + pick))
        tl.store(log_attention_ptr + at, tl.load(distinct_log_attention_ptr + distinct_row + pick))


@triton.jit
def _dense_terms(
    peak_ptr, log_total_ptr, entropy_ptr, grad_log_attention_row, grad_logsumexp_ptr, grad_entropy_ptr, row,
    stride_grad_n, stride_grad_lse, stride_grad_entropy, N: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """What the gradients a (common − slope · log a) of a row have in common: peak, log total, common, slope."""
    draw = tl.arange(0, DRAWS)
    grads = tl.load(grad_log_attention_row + draw * stride_grad_n, mask=draw < N, other=0.0)
    slope = tl.load(grad_entropy_ptr + row * stride_grad_entropy)
    common = tl.load(grad_logsumexp_ptr + row * stride_grad_lse) - tl.sum(grads.to(tl.float32), 0)
    common -= slope * tl.load(entropy_ptr + row)
    return tl.load(peak_ptr + row), tl.load(log_total_ptr + row), common, slope


@triton.jit
def _dense_grad(z, peak, log_total, common, slope):
    # z − peak is exact where it matters; z − logsumexp would lose what a large logsumexp has no digits for.
    log_attention = (z - peak) - log_total
    return tl.exp2(log_attention * 1.4426950408889634) * (common - slope * tl.maximum(log_attention, FLOOR))


@triton.jit
def _add_drawn(
    logits_row, indices_row, grad_log_attention_row, grad_row, peak, log_total, common, slope, first, left, right,
    stride_grad_n, N: tl.constexpr, DRAWS: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of those of DRAWS draws from `first` on whose cells lie in [left, right), whole: a cell drawn
    more than once gets the same value from each of its draws, in whatever order they are stored."""
    draw = first + tl.arange(0, DRAWS)
    cell = tl.load(indices_row + draw, mask=draw < N, other=-1)
    mine = (cell >= left) & (cell < right)
    if REPLACE:
        own = tl.zeros([DRAWS], tl.float32)
        for start in range(0, N, DRAWS):
            other = start + tl.arange(0, DRAWS)
            other_cell = tl.load(indices_row + other, mask=other < N, other=-1)
            grad = tl.load(grad_log_attention_row + other * stride_grad_n, mask=other < N, other=0.0)
            same = cell[:, None] == other_cell[None, :]
            own += tl.sum(tl.where(same, grad[None, :].to(tl.float32), 0.0), 1)
    else:
        own = tl.load(grad_log_attention_row + draw * stride_grad_n, mask=mine, other=0.0).to(tl.float32)
    z = tl.load(logits_row + cell, mask=mine, other=0.0).to(tl.float32)
    tl.store(grad_row + cell, own + _dense_grad(z, peak, log_total, common, slope), mask=mine)


@triton.jit
def _bwd_kernel(
    logits_ptr,
    indices_ptr,
    peak_ptr,
    log_total_ptr,
    entropy_ptr,
    grad_log_attention_ptr,
    grad_logsumexp_ptr,
    grad_entropy_ptr,
    grad_logits_ptr,
    cell_units,
    n_chunks,
    stride_logits_b,
    stride_grad_b,
    stride_grad_n,
    stride_grad_lse,
    stride_grad_entropy,
    N: tl.constexpr,
    DRAWS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    REPLACE: tl.constexpr,
    BARRIER: tl.constexpr,
):
    # One program: the gradient of TILE logits of one row; with BARRIER that of the drawn cells among them too. Sizes
    # and strides of logits come in units of UNIT.
    program = tl.program_id(0)
    row = (program // n_chunks).to(tl.int64)
    left = (program % n_chunks) * TILE
    grads_row = grad_log_attention_ptr + row * stride_grad_b
    peak, log_total, common, slope = _dense_terms(
        peak_ptr, log_total_ptr, entropy_ptr, grads_row, grad_logsumexp_ptr, grad_entropy_ptr, row,
        stride_grad_n, stride_grad_lse, stride_grad_entropy, N, DRAWS,
    )  # fmt: skip
    cell = left + tl.arange(0, TILE)
    inside = cell < cell_units * UNIT
    logits_row = logits_ptr + row * stride_logits_b * UNIT
    grad_row = grad_logits_ptr + row * cell_units * UNIT
    z = tl.load(logits_row + cell, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_row + cell, _dense_grad(z, peak, log_total, common, slope), mask=inside)
    if BARRIER:
        tl.debug_barrier()  # the stores above come first
        _add_drawn(
            logits_row, indices_ptr + row * N, grads_row, grad_row, peak, log_total, common, slope,
            0, left, left + TILE, stride_grad_n, N, DRAWS, REPLACE,
        )  # fmt: skip


@triton.jit
def _bwd_drawn_kernel(
    logits_ptr,
    indices_ptr,
    peak_ptr,
    log_total_ptr,
    entropy_ptr,
    grad_log_attention_ptr,
    grad_logsumexp_ptr,
    grad_entropy_ptr,
    grad_logits_ptr,
    cells,
    n_tiles,
    stride_logits_b,
    stride_grad_b,
    stride_grad_n,
    stride_grad_lse,
    stride_grad_entropy,
    N: tl.constexpr,
    DRAWS: tl.constexpr,
    TILE: tl.constexpr,
    REPLACE: tl.constexpr,
):
    # One program: the gradient of the cells of TILE draws of one row, after _bwd_kernel without BARRIER.
    program = tl.program_id(0)
    row = (program // n_tiles).to(tl.int64)
    grads_row = grad_log_attention_ptr + row * stride_grad_b
    peak, log_total, common, slope = _dense_terms(
        peak_ptr, log_total_ptr, entropy_ptr, grads_row, grad_logsumexp_ptr, grad_entropy_ptr, row,
        stride_grad_n, stride_grad_lse, stride_grad_entropy, N, DRAWS,
    )  # fmt: skip
    _add_drawn(
        logits_ptr + row * stride_logits_b, indices_ptr + row * N, grads_row, grad_logits_ptr + row * cells,
        peak, log_total, common, slope, (program % n_tiles) * TILE, 0, cells, stride_grad_n, N, TILE, REPLACE,
    )  # fmt: skip


def _unit(cells: int, stride: int) -> int:
    """The largest power of two up to 16 that divides both."""
    return math.gcd(cells, stride, 16)


def _padded(size: int) -> int:
    return max(2, triton.next_power_of_2(size))


def _blocks_a_program(n_blocks: int, block: int) -> int:
    """Of pass 1: 4,096 logits, on large maps 8,192, which keeps its chunks countable by one program."""
    return min(triton.next_power_of_2(n_blocks), (8192 if block == 512 else 4096) // block)


def sample_triton(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """Draw from float32, float16 or bfloat16 logits (B, K) on a GPU; like `_sample_ref`, with float32 values."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, cells = logits.shape
    stride = logits.stride(0)
    device = logits.device
    block = block_size(cells)
    n_blocks = triton.cdiv(cells, block)
    distinct = min(n, cells)
    topk = seed is None
    candidates = min(n_blocks, distinct if topk else distinct + SPARE_BLOCKS)
    small = n_blocks <= _SMALL_BLOCKS and distinct <= _SMALL_DRAWS

    blocks = _blocks_a_program(n_blocks, block)
    n_chunks = triton.cdiv(n_blocks, blocks)
    unit = _unit(cells, stride)
    wide = torch.float64 if replace else torch.float32
    stats = torch.empty(3, rows, n_blocks, dtype=wide, device=device)
    chunk_stats = stats if small else torch.empty(3, rows, n_chunks, dtype=wide, device=device)
    _statistics_kernel[(rows * n_chunks,)](
        logits, stats, chunk_stats, cells // unit, n_blocks, n_chunks, stride // unit, stats.stride(0),
        chunk_stats.stride(0), block, blocks, unit, replace, not small, num_warps=_warps(blocks * block, 1024),
    )  # fmt: skip

    indices = torch.empty(rows, distinct, dtype=torch.int64, device=device)
    log_attention = torch.empty(rows, distinct, dtype=wide, device=device)
    row_stats = torch.empty(4, rows, dtype=torch.float32, device=device)
    needed = 1 if replace else n
    if small:
        slots = _padded(candidates)
        _draw_kernel[(rows,)](
            logits, seed, stats, indices, log_attention, row_stats, cells, n_blocks, rows, stride, stats.stride(0),
            block, _padded(n_blocks), candidates, slots, distinct, _padded(distinct), needed, topk,
            num_warps=_warps(max(slots * block, 2 * _padded(n_blocks)), 256),
        )  # fmt: skip
    else:
        key_dtype = torch.int64 if topk else torch.float64
        keys = torch.empty(rows, n_blocks, dtype=key_dtype, device=device)
        tops = torch.empty(rows, dtype=torch.float64, device=device)
        tiles = triton.cdiv(n_blocks, 1024)
        _block_times_kernel[(rows * tiles,)](
            seed, stats, chunk_stats, keys, tops, n_blocks, n_chunks, tiles, stats.stride(0),
            _padded(n_chunks), 1024, topk, num_warps=8,
        )  # fmt: skip
        chosen = keys.topk(candidates, largest=False, sorted=False).indices
        keys = torch.empty(rows, candidates * block, dtype=key_dtype, device=device)
        _cell_times_kernel[(rows * candidates,)](
            logits, seed, chosen, tops, keys, cells, candidates, stride, block, topk, num_warps=_warps(block, 128)
        )
        order = keys.topk(distinct, largest=False).indices
        _finish_kernel[(rows,)](
            logits, chunk_stats, chosen, order, indices, log_attention, row_stats, cells, n_chunks, candidates, rows,
            stride, chunk_stats.stride(0), block, blocks * block, min(blocks * block, 1024), _padded(n_chunks),
            distinct, _padded(distinct), needed,
            num_warps=8,
        )  # fmt: skip
    if replace:
        repeated = torch.empty(rows, n, dtype=torch.int64, device=device)
        repeated_log_attention = torch.empty(rows, n, dtype=torch.float32, device=device)
        _repeats_kernel[(rows,)](
            seed, indices, log_attention, repeated, repeated_log_attention, n, distinct, _padded(distinct), num_warps=4
        )
        indices, log_attention = repeated, repeated_log_attention
    peak, log_total, entropy, logsumexp = row_stats.unbind(0)
    return Draw(indices, log_attention, logsumexp, entropy), Statistics(peak, log_total, entropy)


def _warps(elements: int, elements_a_warp: int) -> int:
    return min(8, max(1, triton.next_power_of_2(elements // elements_a_warp)))


def grad_triton(
    logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor, ...], replace: bool
) -> Tensor:
    """The gradient (B, K) of the logits: one read and one write of the map, the same bits every time."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, cells = logits.shape
    n = indices.shape[1]
    grad_log_attention, grad_logsumexp, grad_entropy = grads
    strides = (*grad_log_attention.stride(), grad_logsumexp.stride(0), grad_entropy.stride(0))
    grad_logits = torch.empty(rows, cells, dtype=logits.dtype, device=logits.device)
    tensors = (logits, indices, *statistics, *grads, grad_logits)
    unit = _unit(cells, logits.stride(0))
    tile = min(4096, _padded(cells))
    chunks = triton.cdiv(cells, tile)
    barrier = n <= _BARRIER_DRAWS
    _bwd_kernel[(rows * chunks,)](
        *tensors, cells // unit, chunks, logits.stride(0) // unit, *strides,
        n, _padded(n), tile, unit, replace, barrier, num_warps=_warps(tile, 512),
    )  # fmt: skip
    if not barrier:
        tiles = triton.cdiv(n, _BARRIER_DRAWS)
        _bwd_drawn_kernel[(rows * tiles,)](
            *tensors, cells, tiles, logits.stride(0), *strides, n, _padded(n), _BARRIER_DRAWS, replace, num_warps=4
        )
    return grad_logits


def offline_cases() -> "list[OfflineCase]":
    """What is launched at the sizes that matter: 128 maps of 180×180 and one of 2^24 cells."""
    from ats_kernels._offline import OfflineCase

    sizes = {"cells", "n_blocks", "n_chunks", "n_tiles", "n_candidates", "rows", "n", "cell_units"}
    types = {
        "indices_ptr": "*i64",
        "seed_ptr": "*i64",
        "chosen_ptr": "*i64",
        "order_ptr": "*i64",
        "distinct_ptr": "*i64",
    }
    types |= {"keys_ptr": "*fp64", "tops_ptr": "*fp64", "distinct_log_attention_ptr": "*fp64"}

    def case(
        name: str,
        kernel: triton.JITFunction,
        constexprs: Mapping[str, object],
        num_warps: int,
        elements: int,
        bytes_per_element: float,
        budget: float,
        dtype: str = "fp32",
        wide: bool = False,
        needs: tuple[str, ...] = (),
    ) -> OfflineCase:
        here = dict(types)
        here |= {"logits_ptr": f"*{dtype}", "grad_logits_ptr": f"*{dtype}"}
        if wide:
            here |= {"stats_ptr": "*fp64", "chunk_stats_ptr": "*fp64"}
        if constexprs.get("TOPK"):
            here["keys_ptr"] = "*i64"
        signature = {
            arg: here.get(arg, "i32" if arg in sizes or arg.startswith("stride") else "*fp32")
            for arg in kernel.arg_names
            if arg not in constexprs
        }
        # Strides in units of 16 elements are any number; pointers come from torch, aligned.
        aligned = tuple(arg for arg in signature if arg.endswith("_ptr"))
        return OfflineCase(
            name, kernel, signature, dict(constexprs), aligned, num_warps, elements, bytes_per_element, budget, needs
        )

    cases = []
    for dtype, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        load = (r"ld\.global\S*\.v4",)
        for block, chunks in ((64, False), (512, True)):
            tile = 8192 if chunks else 4096
            cases.append(case(
                f"statistics {dtype} blocks of {block}", _statistics_kernel,
                {"BLOCK": block, "BLOCKS": tile // block, "UNIT": 16, "WIDE": False, "CHUNKS": chunks},
                _warps(tile, 1024), tile, size, 22 if block == 64 else 21 if size == 4 else 33, dtype, needs=load,
            ))  # fmt: skip
        cases.append(case(
            f"bwd {dtype}", _bwd_kernel,
            {"N": 10, "DRAWS": 16, "TILE": 4096, "UNIT": 16, "REPLACE": False, "BARRIER": True},
            8, 4096, 2 * size, 22, dtype, needs=(*load, r"st\.global\S*\.v4"),
        ))  # fmt: skip
    cases.append(case(
        "statistics fp32, float64 sums", _statistics_kernel,
        {"BLOCK": 64, "BLOCKS": 64, "UNIT": 16, "WIDE": True, "CHUNKS": False}, 4, 4096, 4, 80, wide=True,
    ))  # fmt: skip
    for topk in (False, True):
        way = "topk" if topk else "sample"
        cases += [
            case(
                f"draw {way}, 507 blocks", _draw_kernel,
                {"BLOCK": 64, "BLOCKS": 512, "CANDIDATES": 14, "SLOTS": 16}
                | {"N": 10, "DRAWS": 16, "NEEDED": 10, "TOPK": topk},
                4, 512 * 64, 12 / 64, 45,
            ),
            case(
                f"block times {way}", _block_times_kernel,
                {"CHUNKS": 2048, "TILE": 1024, "TOPK": topk} | ({"seed_ptr": None} if topk else {}),
                8, 1024 * 512, 20 / 512, 2,
            ),
            case(
                f"cell times {way}", _cell_times_kernel,
                {"BLOCK": 512, "TOPK": topk} | ({"seed_ptr": None} if topk else {}), 4, 512, 12, 1000,
            ),
        ]  # fmt: skip
    cases += [
        case(
            "finish", _finish_kernel,
            {"BLOCK": 512, "SPAN": 8192, "TILE": 1024, "CHUNKS": 2048, "N": 256, "DRAWS": 256, "NEEDED": 256},
            8, 2048 * 8192, 12 / 8192, 2,
        ),
        case("repeats", _repeats_kernel, {"DISTINCT": 10, "PADDED": 16}, 4, 10, 40, 4500),
        case(
            "bwd of 256 drawn", _bwd_drawn_kernel,
            {"N": 256, "DRAWS": 256, "TILE": 64, "REPLACE": True}, 4, 64, 24, 2000,
        ),
    ]  # fmt: skip
    return cases
