"""Triton kernels of `sample`'s forward: what a row's blocks hold, and the draw of a row of a small map.

`statistics_kernel`, then `draw_kernel`; `repeats_kernel` turns what they draw into a draw with replacement. Large maps
and many draws take the kernels of `sample_kernels_large` in place of `draw_kernel`, built from the functions here.

Precision: sums over a block are float32 (float64 with replacement, where the order of the draws rests on the total),
taken relative to the block's largest logit. Totals, ring times and log a are float64, and so is the sum over the block
(on large maps the program's blocks) of the row's largest logit less its own 1: log a and 1 − a keep a relative
precision of about 1e-6 however near 1 a is. No atomics; deterministic.
"""

import triton
import triton.language as tl

from ats_kernels import philox

BLOCKS_STREAM = tl.constexpr(philox.BLOCKS)
CELLS_STREAM = tl.constexpr(philox.CELLS)
REPEATS_STREAM = tl.constexpr(philox.REPEATS)

# One variant of a kernel for all sizes: what is worth knowing of them UNIT and powers of two say.
SIZES = (
    "cells", "cell_units", "n_blocks", "n_chunks", "n_tiles", "n_candidates", "n_draws", "n_repeats", "needed", "rows",
    "stride_logits_b", "stride_stats", "stride_chunk_stats",
)  # fmt: skip

FLOOR = tl.constexpr(-104.0)  # exp is 0 in float32 from here down


@triton.jit
def _uniform(seed, index, row, STREAM: tl.constexpr):
    """float64 in [2^-54, 1 − 2^-53]; see philox.uniform. Literals are float32, so these are powers of two."""
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
    """The logarithm of an exponential variable, float64; see philox.log_exponential."""
    return tl.log(-_log1p(-_uniform(seed, index, row, STREAM)))


@triton.jit
def block_times(seed, block, row, peak, top, total):
    """Log times at which blocks first ring, from their largest logits and their sums of exponentials."""
    return _log_exponential(seed, block, row, BLOCKS_STREAM) - (peak - top) - tl.log(total)


@triton.jit
def ring_times(z, top, seed, block, cell, row):
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


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    logits_ptr,  # (B, K)
    stats_ptr,  # (3, B, blocks), written
    chunk_stats_ptr,  # (3, B, chunks), written with CHUNKS
    cell_units,
    n_blocks,
    n_chunks,
    stride_logits_b,
    stride_stats,
    stride_chunk_stats,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program: of BLOCKS blocks of one row, each block's largest logit m, Σ exp(z − m) and Σ (z − m) exp(z − m);
    with CHUNKS the same of all of them together. Sizes and strides come in units of UNIT logits, so that vector loads
    are provably aligned."""
    program = tl.program_id(0)
    row = (program // n_chunks).to(tl.int64)
    chunk = program % n_chunks
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    # (slices of a block, blocks, cells): so laid out, a warp holds whole blocks and a thread sums over slices alone.
    # SLICE is 128 at most, but the whole block with Triton 3.6, which would hold each slice in shared memory.
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
def load_entries(entries_ptr, stride_entries, row, entry, n_entries):
    """Largest logits, sums and slopes of a row's blocks or chunks, float64."""
    at = entries_ptr + row * n_entries + entry
    valid = entry < n_entries
    peak = tl.load(at, mask=valid, other=-float("inf")).to(tl.float64)
    total = tl.load(at + stride_entries, mask=valid, other=0.0).to(tl.float64)
    slope = tl.load(at + 2 * stride_entries, mask=valid, other=0.0).to(tl.float64)
    return peak, total, slope


@triton.jit
def row_totals(logits_row, peak, total, slope, entry, top, cells, SPAN: tl.constexpr, TILE: tl.constexpr):
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
def descending_key(z, index):
    """int64 keys whose ascending order is that of z descending, then of the index."""
    bits = (z.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # + 0.0: −0 and 0 are one value
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((~ascending).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def store_draw(
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
    rank,
    n_draws,
    needed,
    DRAWS: tl.constexpr,
):
    """Store the draw of one row from its picked cells, each at its rank, and poison in place of it unless those needed
    have mass."""
    draw = tl.arange(0, DRAWS)
    z = tl.load(logits_row + picked, mask=(draw < n_draws) & (picked < cells), other=-float("inf")).to(tl.float64)
    missing = tl.sum(((rank < needed) & (draw < n_draws) & (z == -float("inf"))).to(tl.int32), 0)
    bad = (missing > 0) | (log_total != log_total)
    at = row * n_draws + rank
    tl.store(indices_ptr + at, tl.where(bad, -1, picked).to(tl.int64), mask=draw < n_draws)
    # Only a masked cell has no logarithm that float32 holds.
    log_attention = tl.maximum((z - top) - log_total, -3.4028234663852886e38)
    tl.store(log_attention_ptr + at, tl.where(bad, float("nan"), log_attention), mask=draw < n_draws)
    tl.store(row_stats_ptr + row, top)
    tl.store(row_stats_ptr + rows + row, tl.where(bad, float("nan"), log_total))
    tl.store(row_stats_ptr + 2 * rows + row, tl.where(bad, float("nan"), entropy))
    tl.store(row_stats_ptr + 3 * rows + row, tl.where(bad, float("nan"), top + log_total))


@triton.jit
def _repeat(
    seed, distinct_ptr, distinct_log_attention_ptr, indices_ptr, log_attention_ptr, row, n_distinct, n_draws,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Turn one row's distinct cells in the order they first come into n_draws with replacement; see repeats in
    draws.py."""
    cell = tl.arange(0, PADDED)
    distinct_row = row.to(tl.int64) * n_distinct
    log_attention = distinct_log_attention_ptr + distinct_row + cell
    attention = tl.exp(tl.load(log_attention, mask=cell < n_distinct, other=-float("inf")))
    following = tl.exp(tl.load(log_attention + 1, mask=cell + 1 < n_distinct, other=-float("inf")))
    until = tl.where(following > 0.0, tl.cumsum(attention, 0), 2.0)
    came = 0
    for k in range(n_draws):
        target = _uniform(seed, k, row, REPEATS_STREAM)
        pick = tl.minimum(tl.sum((until <= target).to(tl.int32), 0), came)
        came = tl.maximum(came, pick + 1)
        at = row.to(tl.int64) * n_draws + k
        tl.store(indices_ptr + at, tl.load(distinct_ptr + distinct_row + pick))
        tl.store(log_attention_ptr + at, tl.load(distinct_log_attention_ptr + distinct_row + pick))


@triton.jit
def _rank(keys, draw, n_draws):
    """The places of the first n_draws of some keys in ascending order; those of equal ones in the order they are in."""
    other = keys[None, :]
    earlier = (other < keys[:, None]) | ((other == keys[:, None]) & (draw[None, :] < draw[:, None]))
    return tl.sum((earlier & (draw[None, :] < n_draws)).to(tl.int32), 1)


@triton.jit(do_not_specialize=SIZES)
def draw_kernel(
    logits_ptr,  # (B, K)
    seed_ptr,  # (); None with TOPK
    stats_ptr,  # (3, B, blocks)
    indices_ptr,  # (B, N) distinct cells in draw order, written
    log_attention_ptr,  # (B, N), written
    row_stats_ptr,  # (4, B), written: largest logit, log total, entropy, logsumexp
    repeats_ptr,  # (B, n) a draw with replacement made of the distinct cells, written; None: not wanted
    repeats_log_attention_ptr,  # (B, n), written
    cells,
    n_blocks,
    n_candidates,
    n_draws,
    n_repeats,
    needed,
    rows,
    stride_logits_b,
    stride_stats,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    DRAWS: tl.constexpr,
    TOPK: tl.constexpr,
):
    """One program: the draw of one row of a small map. BLOCKS and DRAWS are powers of two that hold its blocks and its
    N draws. The candidate blocks come SLOTS at a time, in the order in which they ring, and their cells take the place
    of what rang latest of those that came before."""
    row = tl.program_id(0)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits_b
    block = tl.arange(0, BLOCKS)
    peak, total, slope = load_entries(stats_ptr, stride_stats, row.to(tl.int64), block, n_blocks)
    top = tl.max(peak, 0)
    log_total, entropy = row_totals(logits_row, peak, total, slope, block, top, cells, BLOCK, BLOCK)

    seed = 0
    if TOPK:
        never = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
        key = tl.where(peak > -float("inf"), descending_key(peak, block), never)
    else:
        seed = tl.load(seed_ptr)
        never = tl.full((), float("inf"), tl.float64)
        key = block_times(seed, block, row, peak, top, total)

    draw = tl.arange(0, DRAWS)
    slot = tl.arange(0, SLOTS)
    index = tl.arange(0, SLOTS * BLOCK)
    best = tl.where(draw < n_draws, never, -never)  # keys, in any order
    picked = cells + draw * 0
    for start in range(0, n_candidates, SLOTS):
        # The next to ring; past the last with mass, blocks past the end, which hold none.
        chosen = n_blocks + slot * 0
        for k in range(tl.minimum(n_candidates - start, SLOTS)):
            first, place = tl.min(key, 0, return_indices=True)
            chosen = tl.where(slot == k, tl.where(first < never, place, n_blocks), chosen)
            key = tl.where(block == place, never, key)
        cell = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(tl.float64)
        if TOPK:
            cell_key = tl.where(z > -float("inf"), descending_key(z, cell), never)
        else:
            cell_key = ring_times(z, top, seed, chosen, cell, row)
        cell_key = tl.reshape(cell_key, (SLOTS * BLOCK,))
        first, place = tl.min(cell_key, 0, return_indices=True)
        latest, at = tl.max(best, 0, return_indices=True)
        while first < latest:
            its_block = tl.sum(tl.where(slot == place // BLOCK, chosen, 0), 0)
            picked = tl.where(draw == at, its_block * BLOCK + place % BLOCK, picked)
            best = tl.where(draw == at, first, best)
            cell_key = tl.where(index == place, never, cell_key)
            first, place = tl.min(cell_key, 0, return_indices=True)
            latest, at = tl.max(best, 0, return_indices=True)

    store_draw(
        logits_row, indices_ptr, log_attention_ptr, row_stats_ptr, picked, top, log_total, entropy, cells,
        row.to(tl.int64), rows, _rank(best, draw, n_draws), n_draws, needed, DRAWS,
    )  # fmt: skip
    if repeats_ptr is not None:
        tl.debug_barrier()  # the stores above come first
        _repeat(
            seed, indices_ptr, log_attention_ptr, repeats_ptr, repeats_log_attention_ptr, row, n_draws, n_repeats, DRAWS
        )


@triton.jit(do_not_specialize=SIZES)
def repeats_kernel(
    seed_ptr,  # ()
    distinct_ptr,  # (B, N)
    distinct_log_attention_ptr,  # (B, N)
    indices_ptr,  # (B, n), written
    log_attention_ptr,  # (B, n), written
    n_draws,
    n_repeats,
    PADDED: tl.constexpr,
):
    """One program: `_repeat` of one row."""
    _repeat(
        tl.load(seed_ptr), distinct_ptr, distinct_log_attention_ptr, indices_ptr, log_attention_ptr, tl.program_id(0),
        n_draws, n_repeats, PADDED,
    )  # fmt: skip
