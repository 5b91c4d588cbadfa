"""Triton kernels of what the unordered estimator weighs draws by, and of its control variate: a program a row.

The formulas are those of `unordered.py`. A thread holds nodes of the quadrature and goes through the draws one by one,
so that any number of draws fits; the mass left is summed LANES draws at a time.

Where the results are float32, float32 will do: nothing cancels but the mass left, which is a pair of float32
(`pairs.py`), and the logarithm of the density, which is made of small numbers. With x = a u, a draw's factor 1 − e^{−x}
is x times (1 − e^{−x}) / x. Where a is less than the mass left, the logarithm of x is left out: log a is the same at
all nodes, and log u is log(cu), a node, less log c, the same again. Where it is more, 1 − e^{−x} is near 1 wherever the
density counts. So each draw adds an error of some 4 roundings. What matters is their differences between nodes, over
which the density is narrow, as 1 / √N: 10⁻⁵ at N = 300, if all erred alike.
"""

import triton
import triton.language as tl

from ats_kernels.pooling.pairs import (
    add,
    exp_near,
    exp_pair,
    fixed_unit,
    from_fixed,
    one_minus_exp,
    one_minus_exp_pair,
    to_fixed,
    two_sum,
)

LANES = tl.constexpr(64)  # draws whose masses are summed at a time
_NUMBERS = ("n_draws", "n_nodes", "stride_log_attention_b")


@triton.jit
def _log_attention(log_attention_row, draw, stride, COMPUTE: tl.constexpr):
    """log a of a draw. A cell below the least is weighted as if it were there, and nothing underflows."""
    log_a = tl.load(log_attention_row + draw * stride).to(COMPUTE)
    least = -600.0 if log_a.dtype == tl.float64 else -80.0
    return tl.where(log_a < least, least, log_a)  # NaN stays


@triton.jit
def _attention(log_attention_row, draw, stride, COMPUTE: tl.constexpr):
    return exp_near(_log_attention(log_attention_row, draw, stride, COMPUTE))


@triton.jit
def _quadrature(
    log_attention_row, n_draws, stride, step, n_nodes,
    ACCURACY: tl.constexpr, NODES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The nodes u (NODES,) of a row's quadrature and their density π, which sums to 1; 0 past the last node."""
    # The mass left, the largest cell taken off as −expm1(log a), which loses nothing.
    lane = tl.arange(0, LANES)
    largest = tl.zeros((), COMPUTE) - float("inf")
    second = largest
    place = 0
    poison = tl.zeros((), COMPUTE)
    for start in range(0, n_draws, LANES):
        draw = start + lane
        log_a = tl.load(log_attention_row + draw * stride, mask=draw < n_draws, other=-float("inf")).to(COMPUTE)
        poison += tl.where(tl.sum((log_a != log_a).to(tl.int32), 0) > 0, float("nan"), 0.0)
        first = tl.max(log_a, 0)
        at = tl.min(tl.where(log_a == first, draw, n_draws), 0)
        rest = tl.max(tl.where(draw == at, -float("inf"), log_a), 0)
        second = tl.maximum(tl.maximum(second, rest), tl.minimum(first, largest))
        place = tl.where(first > largest, at, place)
        largest = tl.maximum(largest, first)
    unit = fixed_unit(tl.exp(second).to(tl.float32))
    taken = to_fixed(unit.to(COMPUTE) * 0.0, unit.to(COMPUTE) * 0.0, unit)
    for start in range(0, n_draws, LANES):
        draw = start + lane
        other = (draw < n_draws) & (draw != place)
        log_a = tl.load(log_attention_row + draw * stride, mask=other, other=-float("inf")).to(COMPUTE)
        attention, low = exp_pair(tl.where(log_a == log_a, log_a, -float("inf")))
        taken += tl.sum(to_fixed(attention, low, unit), 0)
    before, before_low = from_fixed(taken, unit)
    left, left_low = one_minus_exp_pair(largest)
    left, left_low = add(left, left_low, -before, -before_low)
    left += left_low
    least = 1e-250 if left.dtype == tl.float64 else 1e-34
    left = tl.where(left < least, least, left)
    index = tl.arange(0, NODES)
    node = index.to(COMPUTE) * step - ACCURACY  # log(cu)
    scaled = tl.exp(node)
    u = scaled / left
    log_density = tl.zeros((NODES,), COMPUTE)
    lost = tl.zeros((NODES,), COMPUTE)
    count = tl.zeros((), COMPUTE) + 1.0  # du = u dv, and the draws whose logarithm of x is left out
    for draw in range(n_draws):
        attention = _attention(log_attention_row, draw, stride, COMPUTE)
        x = attention * u
        factor = one_minus_exp(-x)
        small = x * 0.0 + (attention - left) < 0.0
        count += (attention < left).to(COMPUTE)
        term = tl.log(factor / tl.where(small, tl.where(x > 0.0, x, factor), 1.0))
        log_density, more = two_sum(log_density, term)
        lost += more
    log_density += lost + (count * (node - tl.log(count)) - scaled)
    log_density = tl.where(index < n_nodes, log_density, -float("inf"))
    density = tl.exp(log_density - tl.max(log_density, 0))
    return u, density / tl.sum(density, 0) + poison


@triton.jit(do_not_specialize=_NUMBERS)
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
    COMPUTE: tl.constexpr,
):
    """One program: the weights of one row, E_π[a / (1 − e^{−a u})], scaled to sum to 1."""
    row = tl.program_id(0).to(tl.int64)
    log_attention_row = log_attention_ptr + row * stride_log_attention_b
    stride = stride_log_attention_n
    u, density = _quadrature(log_attention_row, n_draws, stride, step, n_nodes, ACCURACY, NODES, COMPUTE)
    total = tl.zeros((), COMPUTE)
    lost = tl.zeros((), COMPUTE)
    for draw in range(n_draws):
        attention = _attention(log_attention_row, draw, stride, COMPUTE)
        weight = attention * tl.sum(density / one_minus_exp(-attention * u), 0)
        tl.store(weights_ptr + row * n_draws + draw, weight)
        total, more = two_sum(total, weight)
        lost += more
    total += lost
    tl.debug_barrier()  # the stores above come first
    for draw in range(n_draws):  # 1 but for rounding
        weight = tl.load(weights_ptr + row * n_draws + draw) / total
        tl.store(weights_ptr + row * n_draws + draw, weight)


@triton.jit(do_not_specialize=_NUMBERS)
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
    COMPUTE: tl.constexpr,
):
    """One program: w_s (x_s − what the other draws estimate) of one row; see leave_one_out in unordered.py."""
    row = tl.program_id(0).to(tl.int64)
    log_attention_row = log_attention_ptr + row * stride_log_attention_b
    stride = stride_log_attention_n
    u, density = _quadrature(log_attention_row, n_draws, stride, step, n_nodes, ACCURACY, NODES, COMPUTE)
    shares = tl.zeros((NODES,), COMPUTE)  # Σ_s a_s x_s / (1 − e^{−a_s u})
    lost = tl.zeros((NODES,), COMPUTE)
    for draw in range(n_draws):
        attention = _attention(log_attention_row, draw, stride, COMPUTE)
        own = attention * tl.load(inner_ptr + row * n_draws + draw).to(COMPUTE)
        shares, more = two_sum(shares, own / one_minus_exp(-attention * u))
        lost += more
    for draw in range(n_draws):
        attention = _attention(log_attention_row, draw, stride, COMPUTE)
        at = row * n_draws + draw
        x = tl.load(inner_ptr + at).to(COMPUTE)
        inverse = 1.0 / one_minus_exp(-attention * u)
        without = inverse * density  # up to a factor: the density without this draw
        others = tl.sum(((shares - attention * x * inverse) + lost) * without, 0) / tl.sum(without, 0)
        baseline = tl.where(n_draws == 1, attention * 0.0, attention * x + others)  # one draw has no others
        coefficient = tl.load(weights_ptr + at).to(COMPUTE) * (x - baseline)
        tl.store(coefficients_ptr + at, coefficient.to(coefficients_ptr.dtype.element_ty))
