"""Triton kernels of `expectation`: the weighted sum, its gradients, and what weighs the draws.

The ordered weights of a row cost nothing beside its N·D features, so every program of the forward computes those it
needs by itself, in float64, and one of them stores them for the backward. The unordered estimator's weights and the
control variate have kernels of their own, a program a row, in float64: the formulas are those of `unordered.py` and
`weights.py`. There a thread holds nodes of the quadrature and goes through the draws one by one, so that any number of
draws fits.
"""

import triton
import triton.language as tl

# Sizes and small strides that nothing is gained from knowing more closely.
_NUMBERS = ("n_draws", "stride_log_attention_b")
_ROW_NUMBERS = (*_NUMBERS, "n_nodes")


@triton.jit
def _one_minus_exp(x):
    """1 − exp(x) in float64 to full precision for x ≤ 0 (Kahan's expm1; Triton has none of its own)."""
    grown = tl.exp(x)
    difference = 1.0 - grown
    # log(grown) makes up for what grown lost in rounding; where nothing is left of x, 1 − exp(x) is −x.
    corrected = difference * x / tl.log(tl.where((grown == 1.0) | (grown == 0.0), 0.5, grown))
    return tl.where(grown == 1.0, -x, tl.where(grown == 0.0, 1.0, corrected))


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


@triton.jit
def _log_attention(log_attention_row, draw, stride):
    """log a of a draw, float64. A cell below e^−600 is weighted as if it were there, and nothing underflows."""
    log_a = tl.load(log_attention_row + draw * stride).to(tl.float64)
    return tl.where(log_a < -600.0, -600.0, log_a)  # NaN stays


@triton.jit
def _quadrature(log_attention_row, n_draws, stride, step, n_nodes, ACCURACY: tl.constexpr, NODES: tl.constexpr):
    """The nodes u (NODES,) of a row's quadrature and their density π, which sums to 1; 0 past the last node."""
    # The mass left, a cell of more than half of it taken off as expm1(log a), which loses nothing.
    left = tl.full((), 1.0, tl.float64)
    for draw in range(n_draws):
        log_a = _log_attention(log_attention_row, draw, stride)
        if log_a > tl.log(0.5):
            left += _one_minus_exp(log_a) - 1.0
        else:
            left -= tl.exp(log_a)
    left = tl.where(left < 1e-250, 1e-250, left)
    index = tl.arange(0, NODES)
    node = index.to(tl.float64) * step - ACCURACY  # log(cu)
    scaled = tl.exp(node)
    u = scaled / left
    log_density = node - scaled
    for draw in range(n_draws):
        log_density += tl.log(_one_minus_exp(-tl.exp(_log_attention(log_attention_row, draw, stride)) * u))
    log_density = tl.where(index < n_nodes, log_density, -float("inf"))
    density = tl.exp(log_density - tl.max(log_density, 0))
    return u, density / tl.sum(density, 0)


@triton.jit(do_not_specialize=_ROW_NUMBERS)
def unordered_weights_kernel(
    log_attention_ptr,  # (B, N)
    weights_ptr,  # (B, N), written
    n_draws,
    n_nodes,
    step,
    stride_log_attention_b,
    stride_log_attention_n,
    ACCURACY: tl.constexpr,
    NODES: tl.constexpr,
):
    """One program: the weights of one row, E_π[a / (1 − e^{−a u})], scaled to sum to 1."""
    row = tl.program_id(0).to(tl.int64)
    log_attention_row = log_attention_ptr + row * stride_log_attention_b
    stride = stride_log_attention_n
    u, density = _quadrature(log_attention_row, n_draws, stride, step, n_nodes, ACCURACY, NODES)
    total = tl.full((), 0.0, tl.float64)
    for draw in range(n_draws):
        attention = tl.exp(_log_attention(log_attention_row, draw, stride))
        weight = attention * tl.sum(density / _one_minus_exp(-attention * u), 0)
        tl.store(weights_ptr + row * n_draws + draw, weight.to(weights_ptr.dtype.element_ty))
        total += weight
    tl.debug_barrier()  # the stores above come first
    for draw in range(n_draws):  # 1 but for rounding
        weight = tl.load(weights_ptr + row * n_draws + draw).to(tl.float64) / total
        tl.store(weights_ptr + row * n_draws + draw, weight.to(weights_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=_ROW_NUMBERS)
def unordered_coefficients_kernel(
    inner_ptr,  # (B, N): x = ⟨g, f⟩
    weights_ptr,  # (B, N)
    log_attention_ptr,  # (B, N)
    coefficients_ptr,  # (B, N), written
    n_draws,
    n_nodes,
    step,
    stride_log_attention_b,
    stride_log_attention_n,
    ACCURACY: tl.constexpr,
    NODES: tl.constexpr,
):
    """One program: w_s (x_s − what the other draws estimate) of one row; see leave_one_out in unordered.py."""
    row = tl.program_id(0).to(tl.int64)
    log_attention_row = log_attention_ptr + row * stride_log_attention_b
    stride = stride_log_attention_n
    u, density = _quadrature(log_attention_row, n_draws, stride, step, n_nodes, ACCURACY, NODES)
    shares = tl.zeros((NODES,), tl.float64)  # Σ_s a_s x_s / (1 − e^{−a_s u})
    for draw in range(n_draws):
        attention = tl.exp(_log_attention(log_attention_row, draw, stride))
        own = attention * tl.load(inner_ptr + row * n_draws + draw).to(tl.float64)
        shares += own / _one_minus_exp(-attention * u)
    for draw in range(n_draws):
        attention = tl.exp(_log_attention(log_attention_row, draw, stride))
        at = row * n_draws + draw
        x = tl.load(inner_ptr + at).to(tl.float64)
        inverse = 1.0 / _one_minus_exp(-attention * u)
        without = inverse * density  # up to a factor: the density without this draw
        others = tl.sum((shares - attention * x * inverse) * without, 0) / tl.sum(without, 0)
        baseline = tl.where(n_draws == 1, attention * 0.0, attention * x + others)  # one draw has no others
        coefficient = tl.load(weights_ptr + at).to(tl.float64) * (x - baseline)
        tl.store(coefficients_ptr + at, coefficient.to(coefficients_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=_ROW_NUMBERS)
def ordered_coefficients_kernel(
    inner_ptr,  # (B, N): x = ⟨g, f⟩
    log_attention_ptr,  # (B, N)
    coefficients_ptr,  # (B, N), written
    n_draws,
    stride_log_attention_b,
    stride_log_attention_n,
    REPLACE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: the gradient to log a of one row with features less a baseline; see centred_coefficients."""
    row = tl.program_id(0).to(tl.int64)
    draw = tl.arange(0, BLOCK_N)
    valid = draw < n_draws
    log_attention_ptrs = log_attention_ptr + row * stride_log_attention_b + draw * stride_log_attention_n
    log_a = tl.load(log_attention_ptrs, mask=valid, other=-float("inf")).to(tl.float64)
    x = tl.load(inner_ptr + row * n_draws + draw, mask=valid, other=0.0).to(tl.float64)
    attention = tl.exp(log_a)
    poison = tl.sum(attention, 0) * 0.0
    if REPLACE:
        others = (x - tl.sum(x, 0) / n_draws) / tl.maximum(n_draws - 1, 1)
        coefficients = tl.where(n_draws == 1, x, others)
    else:
        largest = tl.max(log_a, 0)
        position = tl.min(tl.where(log_a == largest, draw, BLOCK_N), 0)
        rest = tl.where(draw == position, 0.0, attention)
        mass = tl.where(draw > position, _one_minus_exp(largest), 1.0) - (tl.cumsum(rest, 0) - rest)
        mass = tl.maximum(mass, attention)  # it holds at least the cell drawn next
        seen = attention * x
        estimates = tl.where(valid, tl.cumsum(seen, 0) - seen + mass * x, 0.0)  # E_k
        before = tl.cumsum(estimates, 0) - estimates
        baseline = tl.where(valid & (draw > 0), before / tl.maximum(draw, 1), 0.0)
        after = tl.sum(baseline, 0) - tl.cumsum(baseline, 0)  # Σ_{j>k} of the baselines
        later = (n_draws - 1 - draw).to(tl.float64)
        coefficients = (mass * (x - baseline) + attention * (later * x - after)) / n_draws
    coefficients += poison
    coefficients_ptrs = coefficients_ptr + row * n_draws + draw
    tl.store(coefficients_ptrs, coefficients.to(coefficients_ptr.dtype.element_ty), mask=valid)
