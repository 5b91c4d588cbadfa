"""What the compiled loops of the CPU path share: random numbers and functions that a compiler turns into vectors.

This and the `loops` modules beside the ops are imported only where numba runs (`ats_kernels.backend.loops_run`). Each
loop is compiled at its first call for a dtype and kept on disk: beside this file, or where that may not be written to,
in the user's cache directory (``NUMBA_CACHE_DIR`` names another).

The functions are right to an ulp or two, as those of other libraries are. Python's `math` is used where few numbers
are: a call of it keeps a loop from becoming vectors.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

EXACT = {"contract"}  # a product and a sum may round once, and nothing else may change
SUMS = {"contract", "reassoc", "nsz"}  # sums may be taken in any order


def compiled(*, fastmath: set[str] = EXACT) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for what loops are made of."""
    wrappers = {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}  # only loops call it: there is less to compile
    return numba.njit(nogil=True, fastmath=fastmath, error_model="numpy", **wrappers)


def kept() -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for what Python calls: it releases the GIL and is kept on disk, where anything may be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": EXACT, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no directory to keep it in: compiled in each process
            return numba.njit(**options)(function)

    return decorate


@intrinsic
def _as_int(typing_context: Any, value: Any) -> Any:
    """The bits of a float64 as an int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int64))

    return types.int64(types.float64), generate


@intrinsic
def _as_float(typing_context: Any, value: Any) -> Any:
    """The float64 that has the bits of an int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


_LOG2_E = 1 / math.log(2)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # the former has 32 bits
_ROUND = 6755399441055744.0  # 1.5·2^52: adding it rounds to a whole number, which the lowest bits then hold
_ROUND_BITS = 0x4338000000000000
_LEAST = -708.0  # e to this is still a normal number
_HALVED_ROOT = 0x3FE6A09E667F3BCD  # the bits of √½
_1, _2, _3, _4, _5, _6, _7, _8, _9, _10, _11, _12, _13 = (1 / math.factorial(n) for n in range(1, 14))


@compiled()
def _power_and_rest(x):
    """2^k and e^r − 1 with x = k·ln 2 + r, |r| ≤ ½ ln 2, for −708 ≤ x ≤ 0 (NaN remains in the latter)."""
    rounded = x * _LOG2_E + _ROUND
    k = rounded - _ROUND
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = _13
    p = p * r + _12
    p = p * r + _11
    p = p * r + _10
    p = p * r + _9
    p = p * r + _8
    p = p * r + _7
    p = p * r + _6
    p = p * r + _5
    p = p * r + _4
    p = p * r + _3
    p = p * r + _2
    p = p * (r * r) + r
    return _as_float((_as_int(rounded) + 1023) << 52), p


@compiled()
def exp(x):
    """e^x for x ≤ 0; what is below e^−708 is that."""
    power, rest = _power_and_rest(_LEAST if x < _LEAST else x)
    return power * rest + power


@compiled()
def one_minus_exp(x):
    """1 − e^x for x ≤ 0, its relative precision kept near 0."""
    power, rest = _power_and_rest(_LEAST if x < _LEAST else x)
    return (1.0 - power) - power * rest


@compiled()
def log(x):
    """The natural logarithm of a normal number x > 0 (fdlibm's polynomial)."""
    bits = _as_int(x)
    exponent = (bits - _HALVED_ROOT) >> 52
    k = _as_float(exponent + _ROUND_BITS) - _ROUND
    f = _as_float(bits - (exponent << 52)) - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = 1.479819860511658591e-01
    r = r * z + 1.531383769920937332e-01
    r = r * z + 1.818357216161805012e-01
    r = r * z + 2.222219843214978396e-01
    r = r * z + 2.857142874366239149e-01
    r = r * z + 3.999999999940941908e-01
    r = r * z + 6.666666666666735130e-01
    r = r * z
    half = 0.5 * f * f
    return k * _LN2_HIGH - ((half - (s * (half + r) + k * _LN2_LOW)) - f)


@compiled()
def largest(values):
    """The largest of floats; NaN counts as more than inf. Compared as integers, of which a compiler makes vectors."""
    top = np.int64(-(2**63))
    for i in range(len(values)):
        bits = _as_int(np.float64(values[i]))
        top = max(top, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
    return _as_float(top ^ ((top >> 63) & 0x7FFFFFFFFFFFFFFF))


_WORD, _UPPER, _LIFT, _CUT = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(21), np.uint64(11)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_K0, _K1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ZERO = np.uint64(0)


@compiled()
def _round(c0, c1, c2, c3, k0, k1):
    a, b = c0 * _M0, c2 * _M1
    return (
        (b >> _UPPER) ^ c1 ^ k0,
        b & _WORD,
        (a >> _UPPER) ^ c3 ^ k1,
        a & _WORD,
        (k0 + _K0) & _WORD,
        (k1 + _K1) & _WORD,
    )


@compiled()
def _philox(c0, c1, c2, k0, k1):
    """Philox4x32-10 of the counter (c0, c1, c2, 0), unrolled."""
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, _ZERO, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round(c0, c1, c2, c3, k0, k1)
    return c0, c1, c2, c3


@compiled()
def _uniform(bits):
    """As `ats_kernels.philox` has it, of a float64 that holds 53 bits."""
    u = (bits + 0.5) * 2.0**-53
    return 1 - 2.0**-53 if u > 1 - 2.0**-53 else u


@compiled()
def uniform(seed, number, row, stream):
    """One uniform number."""
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    w0, w1, w2, w3 = _philox(np.uint64(number // 2), np.uint64(row), np.uint64(stream), k0, k1)
    upper, lower = (w2, w3) if number % 2 else (w0, w1)
    return _uniform(np.float64(np.int64((upper << _LIFT) | (lower >> _CUT))))


@compiled()
def log_exponentials(seed, first, row, stream, out):
    """Logarithms of the exponential variables 2·first, 2·first + 1, … of a row and a stream, to `out` of even length.

    They are log(−log(1 − uniform)), as `ats_kernels.philox` has them.
    """
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    c1, c2 = np.uint64(row), np.uint64(stream)
    half = len(out) // 2
    bits = np.empty((2, half), np.int64)
    even, odd = bits[0], bits[1]
    start = np.uint64(first)
    for pair in range(half):
        w0, w1, w2, w3 = _philox(start + np.uint64(pair), c1, c2, k0, k1)
        even[pair] = np.int64((w0 << _LIFT) | (w1 >> _CUT))
        odd[pair] = np.int64((w2 << _LIFT) | (w3 >> _CUT))
    for pair in range(half):
        out[2 * pair] = even[pair]
        out[2 * pair + 1] = odd[pair]
    for number in range(len(out)):
        u = _uniform(out[number])
        rest = 1.0 - u
        out[number] = log(-(log(rest) + ((1.0 - rest) - u) / rest))
