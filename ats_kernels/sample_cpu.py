"""The CPU path of `sample`: one read of the logits, few and coarse operations, no compiler needed.

Same algorithm, random numbers and draws as the reference in `sample`. It reads the logits in chunks that stay in cache
for each block's largest logit, sum of exponentials and part of the entropy, in the logits' precision (float32 at
least; float64 with replacement, where the order of the draws rests on the total of all sums). Only what decides the
draw and the precision of log a is computed again in float64: the blocks that may hold drawn cells, and the block of
the largest logit.

All but the chunks is small and NumPy's: an operation costs it half of what it costs PyTorch, and wakes no threads. The
chunks are raised to base 2, for which PyTorch has a vectorised loop of its own: the exponential to base e is MKL's, and
takes twice the time on some processors.
"""

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ats_kernels import _philox
from ats_kernels._checks import compute_dtype
from ats_kernels.sample import Draw, Statistics, _repeats, block_size

# Logits a chunk: its arrays stay in cache, and the work outweighs what starting an operation and its threads costs.
_CHUNK = 2**20

# Up to so many logits in all, operations cost more than what they work on: every block is a candidate.
_SMALL = 2**12

# Ring times of blocks from float32 sums are off by about 1e-6. Where the n-th and the next are no farther apart than
# NEAR, blocks beyond the n first are taken: one missing then would need that many others as near.
NEAR = 1e-4
SPARE_BLOCKS = 4

_scratch = threading.local()

_LOG2_E = 1 / math.log(2)
_LOWEST = float(np.finfo(np.float64).min)
_NO_LOG = -1e300  # in place of log 0 where it is multiplied by 0


class _Candidates(NamedTuple):
    """Statistics of whole rows, and the blocks that may hold drawn cells; all float64 but `chosen`."""

    top: np.ndarray  # (B,) the largest logit
    rest: np.ndarray  # (B,) Σ exp(z − top) over all cells but the one of the largest logit
    spread: np.ndarray  # (B,) Σ (z − top) exp(z − top)
    chosen: np.ndarray  # (B, S) int64, numbers of blocks
    log_mass: np.ndarray  # (B, S, block) their logits less the largest, −inf past the last cell
    log_e: tuple[np.ndarray, np.ndarray] | None  # log-exponentials (B, S) of blocks and (B, S, block) of cells


def sample_cpu(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """Draw from logits (B, K) on the CPU; like `_sample_ref`, `method` being what `seed` is None for."""
    if torch.compiler.is_compiling():
        *draw, peak, log_total = _opaque_sample(logits, n, replace, seed)
        return Draw(*draw), Statistics(peak, log_total, draw[3])
    return _sample(logits.detach(), n, replace, seed)


def _sample(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Draw, Statistics]:
    rows, cells = logits.shape
    block = block_size(cells)
    distinct = min(n, cells)
    key = None if seed is None else int(seed)
    row = np.arange(rows)[:, None]  # (B, 1)
    with np.errstate(all="ignore"):  # −inf − −inf and the like make NaN, as they should
        if logits.numel() <= _SMALL:
            found = _every_block(logits, block, key, row)
        else:
            found = _likely_blocks(logits, block, distinct, replace, key, row)
        top, rest, spread, chosen, log_mass, log_e = found
        log_total = np.log1p(rest)
        entropy = log_total - spread / (1 + rest)
        flat = log_mass.reshape(rows, -1)  # (B, S·block)
        if log_e is None:
            order = np.argsort(-flat, axis=-1, kind="stable")[:, :distinct]
        else:
            _, order = _smallest(_ring_times(log_mass, *log_e).reshape(rows, -1), distinct)
    indices = chosen[row, order // block] * block + order % block  # (B, min(n, K))
    log_attention = flat[row, order] - log_total[:, None]
    bad = np.isnan(rest) | (log_attention[:, 0 if replace else -1] == -np.inf)
    if replace and seed is not None:
        again = _repeats(torch.from_numpy(np.exp(log_attention)), n, seed).numpy()  # (B, n)
        indices, log_attention = indices[row, again], log_attention[row, again]
    if bad.any():
        indices[bad] = -1
        for value in (log_attention, log_total, entropy):
            value[bad] = np.nan
    values = indices, log_attention, top + log_total, entropy, top, log_total
    *draw, peak, log_totals = (torch.from_numpy(value) for value in values)
    return Draw(*draw), Statistics(peak, log_totals, draw[3])


@torch.library.custom_op(
    "ats_kernels::sample_cpu",
    mutates_args=(),
    schema="(Tensor logits, int n, bool replace, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _opaque_sample(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Tensor, ...]:
    """`_sample` as one operator to a compiler, which cannot look into NumPy."""
    draw, statistics = _sample(logits.detach(), n, replace, seed)
    return *draw, statistics.peak, statistics.log_total


@_opaque_sample.register_fake
def _(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    drawn = logits.new_empty((rows, n), dtype=torch.float64)
    return (torch.empty_like(drawn, dtype=torch.int64), drawn, *(drawn.new_empty(rows) for _ in range(4)))


def _every_block(logits: Tensor, block: int, key: int | None, row: np.ndarray) -> _Candidates:
    """All blocks, in float64 throughout."""
    rows, cells = logits.shape
    n_blocks = -(-cells // block)
    padded = np.full((rows, n_blocks * block), -np.inf)
    padded[:, :cells] = logits.double().numpy()
    top = padded.max(-1, keepdims=True)  # (B, 1)
    log_mass = padded - top
    mass = np.exp(log_mass)
    # The peak's own 1 is left out of the sum, so that log a stays exact where one cell holds nearly all.
    mass[row[:, 0], log_mass.argmax(-1)] = 0
    rest = mass.sum(-1)
    mass *= np.maximum(log_mass, _NO_LOG)
    log_e = None
    if key is not None:  # all random numbers are made in one go
        pairs = np.arange((n_blocks + 1) // 2), np.arange(n_blocks * block // 2)
        stream = np.repeat((_philox.BLOCKS, _philox.CELLS), [len(pair) for pair in pairs])
        numbers = _philox.log_exponential_numpy(_philox.paired_bits(key, np.concatenate(pairs), row, stream))
        log_e = numbers[:, :n_blocks], numbers[:, 2 * len(pairs[0]) :].reshape(rows, n_blocks, block)
    chosen = np.zeros_like(row) + np.arange(n_blocks)
    return _Candidates(top[:, 0], rest, mass.sum(-1), chosen, log_mass.reshape(rows, n_blocks, block), log_e)


def _likely_blocks(
    logits: Tensor, block: int, distinct: int, replace: bool, key: int | None, row: np.ndarray
) -> _Candidates:
    """The blocks that hold the first `distinct` cells, from the statistics of all blocks."""
    block_peak, block_sum, block_spread = _block_statistics(logits, block, wide=replace).double().numpy()
    top_block = block_peak.argmax(-1)[:, None]  # (B, 1)
    top = block_peak[row, top_block]
    below = block_peak - top  # (B, K/block) ≤ 0
    scale = np.exp(below)
    block_spread += block_sum * np.maximum(below, _NO_LOG)
    spread = np.einsum("bs,bs->b", scale, block_spread)

    n_blocks = below.shape[1]
    few = distinct + SPARE_BLOCKS < n_blocks
    chosen = log_e = None
    if key is not None:
        bits = _philox.paired_bits(key, np.arange((n_blocks + 1) // 2), row, _philox.BLOCKS)
        block_log_e = _philox.log_exponential_numpy(bits)[:, :n_blocks]
        if few:
            times, chosen = _smallest(block_log_e - below - np.log(block_sum), distinct + SPARE_BLOCKS)
            if SPARE_BLOCKS and (times[:, distinct] > times[:, distinct - 1] + NEAR).all():
                chosen = chosen[:, :distinct]
            block_log_e = block_log_e[row, chosen]
        else:
            chosen = np.zeros_like(row) + np.arange(n_blocks)
        pair = (chosen * (block // 2))[..., None] + np.arange(block // 2)  # (B, S, block/2)
        bits = _philox.paired_bits(key, pair, row[..., None], _philox.CELLS)
        log_e = block_log_e, _philox.log_exponential_numpy(bits)  # (B, S), (B, S, block)
    else:
        chosen = np.argsort(-block_peak, axis=-1, kind="stable")[:, :distinct]
        chosen.sort(axis=-1)  # ascending, so that ties go to the cell of the lowest index

    # The block of the largest logit goes along, so that what is not the peak's can be summed to its full precision.
    log_mass = _gather_blocks(logits, np.concatenate((chosen, top_block), -1), block)
    log_mass -= top[..., None]
    peak_mass = np.exp(log_mass[:, -1])  # (B, block)
    peak_mass[row[:, 0], peak_mass.argmax(-1)] = 0
    scale[row, top_block] = 0
    rest = peak_mass.sum(-1) + np.einsum("bs,bs->b", scale, block_sum)
    return _Candidates(top[:, 0], rest, spread, chosen, log_mass[:, :-1], log_e)


def _smallest(keys: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's smallest keys (B, count), in ascending order, and their places."""
    values, places = torch.from_numpy(keys).topk(count, largest=False)  # NumPy's selection takes three times as long
    return values.numpy(), places.numpy()


def _ring_times(log_mass: np.ndarray, log_e_block: np.ndarray, log_e_cell: np.ndarray) -> np.ndarray:
    """`ring_times` of NumPy arrays."""
    largest = np.maximum(log_mass.max(-1, keepdims=True), _LOWEST)  # (B, S, 1), finite also without mass
    shifted = log_mass - largest
    log_total = np.log(np.exp(shifted, out=shifted).sum(-1, keepdims=True)) + largest
    alone = log_e_cell - log_mass  # as if the block were not known
    first = np.minimum(alone.min(-1, keepdims=True), -_LOWEST)
    # log(e^block_time + e^alone − e^first)
    excess = np.exp(np.subtract(first, alone, out=shifted), out=shifted)
    np.log1p(np.negative(excess, out=excess), out=excess)
    excess += alone
    block_time = torch.from_numpy(log_e_block[..., None] - log_total)
    return torch.logaddexp(block_time, torch.from_numpy(excess)).numpy()  # NumPy's is not vectorised


def _chunks(rows: int, columns: int, width: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of columns, `width` logits each, with about _CHUNK logits together."""
    step = max(1, min(columns, _CHUNK // width))
    height = max(1, _CHUNK // (step * width))
    for first in range(0, rows, height):
        for left in range(0, columns, step):
            yield slice(first, min(first + height, rows)), slice(left, min(left + step, columns))


def _block_statistics(logits: Tensor, block: int, *, wide: bool) -> Tensor:
    """Of each block, (3, B, K/block): the largest logit m, Σ exp(z − m) and Σ (z − m) exp(z − m)."""
    rows, cells = logits.shape
    dtype = torch.float64 if wide else compute_dtype(logits.dtype)
    statistics = torch.empty(3, rows, -(-cells // block), dtype=dtype, device="cpu")
    buffers = _kept_buffers(min(rows * cells, max(_CHUNK, block)), dtype)
    whole = cells // block
    for r, b in _chunks(rows, whole, block):
        part = logits[r, b.start * block : b.stop * block].unflatten(-1, (-1, block))
        _reduce_blocks(part, buffers, statistics[:, r, b])
    if cells % block:
        tail = logits[:, whole * block :].unsqueeze(1)  # a narrower block
        _reduce_blocks(tail, tail.new_empty(2, tail.numel(), dtype=dtype), statistics[:, :, whole:])
    statistics[2] *= math.log(2)
    return statistics


def _kept_buffers(length: int, dtype: torch.dtype) -> Tensor:
    """(2, length) that all chunks and all calls of a thread share: fresh pages would cost as much as reading a map."""
    size = 2 * length * dtype.itemsize
    kept = getattr(_scratch, "bytes", None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):  # or it could not be written to later, outside of that mode
            kept = _scratch.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype).view(2, length)


def _reduce_blocks(x: Tensor, buffers: Tensor, statistics: Tensor) -> None:
    """`_block_statistics` (3, R, S) of blocks of logits x (R, S, block), the third divided by log 2."""
    below, mass = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
    peak, total, spread = statistics
    if x.dtype != below.dtype:
        x = below.copy_(x)
    torch.amax(x, -1, out=peak)
    lowest = torch.finfo(peak.dtype).min
    torch.sub(x, peak.clamp(min=lowest).unsqueeze(-1), out=below).mul_(_LOG2_E)
    torch.exp2(below, out=mass)
    torch.sum(mass, -1, out=total)
    torch.nansum(mass.mul_(below), -1, out=spread)  # 0 · −inf at a masked cell is NaN, and means 0


def _gather_blocks(logits: Tensor, chosen: np.ndarray, block: int) -> np.ndarray:
    """The logits (B, S, block) of the chosen blocks (B, S) in float64, −inf past the last cell."""
    rows, cells = logits.shape
    index = (chosen * block)[..., None] + np.arange(block)  # (B, S, block)
    inside = index if cells % block == 0 else np.minimum(index, cells - 1)
    values = logits.gather(-1, torch.from_numpy(inside.reshape(rows, -1))).double().numpy().reshape(index.shape)
    if inside is not index:
        values[index >= cells] = -np.inf
    return values


def grad_cpu(logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient (B, K) of the logits in one read and one write, chunk by chunk in cache.

    With w = z − peak and T = logsumexp − peak it is ``e^w (A − g_H e^-T w)``, A = (g_lse − Σ g − g_H (H − T)) e^-T, and
    at drawn cells g more. z − peak is exact where it matters; z − logsumexp would lose what a large logsumexp has no
    digits for.
    """
    rows, cells = logits.shape
    dtype = compute_dtype(logits.dtype)
    floor = -150.0 if dtype == torch.float32 else -1080.0  # 2 to this is 0, and so is 0 · floor
    grad_log_attention, grad_logsumexp, grad_entropy = grads
    peak, log_total, entropy = statistics  # (B,) float64
    constant = grad_logsumexp - grad_log_attention.sum(-1, dtype=torch.float64)
    constant = constant - grad_entropy * (entropy - log_total)
    scale = log_total.neg().exp()
    constant, slope, peak = (
        value.to(dtype).unsqueeze(-1) for value in (constant * scale, grad_entropy * scale * -math.log(2), peak)
    )  # (B, 1)
    grad = logits.new_empty(logits.shape)
    buffers = logits.new_empty(2, min(rows * cells, _CHUNK), dtype=dtype)
    for r, c in _chunks(rows, cells):
        x, out = logits[r, c], grad[r, c]
        below, mass = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
        torch.sub(x, peak[r], out=below).mul_(_LOG2_E).clamp_(min=floor)
        torch.exp2(below, out=mass)
        below.mul_(slope[r]).add_(constant[r])
        torch.mul(below, mass, out=out)
    # Few cells: not worth rounding to half precision twice.
    return grad.scatter_add_(-1, indices.clamp(min=0), grad_log_attention.to(grad.dtype))
