"""Arrays as sources: tensors, NumPy arrays and memory maps, zarr arrays, whatever has a shape, a dtype and slices."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ats.sources.image_source import DTYPES, Level, check_box, check_mpp, file_fingerprint
from ats_kernels.checks import reads_as_channels_last


@dataclass(frozen=True, eq=False)  # arrays compare element by element
class ArraySource:
    """Levels that are arrays, read by slicing.

    Attributes:
        arrays: one a level, (C, H, W), (H, W), or with channels last (H, W, C).
        channels_last: where the channels of arrays of three axes are.
        name, levels, channels, dtype, mpp, fingerprint: see `ats.sources.ImageSource`.
    """

    arrays: tuple[Any, ...]
    channels_last: bool
    name: str
    levels: Sequence[Level]
    channels: int
    dtype: torch.dtype
    mpp: tuple[float, float] | None
    fingerprint: str | None

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """See `ats.sources.ImageSource`."""
        level, top, left, height, width = check_box(self, level, top, left, height, width)
        array, rows, columns = self.arrays[level], slice(top, top + height), slice(left, left + width)
        if len(array.shape) == 2:
            box = _tensor(array[rows, columns])[None]
        elif self.channels_last:
            box = _tensor(array[rows, columns, :]).permute(2, 0, 1)
        else:
            box = _tensor(array[:, rows, columns])
        return box.contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps pickle as where they lie in their files, not as their pixels."""
        arrays = tuple(_map_place(array) or array for array in self.arrays)
        return {**self.__dict__, "arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = tuple(array.opened() if isinstance(array, _MapPlace) else array for array in state["arrays"])
        self.__dict__.update(state, arrays=arrays)


def from_arrays(
    levels: Sequence[Any],
    *,
    channels_last: bool = False,
    mpp: float | tuple[float, float] | None = None,
    name: str = "array",
    fingerprint: str | None = None,
) -> ArraySource:
    """A source of arrays: tensors, NumPy arrays, `np.memmap`, zarr arrays, anything with `shape`, `dtype` and slices.

    Args:
        levels: the full resolution first, then smaller ones if there are any; (C, H, W) or (H, W).
        channels_last: arrays of three axes are (H, W, C).
        mpp: micrometres a pixel of level 0, a number or (y, x).
        name: for messages.
        fingerprint: text that changes when the pixels do, without which views are not cached; that of memory maps is
            their file's size and time.

    Raises:
        TypeError: an array without shape and dtype, or of numbers that would have to be converted.
        ValueError: wrong axes; levels that differ in channels or dtype, or do not shrink.
    """
    arrays = tuple([levels] if hasattr(levels, "shape") else levels)
    if not arrays:
        raise ValueError("from_arrays needs at least one level, the full resolution")
    kinds = [_kind(array, index, channels_last) for index, array in enumerate(arrays)]
    sizes, channels, dtypes = zip(*kinds, strict=True)
    if len(set(channels)) > 1 or len(set(dtypes)) > 1:
        raise ValueError(f"levels must agree in channels and dtype, got {channels} and {dtypes}")
    for index, (larger, smaller) in enumerate(pairwise(sizes)):
        if smaller.height > larger.height or smaller.width > larger.width or smaller == larger:
            raise ValueError(
                f"level {index + 1} is {smaller.height}×{smaller.width} pixels, no smaller than level {index} of "
                f"{larger.height}×{larger.width}; give the full resolution first"
            )
    if fingerprint is None:
        places = [_map_place(array) for array in arrays]
        if all(places):
            fingerprint = ";".join(f"{file_fingerprint(place.path)}:{place}" for place in places if place)
    return ArraySource(arrays, channels_last, name, sizes, channels[0], dtypes[0], check_mpp(mpp), fingerprint)


def _kind(array: Any, index: int, channels_last: bool) -> tuple[Level, int, torch.dtype]:
    shape = tuple(getattr(array, "shape", ()))
    dtype = _torch_dtype(getattr(array, "dtype", None))
    if dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(
            f"level {index} is {type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}, expected one of "
            f"{names}; convert it to one that holds all of its values"
        )
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"level {index} has the shape {shape}, expected (C, H, W) or (H, W), none of them 0")
    if len(shape) == 2:
        return Level(*shape), 1, dtype
    channels, height, width = (shape[2], *shape[:2]) if channels_last else shape
    if _looks_swapped(channels, height, width, channels_last):
        other = "False" if channels_last else "True"
        raise ValueError(
            f"level {index} has the shape {shape}, which reads as {channels} channels of {height}×{width} pixels; pass "
            f"channels_last={other} if its channels are on the other side"
        )
    return Level(height, width), channels, dtype


def _looks_swapped(channels: int, height: int, width: int, channels_last: bool) -> bool:
    """Whether a long axis is taken for the channels where another is as short as channels are."""
    if channels_last:  # (H, W, C) that is (C, H, W)
        return reads_as_channels_last(channels, width, height)
    return reads_as_channels_last(channels, height, width)


def _torch_dtype(dtype: Any) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    try:
        return torch.from_numpy(np.empty(0, np.dtype(dtype).newbyteorder("="))).dtype if dtype is not None else None
    except TypeError:
        return None


def _tensor(box: Any) -> Tensor:
    """A copy: never a window into the user's own memory, nor into read-only memory, of which torch has none."""
    if isinstance(box, Tensor):
        return box.detach().clone(memory_format=torch.contiguous_format).cpu()
    array = np.array(box)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


@dataclass(frozen=True)
class _MapPlace:
    """Where the elements of a memory-mapped array lie in its file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def opened(self) -> np.ndarray[Any, np.dtype[Any]]:
        whole = np.memmap(self.path, np.uint8, "r")
        return np.ndarray(self.shape, self.dtype, whole, self.offset, self.strides)


def _map_place(array: Any) -> _MapPlace | None:
    """None for what is not a memory map of a file, or may differ from its file."""
    base, whole = array, None
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            whole = base
        base = base.base
    if not isinstance(array, np.ndarray) or whole is None or not isinstance(base, mmap.mmap) or whole.filename is None:
        return None
    if whole.mode == "c":
        return None  # changes are this process's own
    begin = whole.offset - whole.offset % mmap.ALLOCATIONGRANULARITY  # of the map in the file
    address = np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    offset = begin + array.__array_interface__["data"][0] - address
    return _MapPlace(Path(whole.filename), array.dtype.str, array.shape, array.strides, offset)
