"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A counter-based generator: the numbers are a function of a key (the seed) and a counter that names what they are for,

    counter = (index // 2, row, stream, 0),    number `index` = words (0, 1) of the output if even, (2, 3) if odd

so they are the same on every device and in whatever order or shape they are made. 32-bit words live in int64.
"""

import math
import sys

import numpy as np
import torch
from torch import Tensor

# What a number is for. Streams never share a counter.
BLOCKS, CELLS, REPEATS = 0, 1, 2

_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)  # words of a 64-bit integer
_MULTIPLIERS_64 = np.array(_MULTIPLIERS, np.uint64)
_UPPER, _LIFT, _CUT = np.uint64(32), np.uint64(21), np.uint64(11)
_KEY_SCHEDULE = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.array(_KEY_STEPS[::-1], np.uint64)  # (rounds, 2)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The four 32-bit words of the output for the four of `counter` and the two of `key`, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64-bit products; int64 wraps, the bits are right
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def random_bits(seed: Tensor, index: Tensor, row: Tensor, stream: int | Tensor) -> Tensor:
    """53 random bits for each number `index` of `row` and `stream`, which broadcast; `seed` is a 0-dim int64."""
    zero = torch.zeros_like(index)
    words = philox4x32((index >> 1, row, zero + stream, zero), (seed & _WORD, seed >> 32 & _WORD))
    odd = (index & 1).bool()
    return torch.where(odd, words[2], words[0]) << 21 | torch.where(odd, words[3], words[1]) >> 11


def paired_bits(seed: int, pair: np.ndarray, row: np.ndarray, stream: int | np.ndarray) -> np.ndarray:
    """`random_bits` of the numbers 2·pair and 2·pair + 1, beside each other on the last dim, as NumPy arrays."""
    shape = np.broadcast(pair, row).shape
    bits = Counters(pair, row, stream).bits(seed)  # (2, M)
    return np.ascontiguousarray(bits.T).reshape(*shape[:-1], -1).view(np.int64)  # (…, 2·pairs)


class Counters:
    """Random numbers of M counters, two of each, for any seed, in NumPy arrays that are kept between calls.

    Starting an operation costs more than the few numbers it works on, hence: each works on both products of a round
    and on contiguous memory, writes to an array that is there, and what does not depend on the seed is computed once.
    Not for two threads at once.
    """

    def __init__(self, pair: np.ndarray, row: np.ndarray | int, stream: int | np.ndarray) -> None:
        shape = np.broadcast(pair, row, stream).shape
        self.count = count = math.prod(shape)
        # Flat halves: of c0, then of c2; upper words stay 0, as the multiplication needs them.
        self._state = np.empty(2 * count, np.uint64)
        self._multipliers = np.repeat(_MULTIPLIERS_64, count)
        self._mask = np.uint64(_WORD)
        self._products = [np.empty(2 * count, np.uint64) for _ in range(2)]  # of a round and the one before, in turn
        self._mixed = np.empty(2 * count, np.uint64)
        self._first = np.zeros((2, *shape), np.uint64)  # products of the first round
        self._first[1] = np.asarray(stream, np.uint64) * _MULTIPLIERS_64[1]
        self._first_mixed = np.zeros((2, *shape), np.uint64)  # and what the first key is mixed into
        self._first_mixed[1] = (self._first[1] >> _UPPER) ^ np.asarray(row, np.uint64)
        self.number(pair)

        halves = [array.reshape(2, count) for array in (self._state, self._mixed, *self._products)]
        self._state_halves, self._mixed_halves = halves[:2]
        self._crossed = self._state_halves[::-1]  # what the product of c0 gives is the next c2
        self._first_halves, self._first_mixed_halves = (
            array.reshape(2, count) for array in (self._first, self._first_mixed)
        )
        # Word j of `mixed` is word j + 1 of these products mixed with word j of the last: in each pair the lower one is
        # the upper mixed with the lower, as it should be, and the other is masked.
        last = [self._first.reshape(-1), *self._products]
        uppers = [_words(array)[_HIGH : 4 * count - _LOW] for array in self._products]
        lowers = [_words(array)[_LOW : 4 * count - _HIGH] for array in last]
        mixed = _words(self._mixed)[_LOW : 4 * count - _HIGH]
        self._rounds = [
            (self._products[k % 2], uppers[k % 2], lowers[2 - k % 2 if k else 0], mixed) for k in range(_ROUNDS - 1)
        ]
        self._last, self._last_halves = (array[-(_ROUNDS % 2)] for array in (self._products, halves[2:]))

    def number(self, pair: np.ndarray) -> None:
        """Give the counters other numbers."""
        first, mixed = self._first[0], self._first_mixed[0]
        np.multiply(pair, _MULTIPLIERS_64[0], out=first, casting="unsafe")
        np.right_shift(first, _UPPER, out=mixed)

    def bits(self, seed: int) -> np.ndarray:
        """53 random bits (2, M) uint64, of the numbers 2·pair and of 2·pair + 1; the next call writes over them."""
        multiply, mix, mask = np.multiply, np.bitwise_xor, np.bitwise_and
        keys = (np.array((seed >> 32 & _WORD, seed & _WORD), np.uint64) + _KEY_SCHEDULE) & self._mask  # (rounds, 2)
        keys = keys[..., None]
        state, mixed, mixed_halves, crossed, multipliers, lower = (
            self._state,
            self._mixed,
            self._mixed_halves,
            self._crossed,
            self._multipliers,
            self._mask,
        )
        mix(self._first_mixed_halves, keys[0], crossed)
        for (products, uppers, lowers, words), key in zip(self._rounds, keys[1:], strict=True):
            multiply(state, multipliers, products)
            mix(uppers, lowers, words)
            mask(mixed, lower, mixed)
            mix(mixed_halves, key, crossed)
        mask(self._last, lower, self._last)
        np.right_shift(self._last, _CUT, self._last)
        np.left_shift(state, _LIFT, state)
        np.bitwise_or(self._state_halves, self._last_halves[::-1], self._state_halves)
        return self._state_halves

    def negative_exponentials(self, seed: int, out: np.ndarray) -> None:
        """log(1 − uniform), the negative of exponential variables, as (M, 2) float64 to `out`."""
        np.add(self.bits(seed).T, 0.5, out)
        np.multiply(out, -(2.0**-53), out)
        np.maximum(out, 2.0**-53 - 1, out)
        torch.from_numpy(out).log1p_()  # NumPy's is vectorised on some processors only


def _words(values: np.ndarray) -> np.ndarray:
    """The 32-bit words of `values`."""
    return values.view(np.uint32)


def uniform(bits: Tensor) -> Tensor:
    """float64 in [2^-54, 1 − 2^-53] from 53 bits: neither 0 nor 1, so that no logarithm of it is infinite."""
    return bits.double().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-53)


def log_exponential(bits: Tensor) -> Tensor:
    """The logarithm of an exponential variable, log(−log(1 − uniform)), its relative precision kept as it nears 0."""
    return uniform(bits).neg_().log1p_().neg_().log_()


def log_exponential_numpy(bits: np.ndarray) -> np.ndarray:
    """`log_exponential` of a NumPy array."""
    numbers = bits + 0.5
    numbers *= -(2.0**-53)
    np.maximum(numbers, 2.0**-53 - 1, out=numbers)
    return torch.from_numpy(numbers).log1p_().neg_().log_().numpy()  # NumPy's logarithms are not vectorised
