"""An image on disk that is changed at random as it is read: colours, mirrors and turns, a box at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ats.experiments.augmentation import Change, apply_change
from ats.sources import ImageSource, Level


@dataclass(frozen=True)
class ChangedSource:
    """A source as `apply_change` would leave it, without being moved or enlarged."""

    source: ImageSource
    change: Change

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def levels(self) -> Sequence[Level]:
        if self.change.quarter_turns % 2:
            return tuple(Level(level.width, level.height) for level in self.source.levels)
        return self.source.levels

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def mpp(self) -> tuple[float, float] | None:
        mpp = self.source.mpp
        return (mpp[1], mpp[0]) if mpp is not None and self.change.quarter_turns % 2 else mpp

    @property
    def fingerprint(self) -> str | None:
        return None

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """The changed pixels of a box."""
        full = self.source.levels[level]
        rows, columns = full.height, full.width
        for turn in range(self.change.quarter_turns, 0, -1):  # back through one turn after the other
            before = columns if turn % 2 else rows  # columns of what was turned
            top, left, height, width = left, before - top - height, width, height
        if self.change.mirror:
            left = columns - left - width
        box = self.source.read(level, top, left, height, width)
        if box.dtype == torch.uint8:
            box = apply_change(box, Change(scale=self.change.scale, shift=self.change.shift))
        return turned(box, self.change)


@dataclass(frozen=True)
class InColours:
    """A grey source as three equal channels."""

    source: ImageSource
    channels: int = 3

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def levels(self) -> Sequence[Level]:
        return self.source.levels

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def mpp(self) -> tuple[float, float] | None:
        return self.source.mpp

    @property
    def fingerprint(self) -> str | None:
        own = self.source.fingerprint
        return None if own is None else f"{own} as {self.channels} channels"

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """The pixels of a box, (3, height, width)."""
        return self.source.read(level, top, left, height, width).expand(self.channels, -1, -1)


def turned(maps: Tensor, change: Change) -> Tensor:
    """Maps (…, h, w) mirrored and turned."""
    maps = maps.flip(-1) if change.mirror else maps
    return maps.rot90(change.quarter_turns, (-2, -1))


def changed_view(view: Tensor, change: Change) -> Tensor:
    """The view (C, h, w) of a changed image of bytes, in [0, 1], from that of the image.

    But for rounding, and for what is cut off at black and white: it is the view's pixels that are kept between them.
    """
    shifts = change.shift if view.shape[0] == 3 else change.shift[:1]
    if change.scale != 1 or any(shifts):
        view = (view * change.scale + view.new_tensor(shifts).view(-1, 1, 1)).clamp(0, 1)
    return turned(view, change)
