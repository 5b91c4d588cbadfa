"""An image of any size that takes no memory: a block of random pixels, repeated, at every halving of the resolution."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ats
from ats.sources import Level
from ats.sources.image_source import check_box

BLOCK = 1024
"""Pixels a side, after which the image repeats itself."""


@dataclass(frozen=True)
class ProceduralImage:
    """A square grey image as an `ats.ImageSource`, whose every level is the mean of the full resolution.

    Args:
        side: pixels, a multiple of `BLOCK`.
    """

    side: int
    channels: int = 1
    dtype: torch.dtype = torch.uint8
    mpp: tuple[float, float] | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.side < BLOCK or self.side % BLOCK:
            raise ValueError(f"side must be a multiple of {BLOCK} pixels, got {self.side}")

    @property
    def name(self) -> str:
        """For messages."""
        return f"procedural image of {self.side:,} pixels a side"

    @property
    def levels(self) -> Sequence[Level]:
        """See `ats.ImageSource`: down to a pixel a block."""
        return _levels(self.side)

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """See `ats.ImageSource`."""
        level, top, left, height, width = check_box(self, level, top, left, height, width)
        block = _blocks()[level]
        rows, columns = (
            torch.arange(begin, begin + size, device="cpu") % len(block)
            for begin, size in ((top, height), (left, width))
        )
        return block[rows[:, None], columns][None]


@functools.cache
def _levels(side: int) -> tuple[Level, ...]:
    return tuple(Level(side >> level, side >> level) for level in range(BLOCK.bit_length()))


@functools.cache
def _blocks() -> tuple[Tensor, ...]:
    """The repeated block (s, s) of each level, each from the exact means."""
    pixels = torch.randint(256, (1, 1, BLOCK, BLOCK), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sides = [BLOCK >> level for level in range(BLOCK.bit_length())]
    means = [ats.area_downsample(pixels.double(), (side, side)) for side in sides]
    return tuple(mean[0, 0].round().to(torch.uint8) for mean in means)
