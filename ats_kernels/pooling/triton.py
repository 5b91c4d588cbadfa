"""Triton kernels of `expectation`: weights and weighted sum in one launch, both gradients in another.

The N weights of a row cost nothing beside its N·D features, so every program of the forward computes those it needs
by itself, in float64, and one of them stores them for the backward. The unordered estimator's weights come as an
argument: a quadrature over all draws of a row, which PyTorch's operators do (`_unordered.py`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels.backend import device_guard
from ats_kernels.checks import compute_dtype


@triton.jit
def _one_minus_exp(x):
    """1 − exp(x) in float64 to full precision for x ≤ 0 (Kahan's expm1; Triton has none of its own)."""
    grown = tl.exp(x)
    difference = 1.0 - grown
    # log(grown) makes up for what grown lost in rounding; where nothing is left of x, 1 − exp(x) is −x.
    corrected = difference * x / tl.log(tl.where((grown == 1.0) | (grown == 0.0), 0.5, grown))
    return tl.where(grown == 1.0, -x, tl.where(grown == 0.0, 1.0, corrected))


@triton.jit
def _expectation_fwd_kernel(
    features_ptr,  # (B, N, D)
    log_attention_ptr,  # (B, N)
    weights_ptr,  # (B, N), read if GIVEN, else written
    out_ptr,  # (B, D), written
    n_draws,
    n_features,
    stride_features_b,
    stride_features_n,
    stride_features_d,
    stride_log_attention_b,
    stride_log_attention_n,
    REPLACE: tl.constexpr,
    GIVEN: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program pools BLOCK_D features of one row over all its draws, BLOCK_N at a time.
    # Rows and tiles share the grid's first axis, the only one that holds more than 65,535 programs.
    tiles = tl.cdiv(n_features, BLOCK_D) if n_features > 0 else 1
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    feature = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    features_ptr += row * stride_features_b
    log_attention_ptr += row * stride_log_attention_b

    if not GIVEN:
        index = tl.arange(0, BLOCK_ROW)
        log_row = tl.load(log_attention_ptr + index * stride_log_attention_n, mask=index < n_draws, other=-float("inf"))
        log_row = log_row.to(tl.float64)
        # Any NaN makes the whole row NaN; maxima would lose it.
        poison = tl.where(tl.sum((log_row != log_row).to(tl.int32), axis=0) > 0, float("nan"), 0.0).to(tl.float64)
        # 1 − Σ_{j<k} a_{q_j}, the largest a_{q_p} taken off as −expm1(log a): as 1 − a it would lose a small remainder.
        largest = tl.max(log_row, axis=0)
        position = tl.min(tl.where(log_row == largest, index, BLOCK_ROW), axis=0)
        remainder = _one_minus_exp(largest)

    others_before = tl.zeros((), tl.float64)
    pooled = tl.zeros((BLOCK_D,), COMPUTE)
    for start in range(0, n_draws, BLOCK_N):
        draw = start + tl.arange(0, BLOCK_N)
        valid = draw < n_draws
        if GIVEN:
            weight = tl.load(weights_ptr + row * n_draws + draw, mask=valid, other=0.0)
        else:
            if REPLACE:
                weight = tl.where(valid, tl.full((), 1.0, tl.float64) / n_draws, 0.0)
            else:
                log_a = tl.load(log_attention_ptr + draw * stride_log_attention_n, mask=valid, other=-float("inf"))
                attention = tl.exp(log_a.to(tl.float64))
                others = tl.where(draw == position, 0.0, attention)
                before = others_before + (tl.cumsum(others, axis=0) - others)
                others_before += tl.sum(others, axis=0)
                mass_left = tl.where(draw > position, remainder, 1.0) - before
                mass_left = tl.maximum(mass_left, attention)  # it holds at least the cell drawn next
                weight = tl.where(valid, (mass_left + (n_draws - 1 - draw) * attention) / n_draws, 0.0)
            weight = (weight + poison).to(COMPUTE)
            if tile == 0:
                tl.store(weights_ptr + row * n_draws + draw, weight, mask=valid)
        feature_ptrs = (
            features_ptr
            + draw[:, None].to(tl.int64) * stride_features_n
            + feature[None, :].to(tl.int64) * stride_features_d
        )
        values = tl.load(feature_ptrs, mask=valid[:, None] & (feature[None, :] < n_features), other=0)
        # Where there is no draw the weight is 0 or NaN and the row is NaN in any case.
        pooled += tl.sum(weight[:, None] * values.to(COMPUTE), axis=0)
    out_ptrs = out_ptr + row * n_features + feature
    tl.store(out_ptrs, pooled.to(out_ptr.dtype.element_ty), mask=feature < n_features)


@triton.jit
def _expectation_bwd_kernel(
    grad_out_ptr,  # (B, D)
    features_ptr,  # (B, N, D); None without grad_log_attention
    weights_ptr,  # (B, N)
    grad_features_ptr,  # (B, N, D), written; None if not needed
    grad_log_attention_ptr,  # (B, N), written; None if not needed
    n_draws,
    n_features,
    stride_grad_out_b,
    stride_grad_out_d,
    stride_features_b,
    stride_features_n,
    stride_features_d,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program takes BLOCK_N draws of one row through all their features: w_k·g out, w_k·⟨g, f_k⟩ at the end.
    tiles = tl.cdiv(n_draws, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    draw = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = tl.load(weights_ptr + row * n_draws + draw, mask=draw < n_draws, other=0.0)
    inner = tl.zeros((BLOCK_N,), COMPUTE)
    for start in range(0, n_features, BLOCK_D):
        feature = start + tl.arange(0, BLOCK_D)
        grad_out_ptrs = grad_out_ptr + row * stride_grad_out_b + feature.to(tl.int64) * stride_grad_out_d
        grad_out = tl.load(grad_out_ptrs, mask=feature < n_features, other=0).to(COMPUTE)
        valid = (draw[:, None] < n_draws) & (feature[None, :] < n_features)
        if grad_features_ptr is not None:
            grad_features = weight[:, None] * grad_out[None, :]
            grad_features_ptrs = grad_features_ptr + (row * n_draws + draw[:, None]) * n_features + feature[None, :]
            tl.store(grad_features_ptrs, grad_features.to(grad_features_ptr.dtype.element_ty), mask=valid)
        if grad_log_attention_ptr is not None:
            feature_ptrs = (
                features_ptr
                + row * stride_features_b
                + draw[:, None].to(tl.int64) * stride_features_n
                + feature[None, :].to(tl.int64) * stride_features_d
            )
            values = tl.load(feature_ptrs, mask=valid, other=0).to(COMPUTE)
            inner += tl.sum(values * grad_out[None, :], axis=1)
    if grad_log_attention_ptr is not None:
        grad_log_attention = (weight * inner).to(grad_log_attention_ptr.dtype.element_ty)
        tl.store(grad_log_attention_ptr + row * n_draws + draw, grad_log_attention, mask=draw < n_draws)


def expectation_triton(
    features: Tensor,  # (B, N, D), any strides
    log_attention: Tensor,  # (B, N), any strides
    weights: Tensor | None = None,  # (B, N), contiguous; computed if not given
    *,
    replace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Φ̂ (B, D) of the features' dtype and the weights (B, N) in float32, or float64 where an argument is."""
    batch, n_draws, n_features = features.shape
    compute = compute_dtype(features.dtype, log_attention.dtype)
    out = torch.empty(batch, n_features, dtype=features.dtype, device=features.device)
    given = weights is not None
    if weights is None:
        weights = torch.empty(batch, n_draws, dtype=compute, device=features.device)
    if batch == 0:
        return out, weights
    block_n, block_d = _fwd_blocks(n_draws, n_features)
    with device_guard(features):
        # At least one program a row, even without features: it writes the weights.
        _expectation_fwd_kernel[(batch * max(1, triton.cdiv(n_features, block_d)),)](
            features,
            log_attention,
            weights,
            out,
            n_draws,
            n_features,
            *features.stride(),
            *log_attention.stride(),
            REPLACE=replace,
            GIVEN=given,
            COMPUTE=_triton_dtype(compute),
            BLOCK_ROW=triton.next_power_of_2(n_draws),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out, weights


def expectation_backward_triton(
    grad_out: Tensor,  # (B, D), any strides
    features: Tensor,  # (B, N, D), any strides
    weights: Tensor,  # (B, N), contiguous
    *,
    needs_features: bool,
    needs_log_attention: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """w_k g, contiguous and as the features are, and w_k ⟨g, f_k⟩, as the weights are; None for one not needed."""
    batch, n_draws, n_features = features.shape
    grad_features = grad_log_attention = None
    if needs_features:
        grad_features = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    if needs_log_attention:
        grad_log_attention = torch.empty_like(weights)
    if batch == 0 or not (needs_features or needs_log_attention):
        return grad_features, grad_log_attention
    block_n, block_d = _bwd_blocks(n_features)
    with device_guard(features):
        _expectation_bwd_kernel[(batch * triton.cdiv(n_draws, block_n),)](
            grad_out,
            features if needs_log_attention else None,
            weights,
            grad_features,
            grad_log_attention,
            n_draws,
            n_features,
            *grad_out.stride(),
            *features.stride(),
            COMPUTE=_triton_dtype(weights.dtype),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return grad_features, grad_log_attention


def _fwd_blocks(n_draws: int, n_features: int) -> tuple[int, int]:
    """Draws and features of a tile: narrow, so that one row still makes several programs, and tall, so that each
    takes few steps, whose running sums follow one another."""
    block_d = min(64, max(16, triton.next_power_of_2(n_features)))
    return min(triton.next_power_of_2(n_draws), 4096 // block_d), block_d


def _bwd_blocks(n_features: int) -> tuple[int, int]:
    """Draws and features of a tile; few draws, so that a small batch still makes enough programs."""
    block_d = min(1024, max(64, triton.next_power_of_2(n_features)))
    return max(1, 1024 // block_d), block_d


def _triton_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32
