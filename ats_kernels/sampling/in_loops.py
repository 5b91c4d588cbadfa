"""The compiled loops of `sample`, called with tensors."""

import functools
import importlib
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ats_kernels.checks import compute_dtype
from ats_kernels.sampling.draws import Draw, Statistics, block_size


def sample_in_loops(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """The draw from logits (B, K), its values in the dtype that comes out; a seed of None for the most probable."""
    rows, cells = logits.shape
    values = logits.to(compute_dtype(logits.dtype)).contiguous().numpy()
    indices, log_attention = np.empty((rows, n), np.int64), np.empty((rows, n), values.dtype)
    logsumexp, entropy, statistics = np.empty(rows, values.dtype), np.empty(rows, values.dtype), np.empty((3, rows))
    key, by_time = (0, False) if seed is None else (int(seed), True)
    drawn = indices, log_attention, logsumexp, entropy
    _loops().draw(values, block_size(cells), key, by_time, replace, *drawn, statistics)
    return Draw(*map(torch.from_numpy, drawn)), Statistics(*torch.from_numpy(statistics).unbind())


@functools.cache
def _loops() -> ModuleType:
    return importlib.import_module("ats_kernels.sampling.loops")


def grad_in_loops(
    logits: Tensor, indices: Tensor, statistics: Statistics, arriving: tuple[Tensor | None, ...]
) -> Tensor:
    """The gradient (B, K) of float32 or float64 logits; None arriving means 0."""
    values = logits.contiguous().numpy()
    out, rows = np.empty(values.shape, values.dtype), values.shape[0]
    given = [value.contiguous().numpy() for value in (indices, *statistics)]
    grads = []
    for grad, shape in zip(arriving, (indices.shape, rows, rows), strict=True):
        grads.append(np.zeros(shape, values.dtype) if grad is None else grad.contiguous().numpy())
    _loops().grad(values, *given, *grads, out)
    return torch.from_numpy(out)
