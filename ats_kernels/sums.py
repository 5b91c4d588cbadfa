"""Sums that are the same each time, on every device."""

import torch
from torch import Tensor


def running_sum(values: Tensor, dim: int = -1) -> Tensor:
    """values.cumsum(dim), from sums of ever longer stretches: deterministic mode refuses a GPU's cumsum of floats."""
    if is_free(values):
        return values.cumsum(dim)
    return _doubled(values.movedim(dim, -1)).movedim(-1, dim)


def is_free(values: Tensor) -> bool:
    """Whether deterministic mode has nothing against a running sum of them by PyTorch's own operator."""
    return values.device.type == "cpu"


def _doubled(values: Tensor) -> Tensor:
    """Running sums along the last dim: after each step a place holds the sum of the last 1, 2, 4, … up to it."""
    length = 1
    while length < values.shape[-1]:
        values = values + torch.nn.functional.pad(values[..., :-length], (length, 0))
        length *= 2
    return values
