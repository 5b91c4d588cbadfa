"""Device functions on numbers that are sums of two float32, the second what the first lost in rounding: some 45 bits.

Consumer GPUs do float64 at a 64th of float32's rate. Where what is left of 1 cancels, pairs stand in for it, and sums
in whole numbers. Given float64, all of them compute in float64, and second parts are 0.
Sources: Dekker, 1971; Knuth, "The art of computer programming", 4.2.2.
"""

import triton
import triton.language as tl

_FEWEST = tl.constexpr(-150.0)  # exp is 0 in float32 from here down
# 0.693359375 less log 2, and a third of a half, as sums of two float32
_REST, _REST_LOW = tl.constexpr(2.1219444170128554e-4), tl.constexpr(-1.6465717678215697e-12)
_SIXTH, _SIXTH_LOW = tl.constexpr(0.16666667163372040), tl.constexpr(-4.967053740534411e-09)


@triton.jit
def two_sum(a, b):
    """a + b, and what it lost."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


@triton.jit
def add(a, a_low, b, b_low):
    """The sum of two pairs."""
    total, lost = two_sum(a, b)
    return _renewed(total, lost + (a_low + b_low))


@triton.jit
def _renewed(a, low):
    total = a + low
    return total, low - (total - a)


@triton.jit
def _upper(a):
    """The upper 12 bits of a float32 number: products of such are exact."""
    return (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _two_product(a, b):
    product = a * b
    a_upper = _upper(a)
    b_upper = _upper(b)
    a_rest = a - a_upper
    b_rest = b - b_upper
    return product, ((a_upper * b_upper - product) + a_upper * b_rest + a_rest * b_upper) + a_rest * b_rest


@triton.jit
def _multiply(a, a_low, b, b_low):
    product, lost = _two_product(a, b)
    return _renewed(product, lost + (a * b_low + a_low * b))


@triton.jit
def _growth(x):
    """n and the pair q with exp(x) = 2^n (1 + q), of float32 x ≤ 0; q to full relative precision where n is 0."""
    x = tl.maximum(x, _FEWEST)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    product, lost = _two_product(n, n * 0.0 + _REST)
    r, r_low = two_sum(x - n * 0.693359375, product)  # the difference is exact
    r, r_low = _renewed(r, r_low + (lost + n * _REST_LOW))
    r *= 0.0625
    r_low *= 0.0625
    # exp(r) − 1 = r + r² (1/2 + r (1/6 + r (1/24 + r (1/120 + r / 720)))), |r| < 0.022
    t, t_low = two_sum(r * 0.0 + _SIXTH, r * (0.041666668 + r * (0.008333334 + r * 0.0013888889)))
    t, t_low = _multiply(r, r_low, t, t_low + _SIXTH_LOW)
    t, t_low = add(r * 0.0 + 0.5, r * 0.0, t, t_low)
    square, square_low = _multiply(r, r_low, r, r_low)
    t, t_low = _multiply(square, square_low, t, t_low)
    q, q_low = add(r, r_low, t, t_low)
    for _ in tl.static_range(4):  # (1 + q)² = 1 + q (2 + q)
        more, more_low = add(q * 0.0 + 2.0, q * 0.0, q, q_low)
        q, q_low = _multiply(q, q_low, more, more_low)
    return n.to(tl.int32), q, q_low


@triton.jit
def exp_pair(x):
    """exp(x) of x ≤ 0, to 2^-43 of its value in float32."""
    if x.dtype == tl.float64:
        return tl.exp(x), x * 0.0
    n, q, q_low = _growth(x)
    grown, low = add(q * 0.0 + 1.0, q * 0.0, q, q_low)
    half = n >> 1  # 2^n may be less than any normal number
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return grown * first * second, low * first * second


@triton.jit
def exp_near(x):
    """exp(x) of x ≤ 0 within some roundings of its value, however far x is from 0."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    # A power of 2 and a small rest: a product with log2(e) alone would lose what x has before its point.
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    return tl.exp2(n) * tl.exp((x - n * 0.693359375) + n * _REST)


@triton.jit
def one_minus_exp(x):
    """1 − exp(x) to full precision for x ≤ 0 (Kahan's expm1; Triton has none of its own)."""
    grown = tl.exp(x)
    difference = 1.0 - grown
    # log(grown) makes up for what grown lost in rounding; where nothing is left of x, 1 − exp(x) is −x.
    corrected = difference * x / tl.log(tl.where((grown == 1.0) | (grown == 0.0), 0.5, grown))
    return tl.where(grown == 1.0, -x, tl.where(grown == 0.0, 1.0, corrected))


@triton.jit
def one_minus_exp_pair(x):
    """1 − exp(x) of x ≤ 0, to 2^-43 of its value in float32."""
    if x.dtype == tl.float64:
        return one_minus_exp(x), x * 0.0
    n, q, q_low = _growth(x)
    grown, low = exp_pair(x)
    left, left_low = add(q * 0.0 + 1.0, q * 0.0, -grown, -low)
    return tl.where(n == 0, -q, left), tl.where(n == 0, -q_low, left_low)


@triton.jit
def fixed_unit(largest):
    """The power of two up to a number, as a float32 that is normal: the unit of `to_fixed`."""
    bits = tl.abs(largest).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 0x00800000), 0x7E000000).to(tl.float32, bitcast=True)


@triton.jit
def to_fixed(a, low, unit):
    """Numbers whose sums are exact, of pairs up to twice the unit: int64, 2^46 of which are one. Float64 stays."""
    if a.dtype == tl.float64:
        return a
    # 1 / unit from its bits: a quotient of float32 is not always rounded right.
    inverse = (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return (a * inverse * 70368744177664.0).to(tl.int64) + (low * inverse * 70368744177664.0).to(tl.int64)


@triton.jit
def from_fixed(fixed, unit):
    """The pair of a number of `to_fixed`."""
    if fixed.dtype == tl.float64:
        return fixed, fixed * 0.0
    upper = fixed.to(tl.float32)
    lower = (fixed - upper.to(tl.int64)).to(tl.float32)
    return upper * 1.4210854715202004e-14 * unit, lower * 1.4210854715202004e-14 * unit


@triton.jit
def sums_before(a, low):
    """The pairs' sums of what comes before each, along their one dimension."""
    unit = fixed_unit(tl.max(tl.abs(a), 0).to(tl.float32))
    fixed = to_fixed(a, low, unit)
    return from_fixed(tl.cumsum(fixed, 0) - fixed, unit)
