"""Triton kernels of `expectation`: the weighted sum, its gradients, and what weighs the draws.

The ordered weights of a row cost nothing beside its N·D features, so every program of the forward computes those it
needs by itself, and one of them stores them for the backward. The ordered estimator's control variate has a kernel of
its own, a program a row, and so has what the unordered one needs, in `kernels_unordered`. The formulas are those of
`weights.py`.

In them the mass left, 1 − Σ a, cancels. Where the results are float32, it is summed as pairs of float32 and whole
numbers (`pairs.py`): float64 costs consumer GPUs 64 times as much. Float64 results are computed in float64.
"""

import triton
import triton.language as tl

from ats_kernels.pooling.pairs import (
    add,
    exp_pair,
    fixed_unit,
    from_fixed,
    one_minus_exp_pair,
    sums_before,
    to_fixed,
)

# Sizes and small strides that nothing is gained from knowing more closely.
_NUMBERS = ("n_draws", "stride_log_attention_b")


@triton.jit
def _masses(attention, position, remainder, remainder_low, draw, before, before_low):
    """The mass left at each draw, 1 − Σ_{j<k} a_{q_j}, from what came before it without the largest: what that leaves
    of 1 enters as −expm1(log a), as 1 − a it would lose a small remainder."""
    later = draw > position
    left, left_low = add(tl.where(later, remainder, 1.0), tl.where(later, remainder_low, 0.0), -before, -before_low)
    return tl.maximum(left + left_low, attention)  # it holds at least the cell drawn next


@triton.jit(do_not_specialize=_NUMBERS)
def expectation_fwd_kernel(
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
    """One program pools BLOCK_D features of one row over all its draws, BLOCK_N at a time."""
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
        log_row = log_row.to(COMPUTE)
        # Any NaN makes the whole row NaN; maxima would lose it.
        poison = tl.where(tl.sum((log_row != log_row).to(tl.int32), axis=0) > 0, float("nan"), 0.0).to(COMPUTE)
        log_row = tl.where(log_row == log_row, log_row, -float("inf"))
        largest = tl.max(log_row, axis=0)
        position = tl.min(tl.where(log_row == largest, index, BLOCK_ROW), axis=0)
        remainder, remainder_low = one_minus_exp_pair(largest)
        others = tl.where(index == position, -float("inf"), log_row)
        unit = fixed_unit(tl.exp(tl.max(others, axis=0)).to(tl.float32))
        # Σ of the others: exact, in whole numbers, where float32 would lose what is left of 1.
        others_before = to_fixed(remainder * 0.0, remainder * 0.0, unit)

    pooled = tl.zeros((BLOCK_D,), COMPUTE)
    for start in range(0, n_draws, BLOCK_N):
        draw = start + tl.arange(0, BLOCK_N)
        valid = draw < n_draws
        if GIVEN:
            weight = tl.load(weights_ptr + row * n_draws + draw, mask=valid, other=0.0)
        else:
            if REPLACE:
                weight = tl.where(valid, tl.full((), 1.0, COMPUTE) / n_draws, 0.0)
            else:
                log_a = tl.load(log_attention_ptr + draw * stride_log_attention_n, mask=valid, other=-float("inf"))
                log_a = log_a.to(COMPUTE)
                log_a = tl.where(log_a == log_a, log_a, -float("inf"))
                attention, attention_low = exp_pair(log_a)
                other = tl.where(draw == position, 0.0, attention)
                other_low = tl.where(draw == position, 0.0, attention_low)
                fixed = to_fixed(other, other_low, unit)
                before, before_low = from_fixed(others_before + (tl.cumsum(fixed, axis=0) - fixed), unit)
                others_before += tl.sum(fixed, axis=0)
                mass_left = _masses(attention, position, remainder, remainder_low, draw, before, before_low)
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


@triton.jit(do_not_specialize=_NUMBERS)
def expectation_bwd_kernel(
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
    WEIGHTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program takes BLOCK_N draws of one row through all their features: w_k·g out, at the end w_k·⟨g, f_k⟩ or,
    unless WEIGHTED, ⟨g, f_k⟩."""
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
        grad_log_attention = (weight * inner if WEIGHTED else inner).to(grad_log_attention_ptr.dtype.element_ty)
        tl.store(grad_log_attention_ptr + row * n_draws + draw, grad_log_attention, mask=draw < n_draws)


@triton.jit(do_not_specialize=_NUMBERS)
def ordered_coefficients_kernel(
    inner_ptr,  # (B, N): x = ⟨g, f⟩
    log_attention_ptr,  # (B, N)
    coefficients_ptr,  # (B, N), written
    n_draws,
    stride_log_attention_b,
    stride_log_attention_n,
    REPLACE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: the gradient to log a of one row with features less a baseline; see centred_coefficients."""
    row = tl.program_id(0).to(tl.int64)
    draw = tl.arange(0, BLOCK_N)
    valid = draw < n_draws
    log_attention_ptrs = log_attention_ptr + row * stride_log_attention_b + draw * stride_log_attention_n
    log_a = tl.load(log_attention_ptrs, mask=valid, other=-float("inf")).to(COMPUTE)
    x = tl.load(inner_ptr + row * n_draws + draw, mask=valid, other=0.0).to(COMPUTE)
    poison = tl.where(tl.sum(((log_a != log_a) | (x - x != 0.0)).to(tl.int32), 0) > 0, float("nan"), 0.0)
    if REPLACE:
        others = (x - tl.sum(x, 0) / n_draws) / tl.maximum(n_draws - 1, 1)
        coefficients = tl.where(n_draws == 1, x, others)
    else:
        log_a = tl.where(log_a == log_a, log_a, -float("inf"))
        x = tl.where(x - x == 0.0, x, 0.0)
        attention, attention_low = exp_pair(log_a)
        largest = tl.max(log_a, 0)
        position = tl.min(tl.where(log_a == largest, draw, BLOCK_N), 0)
        remainder, remainder_low = one_minus_exp_pair(largest)
        before, before_low = sums_before(
            tl.where(draw == position, 0.0, attention), tl.where(draw == position, 0.0, attention_low)
        )
        mass = _masses(attention, position, remainder, remainder_low, draw, before, before_low)
        zero = x * 0.0
        seen, _ = sums_before(attention * x, zero)
        estimates = tl.where(valid, seen + mass * x, 0.0)  # E_k
        before, _ = sums_before(estimates, zero)
        baseline = tl.where(valid & (draw > 0), before / tl.maximum(draw, 1), 0.0)
        before, _ = sums_before(baseline, zero)
        after = tl.sum(baseline, 0) - before - baseline  # Σ_{j>k} of the baselines
        later = (n_draws - 1 - draw).to(COMPUTE)
        coefficients = (mass * (x - baseline) + attention * (later * x - after)) / n_draws
    coefficients += poison
    coefficients_ptrs = coefficients_ptr + row * n_draws + draw
    tl.store(coefficients_ptrs, coefficients.to(coefficients_ptr.dtype.element_ty), mask=valid)
