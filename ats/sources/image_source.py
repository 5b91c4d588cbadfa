"""What an image on disk is to the rest of the library: levels, and a way to read a box of one."""

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ats.sources.errors import ImageFileError

DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.float16, torch.float32, torch.float64)
"""Those of images that can be sampled from; others would have to be converted, which is the user's choice."""


@dataclass(frozen=True)
class Level:
    """One resolution of an image: its pixels."""

    height: int
    width: int


@runtime_checkable
class ImageSource(Protocol):
    """An image of which boxes can be read. Any class with these attributes is one; there is nothing to inherit.

    A source that goes to `DataLoader` workers must pickle, and must not share an open file over a fork.

    Attributes:
        name: for messages, e.g. the path.
        levels: the resolutions, the full one first, each smaller than the one before.
        channels: of every level.
        dtype: of what `read` returns, one of `DTYPES`.
        mpp: micrometres a pixel of level 0, (y, x); None where it is not known.
        fingerprint: text that changes when the pixels may have; None: views of this source cannot be cached.
    """

    @property
    def name(self) -> str: ...
    @property
    def levels(self) -> Sequence[Level]: ...
    @property
    def channels(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def mpp(self) -> tuple[float, float] | None: ...
    @property
    def fingerprint(self) -> str | None: ...

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """A box of a level, (C, height, width), in that level's own pixels and wholly inside it.

        Raises:
            ValueError: the box is not inside the level, or the file is damaged there.
        """
        ...


def check_box(
    source: ImageSource, level: int, top: int, left: int, height: int, width: int
) -> tuple[int, int, int, int, int]:
    """The numbers of a box as plain ints, NumPy's and tensors' too; raise unless it is inside its level.

    Slices of arrays are cut short in silence, and readers in C take no other integers, so this comes before both.
    """
    try:
        level, top, left, height, width = map(operator.index, (level, top, left, height, width))
    except TypeError as error:
        raise TypeError(f"level, top, left, height and width of a box must be integers: {error}") from error
    if not 0 <= level < len(source.levels):
        raise ValueError(
            f"{source.name} has {len(source.levels)} level(s), 0 to {len(source.levels) - 1}; there is no level {level}"
        )
    size = source.levels[level]
    if height < 1 or width < 1 or top < 0 or left < 0 or top + height > size.height or left + width > size.width:
        raise ValueError(
            f"the box of {height}×{width} pixels at ({top}, {left}) is not inside level {level} of {source.name}, "
            f"which is {size.height}×{size.width} (height × width); read the part that is inside "
            "(ats.sources.clip_box) and pad it"
        )
    return level, top, left, height, width


def check_mpp(mpp: float | Sequence[float] | None) -> tuple[float, float] | None:
    """Micrometres a pixel as (y, x), from one number or two.

    Raises:
        ValueError: no positive finite number.
    """
    if mpp is None:
        return None
    try:
        sides: Any = [mpp, mpp] if isinstance(mpp, (int, float)) or getattr(mpp, "ndim", 1) == 0 else list(mpp)
        pair = tuple(float(side) for side in sides)
    except (TypeError, ValueError):
        pair = ()
    if len(pair) != 2 or not all(math.isfinite(side) and side > 0 for side in pair):
        raise ValueError(f"mpp must be micrometres a pixel, a number above 0 or two of them, (y, x); got {mpp!r}")
    return pair[0], pair[1]


def file_fingerprint(path: Path) -> str:
    """What tells one state of a file from another: its place, size and time of change.

    Raises:
        FileNotFoundError: there is no such file.
    """
    state = path.stat()
    return f"{os.path.realpath(path)}:{state.st_size}:{state.st_mtime_ns}"


def check_unchanged(path: Path, fingerprint: str) -> None:
    """Raise where a file is not the one that was opened: half of what is read would be of another image."""
    try:
        now = file_fingerprint(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is gone since it was opened; put it back") from error
    if now != fingerprint:
        raise ImageFileError(
            f"{path} has changed since it was opened: it was {_state(fingerprint)} and is {_state(now)}; open it anew, "
            "and do not write to images while they are in use"
        )


def _state(fingerprint: str) -> str:
    _, size, time = fingerprint.rsplit(":", 2)
    return f"{size} bytes of time {int(time) / 1e9:.3f}"
