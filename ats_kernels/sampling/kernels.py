"""Triton kernels of `sample`'s forward: what a row's blocks hold, and what its draws are made of.

`statistics_kernel`, then `draw_kernel` of `kernels_draw`, or `select_kernel` of `kernels_large` for large maps and many
draws. All are built from the functions here.

Precision: sums over a block are float32 (on large maps float64 with replacement, where the order of the draws rests on
the total), taken relative to the block's largest logit. What is left of a row beside its largest logit is summed
without that one's own 1, and nothing cancels: log a and 1 − a keep a relative precision of about 1e-6 however near 1 a
is, in float32 on small maps and in float64 on large ones. The same bits every time: atomics count, whole numbers only.
"""

import triton
import triton.language as tl

from ats_kernels import philox

BLOCKS_STREAM = tl.constexpr(philox.BLOCKS)
CELLS_STREAM = tl.constexpr(philox.CELLS)
REPEATS_STREAM = tl.constexpr(philox.REPEATS)

# One variant of a kernel for all sizes: what is worth knowing of them UNIT and powers of two say.
SIZES = (
    "cells", "cell_units", "n_blocks", "n_groups", "n_chunks", "n_programs", "n_candidates", "n_draws", "n_repeats",
    "capacity", "needed", "rows", "stride_logits_b", "stride_stats", "stride_chunk_stats", "stride_keys",
)  # fmt: skip

FLOOR = tl.constexpr(-104.0)  # exp is 0 in float32 from here down
E = tl.constexpr(2.0**-24)  # the most that float32 rounds by
FAR = tl.constexpr(1e30)
NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # past all keys


@triton.jit
def random_words(seed, index, row, STREAM: tl.constexpr):
    """Words of 32 random bits and of 21, from which a random number is made; see philox.py."""
    zero = index * 0
    word_0, word_1, word_2, word_3 = tl.philox(seed, index >> 1, zero + row, zero + STREAM, zero)
    odd = (index & 1) == 1
    return tl.where(odd, word_2, word_0), tl.where(odd, word_3, word_1) >> 11


@triton.jit
def uniform(seed, index, row, STREAM: tl.constexpr, DTYPE: tl.constexpr = tl.float64):
    """In [2^-54, 1 − 2^-53]; see philox.uniform. In float32 rounded, to 1 perhaps. Literals are float32, so
    these are powers of two."""
    high, low = random_words(seed, index, row, STREAM)
    u = high.to(DTYPE) * 2.0**-32 + low.to(DTYPE) * 2.0**-53 + 2.0**-54
    return u - (u >= 1.0).to(DTYPE) * 2.0**-53


@triton.jit
def log1p(x):
    """log(1 + x) of x > −1 to full relative precision."""
    y = 1.0 + x
    rounded = y - 1.0
    return tl.where(rounded == 0.0, x, tl.log(y) * (x / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def log_exponential(seed, index, row, STREAM: tl.constexpr):
    """The logarithm of an exponential variable, float64; see philox.log_exponential."""
    return tl.log(-log1p(-uniform(seed, index, row, STREAM)))


@triton.jit
def log_exponential_in_float32(seed, index, row, STREAM: tl.constexpr):
    """The logarithm of an exponential variable in float32, at both ends to the precision that `kernels_draw` states."""
    high, low = random_words(seed, index, row, STREAM)
    u = high.to(tl.float32) * 2.0**-32 + low.to(tl.float32) * 2.0**-53 + 2.0**-54
    # 1 − u from the complements of its bits, the last of which float64 rounds.
    lower = low ^ 0x1FFFFF
    v = (high ^ 0xFFFFFFFF).to(tl.float32) * 2.0**-32 + (lower + (lower & 1)).to(tl.float32) * 2.0**-53
    small = u < 0.5
    left = tl.where(small, 1.0 - u, tl.maximum(v, 2.0**-53))
    taken = 1.0 - left
    # What 1 − u lost in rounding, the quotient makes up for.
    exponential = -tl.log(left) * tl.where(small, u / tl.where(taken == 0.0, 1.0, taken), 1.0)
    return tl.log(tl.where(taken == 0.0, u, exponential))


@triton.jit
def block_times(seed, block, row, peak, top, total):
    """Log times at which blocks first ring, from their largest logits and their sums of exponentials."""
    return log_exponential(seed, block, row, BLOCKS_STREAM) - (peak - top) - tl.log(total)


@triton.jit
def ring_times(z, top, seed, block, cell, row):
    """Log ring times (S, BLOCK) of the cells of S blocks; see ring_times in sample.py."""
    log_mass = z - top
    largest = tl.max(log_mass, 1)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(tl.exp(log_mass - largest[:, None]), 1)
    block_time = log_exponential(seed, block, row, BLOCKS_STREAM) - (tl.log(total) + largest)
    alone = log_exponential(seed, cell, row, CELLS_STREAM) - log_mass
    first = tl.min(alone, 1)
    first = tl.where(first == float("inf"), 0.0, first)
    excess = alone + tl.log(1.0 - tl.exp(first[:, None] - alone))
    late = tl.maximum(block_time[:, None], excess)
    early = tl.minimum(block_time[:, None], excess)
    both = late + tl.log(1.0 + tl.exp(early - tl.where(late == float("inf"), 0.0, late)))
    return tl.where(late == float("inf"), float("inf"), both)


@triton.jit
def ascending_32(x):
    """int64 keys whose order is that of float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def descending_key(z, index):
    """int64 keys whose ascending order is that of z descending, then of the index."""
    bits = (z.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # + 0.0: −0 and 0 are one value
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((~ascending).to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def ring_bounds(seed, block, row, peak, total):
    """When blocks first ring at the earliest and at the latest, float32 logarithms of times that are not relative to
    anything: before the row's largest logit is known. `kernels_large` derives the bound."""
    time = log_exponential_in_float32(seed, block, row, BLOCKS_STREAM) - tl.log(total) - peak
    error = E * (768.0 + 6.0 * (tl.abs(time) + tl.abs(peak)))
    near = tl.abs(peak) < FAR
    early = tl.where(near, time - error, tl.where(peak > 0.0, -float("inf"), FAR * 0.5))
    early = tl.where(peak == -float("inf"), float("inf"), early)
    return early, tl.where(near, time + error, float("inf"))


@triton.jit(do_not_specialize=SIZES)
def statistics_kernel(
    logits_ptr,  # (B, K)
    stats_ptr,  # (3, B, blocks), written
    chunk_stats_ptr,  # (3, B, chunks), written; None on small maps, and so are the next three
    group_keys_ptr,  # (B, groups), written
    counters_ptr,  # (B, 2), set to 0
    seed_ptr,  # (); None for topk too
    cell_units,
    n_blocks,
    n_groups,
    n_chunks,
    stride_logits_b,
    stride_stats,
    stride_chunk_stats,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: of BLOCKS blocks of one row, each block's largest logit m, Σ exp(z − m) and Σ (z − m) exp(z − m).
    On large maps these of all of them together, of each block when it rings at the earliest in place of the last, and
    of every GROUP blocks the key of when one of them has rung for sure (for topk, of what comes first). Sizes and
    strides come in units of UNIT logits, so that vector loads are provably aligned."""
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
    if chunk_stats_ptr is None:
        tl.store(stats_row + 2 * stride_stats, slope, mask=block < n_blocks)
    else:
        # Loaded again a block a thread: as they lie, each thread would work on several, and all on the same.
        tl.debug_barrier()
        own = chunk * BLOCKS + tl.arange(0, BLOCKS)
        own_row = stats_ptr + row * n_blocks + own
        own_peak = tl.load(own_row, mask=own < n_blocks, other=-float("inf")).to(tl.float32)
        if seed_ptr is None:
            key = tl.where(own_peak > -float("inf"), descending_key(own_peak, own), NEVER)
        else:
            own_total = tl.load(own_row + stride_stats, mask=own < n_blocks, other=0.0).to(tl.float32)
            early, late = ring_bounds(tl.load(seed_ptr), own, row.to(tl.int32), own_peak, own_total)
            tl.store(own_row + 2 * stride_stats, early, mask=own < n_blocks)
            key = tl.where(late < float("inf"), ascending_32(late), NEVER)
        group_key = tl.min(tl.reshape(key, (BLOCKS // GROUP, GROUP)), 1)
        group = chunk * (BLOCKS // GROUP) + tl.arange(0, BLOCKS // GROUP)
        tl.store(group_keys_ptr + row * n_groups + group, group_key, mask=group < n_groups)
        tl.store(counters_ptr + 2 * row + tl.arange(0, 2), 0, mask=tl.arange(0, 2) < 2 * (chunk == 0).to(tl.int32))
        chunk_peak = tl.max(peak, 0)
        below = peak - tl.where(chunk_peak == -float("inf"), 0.0, chunk_peak)
        share = tl.exp(below)
        chunk_total = tl.sum(share * total, 0)
        chunk_slope = tl.sum(share * (slope + tl.maximum(below, FLOOR) * total), 0)
        tl.store(chunk_stats_ptr + program, chunk_peak)
        tl.store(chunk_stats_ptr + stride_chunk_stats + program, chunk_total)
        tl.store(chunk_stats_ptr + 2 * stride_chunk_stats + program, chunk_slope)


@triton.jit
def load_entries(entries_ptr, stride_entries, row, entry, n_entries, DTYPE: tl.constexpr = tl.float64):
    """Largest logits, sums and slopes of a row's blocks or chunks."""
    at = entries_ptr + row * n_entries + entry
    valid = entry < n_entries
    peak = tl.load(at, mask=valid, other=-float("inf")).to(DTYPE)
    total = tl.load(at + stride_entries, mask=valid, other=0.0).to(DTYPE)
    slope = tl.load(at + 2 * stride_entries, mask=valid, other=0.0).to(DTYPE)
    return peak, total, slope


@triton.jit
def _exp_of_difference(a, b):
    """exp(a − b) for a ≤ b to the relative precision of the dtype, 0 below e^−104 in float32, however far they are."""
    if a.dtype == tl.float64:
        return tl.exp(a - b)
    difference = a - b
    above = difference - a
    lost = (a - (difference - above)) - (b + above)  # what the subtraction rounded off (Knuth)
    lost = tl.where(difference > FLOOR, lost, 0.0)
    difference = tl.maximum(difference, FLOOR)
    # A power of 2 and a small rest: a product with log2(e) alone would lose what the difference has before its point.
    power = tl.floor(difference * 1.4426950408889634 + 0.5)
    rest = ((difference - power * 0.693359375) + power * 2.1219444005469057e-4) + lost
    return tl.exp2(power) * tl.exp(rest)


@triton.jit
def row_totals(logits_row, peak, total, slope, entry, top, cells, SPAN: tl.constexpr, TILE: tl.constexpr):
    """log Σ exp(z − top) and the entropy of a row, from its entries of SPAN cells; NaN where the row is bad. In the
    entries' dtype: nothing in it cancels."""
    below = peak - top
    weight = _exp_of_difference(peak, top)
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
        z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(peak.dtype)
        rest += tl.sum(tl.where(z == top, 0.0, _exp_of_difference(z, top)), 0)
        ties += tl.sum((z == top).to(tl.int32), 0)
    rest += ties - 1
    log_total = log1p(rest)
    return log_total, log_total - spread / (1.0 + rest)


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
    z = tl.load(logits_row + picked, mask=(draw < n_draws) & (picked < cells), other=-float("inf")).to(top.dtype)
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
def repeat(
    seed, attention, more, distinct_ptr, distinct_log_attention_ptr, indices_ptr, log_attention_ptr, row, n_distinct,
    n_draws, PADDED: tl.constexpr,
):  # fmt: skip
    """Turn one row's distinct cells in the order they first come into n_draws with replacement; see repeats in
    draws.py. In the dtype of their `attention` (PADDED,); `more`: another follows that can come. Returns how near
    (PADDED,) a random number came to each cell's end."""
    distinct_row = row.to(tl.int64) * n_distinct
    ends = tl.cumsum(attention, 0)
    until = tl.where(more, ends, 2.0)
    came = 0
    nearest = attention * 0.0 + 1.0
    for k in range(n_draws):
        target = uniform(seed, k, row, REPEATS_STREAM, attention.dtype)
        nearest = tl.minimum(nearest, tl.abs(ends - target))
        pick = tl.minimum(tl.sum((until <= target).to(tl.int32), 0), came)
        came = tl.maximum(came, pick + 1)
        at = row.to(tl.int64) * n_draws + k
        tl.store(indices_ptr + at, tl.load(distinct_ptr + distinct_row + pick))
        tl.store(log_attention_ptr + at, tl.load(distinct_log_attention_ptr + distinct_row + pick))
    return nearest
