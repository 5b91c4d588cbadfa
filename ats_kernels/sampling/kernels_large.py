"""Triton kernels of `sample`'s forward for large maps and many draws: torch.topk ranks what they compute.

After `statistics_kernel` come `block_times_kernel`, topk over a row's blocks, `cell_times_kernel`, topk over the cells
of the candidate blocks, and `finish_kernel`.
"""

import triton
import triton.language as tl

from ats_kernels.sampling.kernels import (
    SIZES,
    block_times,
    descending_key,
    load_entries,
    ring_times,
    row_totals,
    store_draw,
)


@triton.jit(do_not_specialize=SIZES)
def block_times_kernel(
    seed_ptr,  # (); None with TOPK
    stats_ptr,  # (3, B, blocks)
    chunk_stats_ptr,  # (3, B, chunks)
    keys_ptr,  # (B, blocks), written
    tops_ptr,  # (B,), written
    n_blocks,
    n_chunks,
    n_tiles,
    stride_stats,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    TOPK: tl.constexpr,
):
    """One program: the log ring times of TILE blocks of one row (with TOPK, keys that order them), and the row's
    largest logit."""
    program = tl.program_id(0)
    row = program // n_tiles
    chunk = tl.arange(0, CHUNKS)
    chunk_peak = tl.load(
        chunk_stats_ptr + row.to(tl.int64) * n_chunks + chunk, mask=chunk < n_chunks, other=-float("inf")
    )
    top = tl.max(chunk_peak.to(tl.float64), 0)
    tl.store(tops_ptr + row, top)  # the same from each of the row's programs
    block = (program % n_tiles) * TILE + tl.arange(0, TILE)
    peak, total, _ = load_entries(stats_ptr, stride_stats, row.to(tl.int64), block, n_blocks)
    if TOPK:
        key = descending_key(peak, block)
    else:
        seed = tl.load(seed_ptr)
        key = block_times(seed, block, row, peak, top, total)
    tl.store(keys_ptr + row.to(tl.int64) * n_blocks + block, key, mask=block < n_blocks)


@triton.jit(do_not_specialize=SIZES)
def cell_times_kernel(
    logits_ptr,  # (B, K)
    seed_ptr,  # (); None with TOPK
    chosen_ptr,  # (B, candidates) blocks
    tops_ptr,  # (B,)
    keys_ptr,  # (B, candidates, BLOCK), written
    cells,
    n_candidates,
    stride_logits_b,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
):
    """One program: the log ring times of the cells of one candidate block (with TOPK, keys that order them)."""
    program = tl.program_id(0)
    row = program // n_candidates
    block = tl.load(chosen_ptr + program).to(tl.int32) + tl.arange(0, 1)
    offset = tl.arange(0, BLOCK)
    cell = block[:, None] * BLOCK + offset[None, :]
    logits_row = logits_ptr + row.to(tl.int64) * stride_logits_b
    z = tl.load(logits_row + cell, mask=cell < cells, other=-float("inf")).to(tl.float64)
    if TOPK:
        key = descending_key(z, cell)
    else:
        key = ring_times(z, tl.load(tops_ptr + row), tl.load(seed_ptr), block, cell, row)
    tl.store(keys_ptr + program.to(tl.int64) * BLOCK + offset[None, :], key)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    logits_ptr,  # (B, K)
    chunk_stats_ptr,  # (3, B, chunks)
    chosen_ptr,  # (B, candidates) blocks
    order_ptr,  # (B, N) places among the candidates' cells
    indices_ptr,  # (B, N), written
    log_attention_ptr,  # (B, N), written
    row_stats_ptr,  # (4, B), written, as by draw_kernel
    cells,
    n_chunks,
    n_candidates,
    n_draws,
    needed,
    rows,
    stride_logits_b,
    stride_chunk_stats,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """One program: the draw of one row of a large map, from the places of its cells among those of the candidate
    blocks."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * stride_logits_b
    chunk = tl.arange(0, CHUNKS)
    peak, total, slope = load_entries(chunk_stats_ptr, stride_chunk_stats, row, chunk, n_chunks)
    top = tl.max(peak, 0)
    log_total, entropy = row_totals(logits_row, peak, total, slope, chunk, top, cells, SPAN, TILE)
    draw = tl.arange(0, DRAWS)
    place = tl.load(order_ptr + row * n_draws + draw, mask=draw < n_draws, other=0).to(tl.int32)
    block = tl.load(chosen_ptr + row * n_candidates + place // BLOCK).to(tl.int32)
    store_draw(
        logits_row, indices_ptr, log_attention_ptr, row_stats_ptr, block * BLOCK + place % BLOCK, top, log_total,
        entropy, cells, row, rows, draw, n_draws, needed, DRAWS,
    )  # fmt: skip
