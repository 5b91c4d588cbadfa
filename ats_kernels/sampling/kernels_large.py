"""The Triton kernel that draws from large maps, and many draws: `select_kernel`, after `statistics_kernel`.

**A threshold in place of ranking.** `statistics_kernel` has computed, in float32, when each block first rings at the
earliest and at the latest. The N-th of the latest times, U, is a bound: N blocks have rung by then, and each rings with
one of its cells, so the first N cells have too, and all their blocks may ring by U. Float32 decides no more than that.
The few blocks that may ring by U are computed in float64, cell by cell, as the reference does, and cells that do not
ring by U are dropped. So what survives holds the draw, whatever float32 did, and float64 orders it, then the cell.
For topk, keys of logits stand in for times, and nothing is rounded.

**Who does what.** Of a row's programs the first sums the row up. Each of the others finds U by itself, from one number
a group of blocks, and treats every n-th block, so that neighbours, which ring together where attention is peaked, fall
to different programs. Survivors are written wherever a counter says: their order does not matter. The last program of a
row to be done, which a second counter tells, ranks them.

**The bound**, with e = 2^-24, the most that float32 rounds by, log right to 2e of its value, exp to 4e:

- The sum of up to 512 terms, in any order: 511e. A term exp2((z − largest) · log2 e): 4e + 3e |z − largest|, of which
  the mean weighed by the terms is at most 4.5: 18e. Its logarithm, at most 6.3: 13e. Together 542e.
- log E: 9e + 2e |log E|, as `kernels_draw` has it, with |log E| ≤ |T| + |largest| + 6.3.
- T = (log E − log sum) − largest: two subtractions, e (2 |T| + |largest|).

      error ≤ 564e + e (4 |T| + 3 |largest|), taken as 768e + 6e (|T| + |largest|):

a third more, for the rounding of T ± error and of U in other units. T is not relative to the row's largest logit,
which is not known yet. So logits far from 0, as 10^6, widen the bound: to about the precision that float32 gives them.

**Overflow.** Survivors have room for all cells of N + 64 blocks. A row that has more (logits beyond 10^7, or N groups
of which single ones hold far more than N blocks do) is left to its last program, which draws it from the float64 times
of all blocks. There the blocks' float32 sums alone err, by SUMS_ERR at most: slower, and right.
"""

import triton
import triton.language as tl

from ats_kernels.sampling.kernels import (
    NEVER,
    SIZES,
    block_times,
    descending_key,
    load_entries,
    repeat,
    ring_times,
    row_totals,
)
from ats_kernels.sampling.kernels_rank import ascending_64, halfway, keep_first, nth, store_ranked

SUMS_ERR = tl.constexpr(1024 * 2.0**-24)


@triton.jit
def _nth_of_groups(group_keys_ptr, n_groups, n, GROUPS: tl.constexpr):
    """`_nth` of the groups' keys, GROUPS at a time taken together; NEVER if there are not so many."""
    group = tl.arange(0, GROUPS)
    key = tl.full((GROUPS,), NEVER, tl.int64)
    for start in range(0, n_groups, GROUPS):
        other = tl.load(group_keys_ptr + start + group, mask=start + group < n_groups, other=NEVER)
        key = tl.minimum(key, other)
    low = tl.min(key, 0) - 1
    high = tl.full((), NEVER, tl.int64)
    if tl.sum((key < NEVER).to(tl.int32), 0) >= n:
        high = tl.max(tl.where(key < NEVER, key, -NEVER), 0)
        while low + 1 < high:
            middle = halfway(low, high)
            count = tl.sum((key <= middle).to(tl.int32), 0)
            high = tl.where(count >= n, middle, high)
            low = tl.where(count == n, middle - 1, tl.where(count < n, middle, low))
    return high


@triton.jit
def _survivors(
    logits_row, due, block, limit, keys_row, cells_row, counter_ptr, count, top, seed, cells, n_blocks, capacity, row,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    """Write the cells of the blocks that are due, SLOTS at a time, whose keys do not exceed the limit, until there are
    more than there is room for. Returns how many there are, as far as is known here."""
    slot = tl.arange(0, SLOTS)
    while (tl.max(due.to(tl.int32), 0) > 0) & (count <= capacity):
        chosen = n_blocks + slot * 0  # past the last, blocks that hold no cells
        for k in range(SLOTS):
            first = tl.min(tl.where(due, block, n_blocks), 0)
            chosen = tl.where(slot == k, first, chosen)
            due = due & (block != first)
        cell = chosen[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = tl.load(logits_row + cell, mask=(chosen[:, None] < n_blocks) & (cell < cells), other=-float("inf")).to(
            tl.float64
        )
        key = descending_key(z, cell) if TOPK else ascending_64(ring_times(z, top, seed, chosen, cell, row))
        keep = tl.reshape((key <= limit) & (z > -float("inf")), (SLOTS * BLOCK,))
        kept = keep.to(tl.int32)
        found = tl.sum(kept, 0)
        before = tl.atomic_add(counter_ptr, found, sem="relaxed")
        at = before + tl.cumsum(kept, 0) - kept
        keep = keep & (at < capacity)
        tl.store(keys_row + at, tl.reshape(key, (SLOTS * BLOCK,)), mask=keep)
        tl.store(cells_row + at, tl.reshape(cell, (SLOTS * BLOCK,)), mask=keep)
        count = before + found
    return count


@triton.jit
def _bounds_in_float64(stats_ptr, stride_stats, seed, block, n_blocks, top, row, TOPK: tl.constexpr):
    """Keys of when blocks ring at the earliest and at the latest, from all but their sums in float64."""
    peak, total, _ = load_entries(stats_ptr, stride_stats, row.to(tl.int64), block, n_blocks)
    live = peak > -float("inf")
    if TOPK:
        early = descending_key(peak, block)
        late = early
    else:
        time = block_times(seed, block, row, peak, top, total)
        early = ascending_64(time - SUMS_ERR)
        late = ascending_64(time + SUMS_ERR)
    return tl.where(live, early, NEVER), tl.where(live, late, NEVER)


@triton.jit
def _survivors_in_float64(
    logits_row, stats_ptr, stride_stats, keys_row, cells_row, counter_ptr, top, seed, cells, n_blocks, capacity,
    n_draws, row, BLOCK: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, TOPK: tl.constexpr,
):  # fmt: skip
    """Survivors again, from the float64 times of all blocks, by one program. Returns how many there are."""
    for start in range(0, n_blocks, TILE):
        block = start + tl.arange(0, TILE)
        _, late = _bounds_in_float64(stats_ptr, stride_stats, seed, block, n_blocks, top, row, TOPK)
        tl.store(keys_row + capacity + block, late, mask=block < n_blocks)
    tl.debug_barrier()  # the stores above come first
    limit = nth(keys_row + capacity, n_blocks, n_draws, TILE)
    cell_limit = limit | 0xFFFFFFFF if TOPK else limit
    tl.atomic_xchg(counter_ptr, 0, sem="relaxed")
    count = 0
    # First those that ring by then for sure, fewer than N blocks, whose cells have room; then, lower blocks first,
    # those that may: none that is left out differs from the limit by more than a sum's error.
    for might in range(2):
        for start in range(0, n_blocks, TILE):
            block = start + tl.arange(0, TILE)
            early, late = _bounds_in_float64(stats_ptr, stride_stats, seed, block, n_blocks, top, row, TOPK)
            due = (early <= limit) & (early < NEVER) & ((late >= limit) == (might == 1))
            count = _survivors(
                logits_row, due, block, cell_limit, keys_row, cells_row, counter_ptr, count, top, seed, cells,
                n_blocks, capacity, row, BLOCK, SLOTS, TOPK,
            )  # fmt: skip
    return count


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    logits_ptr,  # (B, K)
    seed_ptr,  # (); None with TOPK
    stats_ptr,  # (3, B, blocks)
    chunk_stats_ptr,  # (3, B, chunks)
    group_keys_ptr,  # (B, groups)
    counters_ptr,  # (B, 2): survivors, programs that are done; 0 at first
    totals_ptr,  # (2, B), written: log total, entropy
    keys_ptr,  # (B, stride_keys) of survivors, written; room for all blocks, or the draw, behind `capacity`
    cells_ptr,  # (B, stride_keys) of survivors, written
    indices_ptr,  # (B, N) distinct cells in draw order, written
    log_attention_ptr,  # (B, N), written
    row_stats_ptr,  # (4, B), written: largest logit, log total, entropy, logsumexp
    repeats_ptr,  # (B, n) a draw with replacement made of the distinct cells, written; None: not wanted
    repeats_log_attention_ptr,  # (B, n), written
    cells,
    n_blocks,
    n_groups,
    n_chunks,
    n_programs,
    capacity,
    n_draws,
    n_repeats,
    needed,
    rows,
    stride_logits_b,
    stride_stats,
    stride_chunk_stats,
    stride_keys,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    OTHERS: tl.constexpr,
    PADDED: tl.constexpr,
    TOPK: tl.constexpr,
):
    """One program: of one row, its totals or survivors from every n-th block; the last to be done, the draw."""
    row = tl.program_id(0) // n_programs
    share = tl.program_id(0) % n_programs
    row_64 = row.to(tl.int64)
    logits_row = logits_ptr + row_64 * stride_logits_b
    keys_row = keys_ptr + row_64 * stride_keys
    cells_row = cells_ptr + row_64 * stride_keys
    counter_ptr = counters_ptr + 2 * row_64
    chunk = tl.arange(0, CHUNKS)
    top = tl.max(
        tl.load(chunk_stats_ptr + row_64 * n_chunks + chunk, mask=chunk < n_chunks, other=-float("inf")), 0
    ).to(tl.float64)
    seed = 0
    if not TOPK:
        seed = tl.load(seed_ptr)

    if share == 0:
        peak, total, slope = load_entries(chunk_stats_ptr, stride_chunk_stats, row_64, chunk, n_chunks)
        log_total, entropy = row_totals(logits_row, peak, total, slope, chunk, top, cells, SPAN, TILE)
        tl.store(totals_ptr + row, log_total)
        tl.store(totals_ptr + rows + row, entropy)
    else:
        limit = _nth_of_groups(group_keys_ptr + row_64 * n_groups, n_groups, n_draws, GROUPS)
        if TOPK:
            cell_limit = limit | 0xFFFFFFFF
        else:
            ascending = limit.to(tl.int32)
            latest = (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            latest = tl.where(limit < NEVER, latest, float("inf"))
            cell_limit = ascending_64(latest.to(tl.float64) + top)
        count = 0
        for start in range(share - 1, n_blocks, OWN * (n_programs - 1)):
            block = start + tl.arange(0, OWN) * (n_programs - 1)
            if TOPK:
                block_peak, _, _ = load_entries(stats_ptr, stride_stats, row_64, block, n_blocks, tl.float32)
                due = (block_peak > -float("inf")) & (descending_key(block_peak, block) <= limit)
            else:
                early_ptrs = stats_ptr + 2 * stride_stats + row_64 * n_blocks + block
                early = tl.load(early_ptrs, mask=block < n_blocks, other=float("inf")).to(tl.float32)
                due = (early <= latest) & (early < float("inf"))
            count = _survivors(
                logits_row, due, block, cell_limit, keys_row, cells_row, counter_ptr, count, top, seed, cells,
                n_blocks, capacity, row, BLOCK, SLOTS, TOPK,
            )  # fmt: skip

    tl.debug_barrier()  # all that this program has stored comes before it says so
    done = tl.atomic_add(counter_ptr + 1, 1, sem="acq_rel")
    if done == n_programs - 1:
        count = tl.atomic_add(counter_ptr, 0, sem="acq_rel")
        if count > capacity:
            count = _survivors_in_float64(
                logits_row, stats_ptr, stride_stats, keys_row, cells_row, counter_ptr, top, seed, cells, n_blocks,
                capacity, n_draws, row, BLOCK, SLOTS, TILE, TOPK,
            )  # fmt: skip
            count = tl.minimum(count, capacity)
            tl.debug_barrier()
        log_total = tl.load(totals_ptr + row, cache_modifier=".cg")
        entropy = tl.load(totals_ptr + rows + row, cache_modifier=".cg")
        bad = (count < needed) | (log_total != log_total)
        at = 0
        if count > n_draws + TILE // 2:
            keep_first(keys_row, cells_row, count, capacity, n_draws, cells, TILE)
            at = capacity
            count = n_draws
        distinct = row_64 * n_draws
        store_ranked(
            logits_row, keys_row + at, cells_row + at, count, indices_ptr + distinct, log_attention_ptr + distinct,
            top, log_total, bad, n_draws, TILE // 4, OTHERS,
        )  # fmt: skip
        tl.store(row_stats_ptr + row, top)
        tl.store(row_stats_ptr + rows + row, tl.where(bad, float("nan"), log_total))
        tl.store(row_stats_ptr + 2 * rows + row, tl.where(bad, float("nan"), entropy))
        tl.store(row_stats_ptr + 3 * rows + row, tl.where(bad, float("nan"), top + log_total))
        if repeats_ptr is not None:
            tl.debug_barrier()  # the stores above come first
            draw = tl.arange(0, PADDED)
            log_attention_ptrs = log_attention_ptr + distinct + draw
            log_attention = tl.load(log_attention_ptrs, mask=draw < n_draws, other=-float("inf"))
            following = tl.load(log_attention_ptrs + 1, mask=draw + 1 < n_draws, other=-float("inf"))
            repeat(
                seed, tl.exp(log_attention), tl.exp(following) > 0.0, indices_ptr, log_attention_ptr, repeats_ptr,
                repeats_log_attention_ptr, row, n_draws, n_repeats, PADDED,
            )  # fmt: skip
