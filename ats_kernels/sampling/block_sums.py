"""Sums of exponentials over the blocks of a map, for the CPU's draws: one read of the logits in chunks.

Raised to base 2, PyTorch's own loop, which is faster than MKL's e^x.
"""

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ats_kernels.checks import compute_dtype

# Logits a chunk: its arrays stay in cache, and the work outweighs what starting an operation and its threads costs.
CHUNK = 2**20

# One logit for the whole row is the largest of so many blocks.
_SAMPLED_BLOCKS = 32
_FARTHEST_PEAK = 1e38  # from 0, that is still finite to base 2

_scratch = threading.local()

_LOG2_E = 1 / math.log(2)


class Sums(NamedTuple):
    """Sums over blocks, relative to a logit near the largest of each block (T is K/block) or of the row (T is 1)."""

    reference: np.ndarray  # (B, T) that logit, float64 as all of these; −inf for a block that is masked whole
    mass: np.ndarray  # (B, K/block) Σ exp(z − reference)
    spread: np.ndarray  # (B, T) Σ (z − reference) exp(z − reference)


def chunks(rows: int, columns: int, width: int = 1) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and of columns, `width` logits each, with about CHUNK logits together."""
    step = max(1, min(columns, CHUNK // width))
    height = max(1, CHUNK // (step * width))
    for first in range(0, rows, height):
        for left in range(0, columns, step):
            yield slice(first, min(first + height, rows)), slice(left, min(left + step, columns))


def _parts(logits: Tensor, block: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, slice, slice]]:
    """Logits (R, S, block) chunk by chunk, two buffers of their shape and of `dtype`, their rows and their blocks."""
    rows, cells = logits.shape
    whole = cells // block
    buffers = _kept_buffers(min(rows * cells, max(CHUNK, block)), dtype)
    for r, b in chunks(rows, whole, block):
        x = logits[r, b.start * block : b.stop * block].unflatten(-1, (-1, block))
        below, mass = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
        yield x, below, mass, r, b
    if cells % block:
        tail = logits[:, whole * block :].unsqueeze(1)  # a narrower block
        below, mass = tail.new_empty(2, *tail.shape, dtype=dtype)
        yield tail, below, mass, slice(None), slice(whole, whole + 1)


def block_sums(logits: Tensor, block: int, *, wide: bool, each: bool) -> Sums:
    """Sums over blocks, relative to the largest logit of `each` block or to one of the largest of the row."""
    n_blocks = -(-logits.shape[1] // block)
    dtype = torch.float64 if wide else compute_dtype(logits.dtype)
    if not each and logits.shape[0] * n_blocks * block <= CHUNK:
        return _sums_at_once(logits, block, dtype)
    mass = torch.empty(logits.shape[0], n_blocks, dtype=dtype, device="cpu")
    if each:
        reference = torch.empty_like(mass)
    else:
        some = logits.unfold(-1, min(block, logits.shape[1]), block * max(1, n_blocks // _SAMPLED_BLOCKS))
        peak = some.amax((-2, -1)).to(dtype)  # (B,)
        if not (peak.abs() < _FARTHEST_PEAK).all():
            return block_sums(logits, block, wide=wide, each=True)
        shift = peak.mul_(-_LOG2_E).unsqueeze(-1)  # (B, 1)
        rounded = float(torch.tensor(_LOG2_E, dtype=dtype, device="cpu"))
        reference = shift.double() / -rounded  # what the rounded numbers stand for
    spread = torch.zeros(reference.shape, dtype=dtype, device="cpu")
    for x, below, part, r, b in _parts(logits, block, dtype):
        if x.dtype != dtype:
            x = below.copy_(x)
        if each:
            torch.amax(x, -1, out=reference[r, b])
            peak = reference[r, b].clamp(min=torch.finfo(dtype).min)  # finite also where all cells are masked
            torch.sub(x, peak.unsqueeze(-1), out=below).mul_(_LOG2_E)
        else:  # a multiplication and an addition that round once: logits far from 0 lose nothing
            torch.add(shift[r].unsqueeze(-1), x, alpha=_LOG2_E, out=below)
        torch.exp2(below, out=part)
        torch.sum(part, -1, out=mass[r, b])
        part.mul_(below)
        # 0 · −inf at a masked cell is NaN, and means 0
        spread[r, b if each else slice(None)] += torch.nansum(part if each else part.flatten(1).unsqueeze(1), -1)
    return Sums(*(value.double().numpy() for value in (reference, mass, spread * math.log(2))))


def _sums_at_once(logits: Tensor, block: int, dtype: torch.dtype) -> Sums:
    """Sums over the blocks of logits that fit one chunk, relative to the largest of the row: as few steps as can be."""
    rows, cells = logits.shape
    length = -(-cells // block) * block
    below, mass = _kept_buffers(rows * length, dtype).view(2, rows, length)
    below[:, :cells] = logits
    below[:, cells:] = -math.inf
    reference = below.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)  # (B, 1), finite if all is masked, too
    torch.exp2(below.sub_(reference).mul_(_LOG2_E), out=mass)
    sums = mass.view(rows, -1, block).sum(-1)
    spread = torch.nansum(mass.mul_(below), -1, keepdim=True)  # 0 · −inf at a masked cell is NaN, and means 0
    return Sums(*(value.double().numpy() for value in (reference, sums, spread.double().mul_(math.log(2)))))


def _kept_buffers(length: int, dtype: torch.dtype) -> Tensor:
    """(2, length) that all chunks and all calls of a thread share: fresh pages would cost as much as reading a map."""
    size = 2 * length * dtype.itemsize
    kept = getattr(_scratch, "bytes", None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):  # or it could not be written to later, outside of that mode
            kept = _scratch.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype).view(2, length)
