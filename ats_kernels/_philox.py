"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A counter-based generator: the numbers are a function of a key (the seed) and a counter that names what they are for,

    counter = (index // 2, row, stream, 0),    number `index` = words (0, 1) of the output if even, (2, 3) if odd

so they are the same on every device and in whatever order or shape they are made. 32-bit words live in int64.
"""

import numpy as np
import torch
from torch import Tensor

# What a number is for. Streams never share a counter.
BLOCKS, CELLS, REPEATS = 0, 1, 2

_ROUNDS = 10
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
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


def paired_bits(seed: Tensor, pair: Tensor, row: Tensor, stream: int | Tensor) -> Tensor:
    """`random_bits` of the numbers 2·pair and 2·pair + 1, beside each other on the last dim, for CPU tensors.

    One counter gives both. NumPy's small operations cost half of PyTorch's, and there are fifty of them.
    """
    if torch.compiler.is_compiling():  # a compiler fuses the plain form, and cannot look into NumPy
        index = torch.stack((2 * pair, 2 * pair + 1), -1).flatten(-2)
        if isinstance(stream, Tensor):
            stream = stream.repeat_interleave(2, -1)
        return random_bits(seed, index, row, stream)
    counter_0, counter_1 = pair.numpy(), row.numpy()
    shape = np.broadcast(counter_0, counter_1).shape
    lane = (2,) + (1,) * len(shape)
    word, half = np.uint64(_WORD), np.uint64(32)
    key = int(seed)
    keys = np.array((key >> 32 & _WORD, key & _WORD), np.uint64) + _KEY_SCHEDULE & word  # (rounds, 2)
    multipliers = _LANE_MULTIPLIERS.reshape(lane)
    # The two products of a round are lanes of one array: the one of c0, then that of c2.
    state = np.empty((2, *shape), np.uint64)  # (c0, c2)
    state[0], state[1] = counter_0, stream.numpy() if isinstance(stream, Tensor) else stream
    low = np.empty_like(state)  # (c3, c1), and above these words bits without meaning
    low[0], low[1] = 0, counter_1
    products = np.empty_like(state)
    crossed = state[::-1]  # what the product of c0 gives is the next c2
    for round_key in keys.reshape(-1, *lane):
        np.multiply(state, multipliers, out=products)
        np.right_shift(products, half, out=crossed)
        np.bitwise_xor(crossed, low, out=crossed)
        np.bitwise_xor(crossed, round_key, out=crossed)
        np.bitwise_and(crossed, word, out=crossed)
        low, products = products, low
    bits = np.empty((*shape, 2), np.uint64)
    np.right_shift(low[::-1] & word, np.uint64(11), out=products)
    np.bitwise_or(state << np.uint64(21), products, out=np.moveaxis(bits, -1, 0))
    return torch.from_numpy(bits.reshape(*shape[:-1], -1).view(np.int64))  # (…, 2·pairs)


def uniform(bits: Tensor) -> Tensor:
    """float64 in [2^-54, 1 − 2^-53] from 53 bits: neither 0 nor 1, so that no logarithm of it is infinite."""
    return bits.double().add_(0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-53)


def log_exponential(bits: Tensor) -> Tensor:
    """The logarithm of an exponential variable, log(−log(1 − uniform)), its relative precision kept as it nears 0."""
    return uniform(bits).neg_().log1p_().neg_().log_()
