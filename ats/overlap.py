"""A warning where cells are so close together that the patches of a draw can show little more than one patch.

Attention that has found something is high on all cells around it, and draws are of these. A block of N cells that are
s pixels apart has patches, of p pixels, that together cover (1 + (√N − 1)·s/p)² patches' area.
"""

import math
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ats.batches import Images, Sizes, each_size, size_of
from ats.grid import Grid, make_grid
from ats.samples import CellSample

LEAST_DRAWS = 4
"""Fewer patches cannot show more than three patches' area, wherever they lie."""

CELLS_A_DRAW = 10
"""A patch may span as many cells for each draw. The paper's experiments have 3 to 4."""

_OURS = ("ats", "ats_kernels", "torch")
_TOLD = "_told_of_overlap"
_CLOSE = 4  # cells a patch's side that are advised


class OverlapWarning(UserWarning):
    """The patches that are drawn around one place show almost the same pixels."""


def overlap_message(grid: Grid, patch_size: tuple[int, int], n_patches: int) -> str | None:
    """What is wrong with so many patches (ph, pw) of a grid's cells and how to mend it; None: nothing is.

    They overlap too much where a patch spans more than `CELLS_A_DRAW` cells for each of `LEAST_DRAWS` or more draws.
    """
    apart = [float(along.a) / along.d for along in grid.affine(patch_size)]  # image pixels
    spanned = math.prod(max(1.0, patch / step) for patch, step in zip(patch_size, apart, strict=True))
    if n_patches < LEAST_DRAWS or spanned <= CELLS_A_DRAW * n_patches:
        return None
    block = math.sqrt(n_patches) - 1
    shown = math.prod(1 + block * step / patch for patch, step in zip(patch_size, apart, strict=True))
    wanted = "×".join(f"{patch / _CLOSE:.0f}" for patch in patch_size)
    smaller = "×".join(f"{_CLOSE * step:.0f}" for step in apart)
    return (
        f"a patch of {patch_size[0]}×{patch_size[1]} pixels spans {spanned:.0f} cells, which lie "
        f"{apart[0]:.3g}×{apart[1]:.3g} pixels apart: {n_patches} patches around one place show {shown:.1f} times what "
        f"one does. Take cells about {wanted} pixels apart (a smaller view, or more pooling in the attention network) "
        f"or patches of about {smaller} pixels; docs/choosing.md has more"
    )


def warn_of_overlap(module: nn.Module, sampler: Any, image: Images, cells: CellSample, view_size: Sizes | None) -> None:
    """Warn by `OverlapWarning` of a draw of a module in training, once, by the first image.

    Args:
        module: that warns.
        sampler: its `ats.nn.SamplePatches`, which has the options.
        image: as `ats.sample_patches` takes them.
        cells: that were drawn.
        view_size: pixels (h, w) of the views, for all or one an image.
    """
    if torch.compiler.is_compiling() or not module.training or getattr(module, _TOLD, False):
        return
    told_of_overlap(module)
    full = size_of(image if isinstance(image, Tensor) else image[0])
    own = cells.grid_size if cells.grid_sizes is None else cells.grid_sizes[0]
    view = None if view_size is None else each_size("view_size", view_size, len(cells.indices))[0]
    message = overlap_message(
        make_grid(own, full, view, sampler.receptive_field), sampler.patch_size, sampler.n_patches
    )
    if message is not None:
        warnings.warn(message, OverlapWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The stack level at which neither this library nor PyTorch is, and the user's own code, or a trainer, begins."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    return level


def told_of_overlap(module: nn.Module) -> None:
    """Have a module not warn: it has, or something else did."""
    setattr(module, _TOLD, True)
