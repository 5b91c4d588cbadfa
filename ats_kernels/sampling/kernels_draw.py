"""The Triton kernel that draws from a row of a small map, `draw_kernel`: float32, and float64 where that cannot tell.

**Which cells are drawn, and in what order, is what float64 says**: draws are the same on every device. Consumer GPUs do
float64 at a 64th of float32's rate, though, and it matters only where two ring times are nearly one. So times are
computed in float32, each with a bound on its error, and so is an interval that holds what float64 would give. The N
cells with the earliest beginnings are taken, in that order. Where each interval ends before the next one begins, and
the last before that of any cell or block that was left, float64 could not order them differently. Where two meet, the
row is drawn anew by `draw_in_float64`: about one row in a hundred at N = 10, one in ten at N = 64.

**The bound**, with e = 2^-24, the most that float32 rounds by, and what compilers make of the functions: log is right
to 2e of its value, exp to 4e + |x| e, a division to 4e. Everything is counted as if it erred its most in one direction:

- A random number from its words, and 1 less it: 2e relative. An exponential E: 9e relative (its logarithm, a quotient,
  a product). log E: 9e + 2e |log E|.
- The log sum of a block: 24e for the order of the sum, 10e for its terms, 2e × 4.9 for the logarithm of up to 128.
- So a block's time T = log E − (log sum + largest): 72e + e (3 |T| + 4 |largest|), as |log E| ≤ |T| + |largest| + 4.9.
- A cell's own time t = log E − log m: 9e + e (3 |t| + 3 |log m|). That of the block's first cell, f, has an |log m|
  that is not at hand, but |log E| ≤ 37.5 bounds it by |f| + 37.5: 123e + 4e |f| covers it.
- A cell rings at log(e^T + e^t − e^f), whose derivatives are at most 1 by T and A = e^t / (that sum) by t and by f. The
  difference, its logarithm and that of the sum add 10e A + e (10 + 2 |time|). So, with all that is left rounded up,

      error ≤ 96e + 5e (|T| + |largest| + |time|) + A (176e + 5e (|t| + |f| + |log m|)),

  at least a quarter more than the terms come to. The first cell of a block rings at T itself: A counts as 0. Where
  float32 takes the wrong cell for the first, A's part of the other's bound reaches down to T, and the two meet.

Times farther than FAR from 0, of cells that hold next to nothing, are left to float64 if they come to be drawn.
"""

import triton
import triton.language as tl

from ats_kernels.sampling.kernels import (
    BLOCKS_STREAM,
    CELLS_STREAM,
    FAR,
    NEVER,
    SIZES,
    E,
    block_times,
    descending_key,
    load_entries,
    log1p,
    log_exponential_in_float32,
    repeat,
    ring_times,
    row_totals,
    store_draw,
)

CELL_BITS = tl.constexpr(18)  # of a key: a small map's cells, 2,048 blocks of 128 at most
# How near a random number may come to where a drawn cell ends, in a draw with replacement. Where they end is off by the
# relative errors of N probabilities, times these: 60e for the total and 64e for running sums, 8e for an exponential,
# and 2e |log a|, of which the mean is below 5: 142e, and twice that with the random number's own.
NEAR = tl.constexpr(288 * 2.0**-24)


@triton.jit
def _key(soonest, error, index):
    """int64 whose order is that of `soonest`, then of the rest: 32 bits of it, 14 of the error, 18 of the index."""
    bits = soonest.to(tl.int32, bitcast=True)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    code = (error.to(tl.int32, bitcast=True) >> 17) + 1  # rounded up to 6 bits after the first
    return (ascending.to(tl.int64) << 32) | (code.to(tl.int64) << CELL_BITS) | index.to(tl.int64)


@triton.jit
def _soonest(key):
    """When what has this key rings at the earliest."""
    ascending = (key >> 32).to(tl.int32)
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _latest(key):
    """And at the latest."""
    code = ((key >> CELL_BITS) & 0x3FFF).to(tl.int32)
    return _soonest(key) + 2.0 * (code << 17).to(tl.float32, bitcast=True)


@triton.jit
def _block_keys(seed, block, row, peak, top, total):
    below = peak - top
    time = log_exponential_in_float32(seed, block, row, BLOCKS_STREAM) - below - tl.log(total)
    soonest = time - E * (96.0 + 5.0 * (tl.abs(time) + tl.abs(below)))
    soonest = tl.where(below > -FAR, tl.minimum(soonest, FAR), FAR)
    return tl.where(peak > -float("inf"), _key(soonest, tl.abs(soonest) * 0.0, block), NEVER)


@triton.jit
def _cell_keys(z, top, seed, block, cell, row):
    """Keys (S, BLOCK) of the cells of S blocks, from their ring times as ring_times in draws.py has them."""
    log_mass = z - top
    peak = tl.max(z, 1)
    peak = tl.where(peak == -float("inf"), top, peak)
    total = tl.sum(tl.exp(z - peak[:, None]), 1)
    largest = peak - top
    block_time = log_exponential_in_float32(seed, block, row, BLOCKS_STREAM) - (tl.log(total) + largest)
    alone = log_exponential_in_float32(seed, cell, row, CELLS_STREAM) - log_mass
    first = tl.min(alone, 1)
    first = tl.where(first == float("inf"), 0.0, first)[:, None]
    excess = alone + tl.log(1.0 - tl.exp(first - alone))
    late = tl.maximum(block_time[:, None], excess)
    early = tl.minimum(block_time[:, None], excess)
    time = late + tl.log(1.0 + tl.exp(early - late))

    of_block = tl.abs(block_time) + tl.abs(largest)
    error = E * (96.0 + 5.0 * (of_block[:, None] + tl.abs(time)))
    of_cell = tl.abs(alone) + tl.abs(first) + tl.abs(log_mass)
    error += tl.where(alone == first, 0.0, tl.exp(alone - time) * (E * (176.0 + 5.0 * of_cell)))
    # No cell rings before its block.
    soonest = tl.maximum(time - error, (block_time - E * (96.0 + 5.0 * of_block))[:, None])
    near = log_mass > -FAR
    soonest = tl.where(near, tl.minimum(soonest, FAR), FAR)
    error = tl.where(near, tl.minimum(error, FAR), FAR)
    return tl.where(z > -float("inf"), _key(soonest, error, cell), NEVER)


@triton.jit
def _rank(keys, draw, n_draws):
    """The places of the first n_draws of some keys, all different, in ascending order."""
    earlier = (keys[None, :] < keys[:, None]) & (draw[None, :] < n_draws)
    return tl.sum(earlier.to(tl.int32), 1)


@triton.jit
def draw_in_float64(
    logits_row, stats_ptr, stride_stats, seed, top, cells, n_blocks, n_candidates, n_draws, row,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """The cells drawn (DRAWS,) and their ranks. The candidate blocks come SLOTS at a time, in the order in which they
    ring, and their cells take the place of what rang latest of those that came before."""
    block = tl.arange(0, BLOCKS)
    peak, total, _ = load_entries(stats_ptr, stride_stats, row.to(tl.int64), block, n_blocks)
    top = top.to(tl.float64)
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
        cell_key = tl.reshape(ring_times(z, top, seed, chosen, cell, row), (SLOTS * BLOCK,))
        first, place = tl.min(cell_key, 0, return_indices=True)
        latest, at = tl.max(best, 0, return_indices=True)
        while first < latest:
            its_block = tl.sum(tl.where(slot == place // BLOCK, chosen, 0), 0)
            picked = tl.where(draw == at, its_block * BLOCK + place % BLOCK, picked)
            best = tl.where(draw == at, first, best)
            cell_key = tl.where(index == place, never, cell_key)
            first, place = tl.min(cell_key, 0, return_indices=True)
            latest, at = tl.max(best, 0, return_indices=True)
    # One after the other, in place of all against all: few registers beside those that wait.
    best = tl.where(draw < n_draws, tl.minimum(best, 1.7976931348623157e308), never)
    rank = draw
    for k in range(n_draws):
        place = tl.argmin(best, 0)
        rank = tl.where(draw == place, k, rank)
        best = tl.where(draw == place, never, best)
    return picked, rank


@triton.jit
def log_attention_in_float64(logits_row, top, picked, cells, BLOCK: tl.constexpr):
    """log a (DRAWS,) of the picked cells, from the whole row."""
    rest = tl.zeros((BLOCK,), tl.float64)
    ties = 0
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(tl.float64)
        rest += tl.where(z == top, 0.0, tl.exp(z - top))
        ties += tl.sum((z == top).to(tl.int32), 0)
    log_total = log1p(tl.sum(rest, 0) + (ties - 1))
    z = tl.load(logits_row + picked, mask=(picked >= 0) & (picked < cells), other=-float("inf")).to(tl.float64)
    return (z - top) - log_total


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
    DECIDE: tl.constexpr,
):
    """One program: the draw of one row of a small map. BLOCKS and DRAWS are powers of two that hold its blocks and its
    N draws. Blocks come SLOTS at a time, in the order in which they may ring first, as long as one may ring before the
    last of the N first cells, and their cells take the place of later ones. DECIDE (always, but to count the
    instructions that run without): float64 decides where float32 cannot."""
    row = tl.program_id(0)
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits_b
    block = tl.arange(0, BLOCKS)
    peak, total, slope = load_entries(stats_ptr, stride_stats, row.to(tl.int64), block, n_blocks, tl.float32)
    top = tl.max(peak, 0)
    log_total, entropy = row_totals(logits_row, peak, total, slope, block, top, cells, BLOCK, BLOCK)

    seed = 0
    if TOPK:
        key = tl.where(peak > -float("inf"), descending_key(peak, block), NEVER)
    else:
        seed = tl.load(seed_ptr)
        key = _block_keys(seed, block, row, peak, top, total)

    draw = tl.arange(0, DRAWS)
    slot = tl.arange(0, SLOTS)
    # Keys, in any order: places that are not filled come before NEVER, and those that do not count before all.
    best = tl.where(draw < n_draws, NEVER - DRAWS + draw.to(tl.int64), -NEVER)
    latest = tl.max(best, 0)
    next_block = tl.min(key, 0)
    runner_up = tl.full((), NEVER, tl.int64)  # the first of all that are left
    while next_block < latest:
        chosen = n_blocks + slot * 0  # past the last with mass, blocks past the end, which hold none
        for k in range(SLOTS):
            place = tl.where(next_block < NEVER, (next_block & 0x3FFFF).to(tl.int32), n_blocks)
            chosen = tl.where(slot == k, place, chosen)
            key = tl.where(block == place, NEVER, key)
            next_block = tl.min(key, 0)
        cell = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(tl.float32)
        if TOPK:
            cell_key = tl.where(z > -float("inf"), descending_key(z, cell), NEVER)
        else:
            cell_key = _cell_keys(z, top, seed, chosen, cell, row)
        cell_key = tl.reshape(cell_key, (SLOTS * BLOCK,))
        first = tl.min(cell_key, 0)
        while first < latest:
            best = tl.where(best == latest, first, best)
            runner_up = tl.minimum(runner_up, latest)
            cell_key = tl.where(cell_key == first, NEVER, cell_key)
            first = tl.min(cell_key, 0)
            latest = tl.max(best, 0)
        runner_up = tl.minimum(runner_up, first)
    picked = (best & 0x3FFFF).to(tl.int32)
    picked = tl.where(best < NEVER - DRAWS, picked, cells)
    rank = _rank(best, draw, n_draws)

    if not TOPK:
        filled = (draw < n_draws) & (best < NEVER - DRAWS)
        later = tl.min(tl.where(best[None, :] > best[:, None], best[None, :], NEVER), 1)
        later = tl.minimum(later, tl.minimum(runner_up, next_block))
        clear = (later >= NEVER - DRAWS) | (_latest(best) < _soonest(later))
        unsure = tl.sum((filled & ((_soonest(best) >= FAR) | ~clear)).to(tl.int32), 0)
        if DECIDE:
            if unsure > 0:
                picked, rank = draw_in_float64(
                    logits_row, stats_ptr, stride_stats, seed, top, cells, n_blocks, n_candidates, n_draws, row,
                    BLOCK, BLOCKS, SLOTS, DRAWS,
                )  # fmt: skip

    store_draw(
        logits_row, indices_ptr, log_attention_ptr, row_stats_ptr, picked, top, log_total, entropy, cells,
        row.to(tl.int64), rows, rank, n_draws, needed, DRAWS,
    )  # fmt: skip
    if repeats_ptr is not None:
        tl.debug_barrier()  # the stores above come first
        distinct = row.to(tl.int64) * n_draws + draw
        log_attention = tl.load(log_attention_ptr + distinct, mask=draw < n_draws, other=-float("inf"))
        following = tl.load(log_attention_ptr + distinct + 1, mask=draw + 1 < n_draws, other=-float("inf"))
        nearest = repeat(
            seed, tl.exp(log_attention), tl.exp(following) > 0.0, indices_ptr, log_attention_ptr, repeats_ptr,
            repeats_log_attention_ptr, row, n_draws, n_repeats, DRAWS,
        )  # fmt: skip
        if DECIDE:
            if tl.sum(((nearest < NEAR) & (draw + 1 < n_draws)).to(tl.int32), 0) > 0:
                tl.debug_barrier()  # what is stored again below comes after
                drawn = tl.load(indices_ptr + distinct, mask=draw < n_draws, other=cells)
                next_drawn = tl.load(indices_ptr + distinct + 1, mask=draw + 1 < n_draws, other=cells)
                attention = tl.exp(log_attention_in_float64(logits_row, top, drawn, cells, BLOCK))
                more = log_attention_in_float64(logits_row, top, next_drawn, cells, BLOCK) > -745.0
                repeat(
                    seed, attention, more, indices_ptr, log_attention_ptr, repeats_ptr, repeats_log_attention_ptr,
                    row, n_draws, n_repeats, DRAWS,
                )  # fmt: skip
