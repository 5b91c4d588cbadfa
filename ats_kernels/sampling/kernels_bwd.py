"""Triton kernels of `sample`'s backward: one read and one write of the map, the same bits every time."""

import triton
import triton.language as tl

from ats_kernels.sampling.kernels import FLOOR

# One variant for all sizes: what is worth knowing of them, UNIT says. The drawn cells' strides alone may be 0.
_NUMBERS = (
    "cells", "cell_units", "n_draws", "n_chunks", "n_tiles", "stride_logits_b", "stride_grad_b", "stride_grad_n",
    "stride_grad_lse", "stride_grad_entropy",
)  # fmt: skip


@triton.jit
def _dense_terms(
    peak_ptr, log_total_ptr, entropy_ptr, grad_log_attention_ptr, grad_logsumexp_ptr, grad_entropy_ptr, row, n_draws,
    stride_grad_b, stride_grad_n, stride_grad_lse, stride_grad_entropy, DRAWS: tl.constexpr,
):  # fmt: skip
    """What the gradients a (common − slope · log a) of a row have in common: peak, log total, common, slope."""
    common = 0.0
    slope = 0.0
    if grad_log_attention_ptr is not None:
        draw = tl.arange(0, DRAWS)
        grads = tl.load(
            grad_log_attention_ptr + row * stride_grad_b + draw * stride_grad_n, mask=draw < n_draws, other=0.0
        )
        common -= tl.sum(grads.to(tl.float32), 0)
    if grad_logsumexp_ptr is not None:
        common += tl.load(grad_logsumexp_ptr + row * stride_grad_lse)
    if grad_entropy_ptr is not None:
        slope += tl.load(grad_entropy_ptr + row * stride_grad_entropy)
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
    n_draws, stride_grad_n, DRAWS: tl.constexpr, REPLACE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of those of DRAWS draws from `first` on whose cells lie in [left, right), whole: a cell drawn
    more than once gets the same value from each of its draws, in whatever order they are stored."""
    draw = first + tl.arange(0, DRAWS)
    cell = tl.load(indices_row + draw, mask=draw < n_draws, other=-1)
    mine = (cell >= left) & (cell < right)
    if REPLACE:
        own = tl.zeros([DRAWS], tl.float32)
        for start in range(0, n_draws, DRAWS):
            other = start + tl.arange(0, DRAWS)
            other_cell = tl.load(indices_row + other, mask=other < n_draws, other=-1)
            grad = tl.load(grad_log_attention_row + other * stride_grad_n, mask=other < n_draws, other=0.0)
            same = cell[:, None] == other_cell[None, :]
            own += tl.sum(tl.where(same, grad[None, :].to(tl.float32), 0.0), 1)
    else:
        own = tl.load(grad_log_attention_row + draw * stride_grad_n, mask=mine, other=0.0).to(tl.float32)
    z = tl.load(logits_row + cell, mask=mine, other=0.0).to(tl.float32)
    tl.store(grad_row + cell, own + _dense_grad(z, peak, log_total, common, slope), mask=mine)


@triton.jit(do_not_specialize=_NUMBERS)
def bwd_kernel(
    logits_ptr,  # (B, K)
    indices_ptr,  # (B, N)
    peak_ptr,  # (B,), and so are the next two
    log_total_ptr,
    entropy_ptr,
    grad_log_attention_ptr,  # (B, N); None, as the next two may be: 0
    grad_logsumexp_ptr,  # (B,)
    grad_entropy_ptr,  # (B,)
    grad_logits_ptr,  # (B, K), written
    cell_units,
    n_draws,
    n_chunks,
    stride_logits_b,
    stride_grad_b,
    stride_grad_n,
    stride_grad_lse,
    stride_grad_entropy,
    DRAWS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    REPLACE: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """One program: the gradient of TILE logits of one row; with BARRIER that of the drawn cells among them too. Sizes
    and strides of logits come in units of UNIT."""
    program = tl.program_id(0)
    row = (program // n_chunks).to(tl.int64)
    left = (program % n_chunks) * TILE
    peak, log_total, common, slope = _dense_terms(
        peak_ptr, log_total_ptr, entropy_ptr, grad_log_attention_ptr, grad_logsumexp_ptr, grad_entropy_ptr, row,
        n_draws, stride_grad_b, stride_grad_n, stride_grad_lse, stride_grad_entropy, DRAWS,
    )  # fmt: skip
    cell = left + tl.arange(0, TILE)
    inside = cell < cell_units * UNIT
    logits_row = logits_ptr + row * stride_logits_b * UNIT
    grad_row = grad_logits_ptr + row * cell_units * UNIT
    z = tl.load(logits_row + cell, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_row + cell, _dense_grad(z, peak, log_total, common, slope), mask=inside)
    if BARRIER and grad_log_attention_ptr is not None:
        tl.debug_barrier()  # the stores above come first
        _add_drawn(
            logits_row, indices_ptr + row * n_draws,
            grad_log_attention_ptr + row * stride_grad_b, grad_row, peak, log_total, common, slope,
            0, left, left + TILE, n_draws, stride_grad_n, DRAWS, REPLACE,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def bwd_drawn_kernel(
    logits_ptr,  # (B, K)
    indices_ptr,  # (B, N)
    peak_ptr,  # (B,), and so are the next two
    log_total_ptr,
    entropy_ptr,
    grad_log_attention_ptr,  # (B, N); None, as the next two may be: 0
    grad_logsumexp_ptr,  # (B,)
    grad_entropy_ptr,  # (B,)
    grad_logits_ptr,  # (B, K), written
    cells,
    n_draws,
    n_tiles,
    stride_logits_b,
    stride_grad_b,
    stride_grad_n,
    stride_grad_lse,
    stride_grad_entropy,
    DRAWS: tl.constexpr,
    TILE: tl.constexpr,
    REPLACE: tl.constexpr,
):
    """One program: the gradient of the cells of TILE draws of one row, after bwd_kernel without BARRIER."""
    program = tl.program_id(0)
    row = (program // n_tiles).to(tl.int64)
    peak, log_total, common, slope = _dense_terms(
        peak_ptr, log_total_ptr, entropy_ptr, grad_log_attention_ptr, grad_logsumexp_ptr, grad_entropy_ptr, row,
        n_draws, stride_grad_b, stride_grad_n, stride_grad_lse, stride_grad_entropy, DRAWS,
    )  # fmt: skip
    _add_drawn(
        logits_ptr + row * stride_logits_b, indices_ptr + row * n_draws,
        grad_log_attention_ptr + row * stride_grad_b, grad_logits_ptr + row * cells,
        peak, log_total, common, slope, (program % n_tiles) * TILE, 0, cells, n_draws, stride_grad_n, TILE, REPLACE,
    )  # fmt: skip
