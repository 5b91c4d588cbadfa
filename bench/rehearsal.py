"""A rehearsal of `make gpu-check` without a GPU: benchmarks take a GPU's way, on the CPU and with small sizes.

So mistakes in what only a GPU runs come out before there is one. What is measured meanwhile says nothing of any device.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

CACHE = 2**20  # bytes, that stand in for a GPU's L2
ROUNDS = 2

active = False


def on_gpu(device: torch.device) -> bool:
    """Whether a device is a GPU, or stands in for one."""
    return active or device.type == "cuda"


def small(size: int, most: int) -> int:
    """A size, in a rehearsal `most` at the most."""
    return min(size, most) if active else size


def few(things: Sequence[T], most: int = 2) -> Sequence[T]:
    """All of them, in a rehearsal the first."""
    return things[:most] if active else things


def pinned(images: Tensor, device: torch.device) -> Tensor:
    """Images in main memory that a device can read by itself; only a GPU's driver can pin them."""
    return images.pin_memory() if device.type == "cuda" else images


class Graph:
    """Stands in for a CUDA graph: what would be captured runs, and runs again when it is replayed."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
