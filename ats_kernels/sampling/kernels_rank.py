"""Device functions that find the first n of keys in memory, by counting, and rank them: for one program of a row.

Keys are int64, whatever they stand for, and need not differ: of equal ones the lower cell comes first. Other programs
wrote them, hence `.cg`: past the cache that a processor has of its own.
"""

import triton
import triton.language as tl

from ats_kernels.sampling.kernels import NEVER

LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def ascending_64(x):
    """int64 keys whose order is that of float64 numbers."""
    bits = x.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & NEVER)


@triton.jit
def halfway(low, high):
    """Between two int64, wherever they are."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def _count(keys_ptr, cells_ptr, n_keys, key_limit, cell_limit, TILE: tl.constexpr):
    """How many keys come before a limit, or are it and, where cells are given, of a cell up to another."""
    count = 0
    for start in range(0, n_keys, TILE):
        index = start + tl.arange(0, TILE)
        valid = index < n_keys
        key = tl.load(keys_ptr + index, mask=valid, other=NEVER, cache_modifier=".cg")
        within = key <= key_limit
        if cells_ptr is not None:
            cell = tl.load(cells_ptr + index, mask=valid, other=0, cache_modifier=".cg")
            within = (key < key_limit) | ((key == key_limit) & (cell <= cell_limit))
        count += tl.sum((within & valid).to(tl.int32), 0)
    return count


@triton.jit
def nth(keys_ptr, n_keys, n, TILE: tl.constexpr):
    """A limit that n of the keys, or more if they tie with the n-th, do not exceed."""
    low = tl.full((), NEVER, tl.int64)
    high = -low
    for start in range(0, n_keys, TILE):
        index = start + tl.arange(0, TILE)
        key = tl.load(keys_ptr + index, mask=index < n_keys, other=NEVER, cache_modifier=".cg")
        low = tl.minimum(low, tl.min(key, 0))
        high = tl.maximum(high, tl.max(tl.where(index < n_keys, key, -NEVER), 0))
    low -= 1
    while low + 1 < high:  # at most n − 1 keys up to low, n or more up to high
        middle = halfway(low, high)
        count = _count(keys_ptr, None, n_keys, middle, 0, TILE)
        high = tl.where(count >= n, middle, high)
        low = tl.where(count == n, middle - 1, tl.where(count < n, middle, low))
    return high


@triton.jit
def _last_cell(keys_ptr, cells_ptr, n_keys, key_limit, n, cells, TILE: tl.constexpr):
    """Of the keys that are the limit, up to which cell they are among the first n."""
    low = -1
    high = cells - 1
    while low + 1 < high:
        middle = (low + high) // 2
        enough = _count(keys_ptr, cells_ptr, n_keys, key_limit, middle, TILE) >= n
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high


@triton.jit
def keep_first(keys_row, cells_row, count, kept_at, n_draws, cells, TILE: tl.constexpr):
    """Copy the first n_draws of more survivors to `kept_at`, in any order."""
    limit = nth(keys_row, count, n_draws, TILE)
    last_cell = cells
    if _count(keys_row, None, count, limit, 0, TILE) > n_draws:
        last_cell = _last_cell(keys_row, cells_row, count, limit, n_draws, cells, TILE)
    kept = 0
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        key = tl.load(keys_row + index, mask=index < count, other=NEVER, cache_modifier=".cg")
        cell = tl.load(cells_row + index, mask=index < count, other=0, cache_modifier=".cg")
        keep = (index < count) & ((key < limit) | ((key == limit) & (cell <= last_cell)))
        at = kept_at + kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(keys_row + at, key, mask=keep)
        tl.store(cells_row + at, cell, mask=keep)
        kept += tl.sum(keep.to(tl.int32), 0)
    tl.debug_barrier()  # before others load what is stored here


@triton.jit
def store_ranked(
    logits_row, keys_row, cells_row, count, indices_row, log_attention_row, top, log_total, bad, n_draws,
    TILE: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Rank survivors, each against all, and store the first n_draws; past the last, masked cells in their place."""
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        key = tl.load(keys_row + index, mask=index < count, other=NEVER, cache_modifier=".cg")
        cell = tl.load(cells_row + index, mask=index < count, other=0, cache_modifier=".cg")
        rank = index * 0
        for first in range(0, count, OTHERS):
            other = first + tl.arange(0, OTHERS)
            other_key = tl.load(keys_row + other, mask=other < count, other=NEVER, cache_modifier=".cg")[None, :]
            other_cell = tl.load(cells_row + other, mask=other < count, other=0, cache_modifier=".cg")[None, :]
            same = other_key == key[:, None]
            earlier = (other_key < key[:, None]) | (same & (other_cell < cell[:, None]))
            rank += tl.sum((earlier & (other < count)[None, :]).to(tl.int32), 1)
        drawn = (index < count) & (rank < n_draws)
        z = tl.load(logits_row + cell, mask=drawn, other=0.0).to(tl.float64)
        tl.store(indices_row + rank, tl.where(bad, -1, cell).to(tl.int64), mask=drawn)
        # Only a masked cell has no logarithm that float32 holds.
        log_attention = tl.maximum((z - top) - log_total, LEAST)
        tl.store(log_attention_row + rank, tl.where(bad, float("nan"), log_attention), mask=drawn)
    for start in range(tl.minimum(count, n_draws), n_draws, TILE):
        rank = start + tl.arange(0, TILE)
        tl.store(indices_row + rank, tl.where(bad, rank * 0 - 1, 0).to(tl.int64), mask=rank < n_draws)
        tl.store(log_attention_row + rank, tl.where(bad, float("nan"), LEAST) + rank * 0.0, mask=rank < n_draws)
