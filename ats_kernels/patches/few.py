"""A few small patches on the CPU, read one after the other: one index would cost more than what it reads.

In a compiled loop where one runs, else by NumPy's slices, which convert as they copy.
"""

import functools
import importlib
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ats_kernels.backend import loops_run
from ats_kernels.patches.affine import Affine

# Up to so many numbers in all, and patches: of more, PyTorch's index uses all cores, and starts only once.
_FEW = {"loops": (2**16, 2**12), "slices": (2**15, 16)}
_LOOPS_READ = (torch.uint8, torch.float32)  # as float32: each kind is compiled for by itself
_PLAIN = (Tensor, torch.nn.Parameter)  # others may be fake, or have ways of their own


def one_by_one(image: Tensor, out: Tensor) -> str:
    """What reads patches of an image to `out` one after the other, "loops" or "slices"; "" where they are many."""
    count = out.numel()
    if count > _FEW["loops"][0] or type(image) not in _PLAIN:
        return ""
    way = "loops" if out.dtype == torch.float32 and image.dtype in _LOOPS_READ and loops_run() else "slices"
    most, patches = _FEW[way]
    if count > most or out.shape[0] * out.shape[1] > patches or torch.bfloat16 in (image.dtype, out.dtype):
        return ""  # NumPy has no such numbers
    return way


def read_few(image: Tensor, offsets: Tensor, out: Tensor, affine: Affine, padding: str, way: str) -> None:
    """Write patches at offsets (B, N, 2) to `out`, as `extract_patches_cpu` does."""
    rows = out.movedim(2, -1) if affine.channels_last else out  # as they lie in memory
    crossing = _in_loops(image, offsets, rows, affine.channels_last) if way == "loops" else 1
    if way == "slices" or (crossing and padding == "edge"):
        crossing = _by_slices(image.detach().numpy(), offsets.tolist(), out.numpy(), padding)
    affine.apply(rows)
    if crossing and padding == "zeros" and not affine.keeps_zero:
        _blank(offsets.tolist(), out.numpy(), (image.shape[2], image.shape[3]))


@functools.cache
def _loops() -> ModuleType:
    return importlib.import_module("ats_kernels.patches.loops")


def _in_loops(image: Tensor, offsets: Tensor, rows: Tensor, channels_last: bool) -> int:
    """Read the pixels of `rows` (B, N, C, ph, pw), or (B, N, ph, pw, C) with the channels last; how many cross."""
    shape, strides = image.shape, image.stride()
    (batch, channels, height, width), (sb, sc, sh, sw) = shape, strides
    end = (batch - 1) * sb + (channels - 1) * sc + (height - 1) * sh + (width - 1) * sw
    memory = image.detach().as_strided((end + 1,), (1,)).numpy()  # one kind of array for all layouts
    size = rows.shape[2:4] if channels_last else rows.shape[3:5]
    places, out = offsets.contiguous().numpy(), rows.view(-1).numpy()
    return _loops().read(memory, *strides, *shape[1:], *size, places, channels_last, out)


def _by_slices(image: np.ndarray, offsets: list[list[list[int]]], out: np.ndarray, padding: str) -> int:
    """Read the pixels of `out` (B, N, C, ph, pw); how many patches cross the border."""
    height, width = image.shape[2:]
    ph, pw = out.shape[3:]
    last_y, last_x, crossing = height - ph, width - pw, 0
    for pixels, corners, patches in zip(image, offsets, out, strict=True):
        for (y, x), patch in zip(corners, patches, strict=True):
            if 0 <= y <= last_y and 0 <= x <= last_x:
                patch[...] = pixels[:, y : y + ph, x : x + pw]
                continue
            crossing += 1
            if padding == "edge":
                patch[...] = pixels[:, nearest(y, ph, height)[:, None], nearest(x, pw, width)]
                continue
            patch.fill(0)
            rows, columns = overlap(y, ph, height), overlap(x, pw, width)
            patch[:, rows, columns] = pixels[:, moved(rows, y), moved(columns, x)]
    return crossing


def _blank(offsets: list[list[list[int]]], out: np.ndarray, image_size: tuple[int, int]) -> None:
    """Make what of the patches lies outside their image 0."""
    (height, width), (ph, pw) = image_size, out.shape[3:]
    for corners, patches in zip(offsets, out, strict=True):
        for (y, x), patch in zip(corners, patches, strict=True):
            rows, columns = overlap(y, ph, height), overlap(x, pw, width)
            patch[:, : rows.start] = patch[:, rows.stop :] = 0
            patch[:, :, : columns.start] = patch[:, :, columns.stop :] = 0


def nearest(start: int, length: int, limit: int) -> np.ndarray:
    """Pixel numbers start, …, start + length − 1, those outside the image replaced by the nearest inside."""
    start = min(max(start, -length), limit)  # farther out reads the same, and does not overflow
    return np.arange(start, start + length).clip(0, limit - 1)


def overlap(start: int, length: int, limit: int) -> slice:
    """The part of a patch that lies inside the image, along one axis."""
    low = min(max(-start, 0), length)
    return slice(low, max(min(length, limit - start), low))


def moved(part: slice, by: int) -> slice:
    """The part's pixels in the image, none where it is empty."""
    return slice(0, 0) if part.start == part.stop else slice(part.start + by, part.stop + by)
