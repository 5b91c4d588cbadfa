"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A counter-based generator: the numbers are a function of a key (the seed) and a counter that names what they are for,

    counter = (index // 2, row, stream, 0),    number `index` = words (0, 1) of the output if even, (2, 3) if odd

so they are the same on every device and in whatever order or shape they are made. 32-bit words live in int64.
"""

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
_LANE_MULTIPLIERS = np.array(_MULTIPLIERS, np.uint64)
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
    """`random_bits` of the numbers 2·pair and 2·pair + 1, beside each other on the last dim, as NumPy arrays.

    One counter gives both. NumPy's small operations cost half of PyTorch's, and there are thirty of them.
    """
    shape = np.broadcast(pair, row).shape
    lane = (2,) + (1,) * len(shape)
    keys = np.array((seed >> 32 & _WORD, seed & _WORD), np.uint64) + _KEY_SCHEDULE & np.uint64(_WORD)  # (rounds, 2)
    multipliers = _LANE_MULTIPLIERS.reshape(lane)
    # The two products of a round are lanes of one array: the one of c0, then that of c2. The state's upper words stay
    # 0, as the multiplication needs them: what is written to it has 32 bits.
    state = np.zeros((2, *shape), np.uint64)  # (c0, c2)
    state[0], state[1] = pair, stream
    crossed = state[::-1]  # what the product of c0 gives is the next c2
    crossed_low = _words(crossed, _LOW)
    products = [np.empty_like(state) for _ in range(2)]  # of this round and the one before, in turn
    low, high = ([_words(array, which) for array in products] for which in (_LOW, _HIGH))
    products[1][0], products[1][1] = 0, row  # the lower words are (c3, c1)
    for number, round_key in enumerate(keys.reshape(-1, *lane)):
        this, last = number % 2, 1 - number % 2
        np.multiply(state, multipliers, out=products[this])
        np.bitwise_xor(high[this], low[last], out=crossed_low)
        np.bitwise_xor(crossed, round_key, out=crossed)
    state_low = _words(state, _LOW)
    np.left_shift(state, np.uint64(21), out=state)
    np.bitwise_or(state_low, low[this][::-1] >> np.uint32(11), out=state_low)
    return np.ascontiguousarray(np.moveaxis(state, 0, -1)).reshape(*shape[:-1], -1).view(np.int64)  # (…, 2·pairs)


def _words(values: np.ndarray, which: int) -> np.ndarray:
    """The lower or upper 32 bits of each of `values` (…) uint64, contiguous along the last dim, as a view."""
    return values.view(np.uint32)[..., which::2]


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
