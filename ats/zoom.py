"""One level of nested attention sampling: its network, and where the cells of the regions that it looks at lie.

A region is a box of the image. Its view is cropped with some context, the attention network looks at the crop, and
those of its cells that lie in the margin are dropped: what is left partitions the region. All of it is rational, and
computed in whole numbers.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats._modules import SealedModule, run_network
from ats.batches import Size
from ats.cells import check_logits
from ats.grid import Grid, Placement, check_placement
from ats.probe import resolve_placement
from ats.regions import host_tensor
from ats_kernels.checks import check_count

Sides = tuple[Fraction, Fraction]


class Zoom(SealedModule):
    """A level of `ats.nn.NestedAttentionSampling`: an attention network, the scale that it looks at, and what it draws.

    Args:
        attention: network from views (M, C, h, w) to logits (M, gh, gw) or (M, 1, gh, gw); the first level's sees whole
            images, those of the others one region each.
        scale: pixels of the image along a side of a view's pixel, e.g. 128; a whole number, at least 1.
        n: cells drawn, from an image (first level) or a region. Of all levels but the last they are the next regions.
        context: view pixels around a region that the network sees as well, an int or (y, x): about half its receptive
            field. Not for the first level, which sees everything.
        receptive_field: where cells lie in what the network sees: "auto" to measure it (`ats.measure_placement`), an
            `ats.Placement`, or the view pixels that the network loses along an axis, with cells that divide the rest.

    `n` may be changed at any time.
    """

    def __init__(
        self,
        attention: nn.Module,
        scale: int,
        n: int,
        *,
        context: int | tuple[int, int] = 0,
        receptive_field: int | Placement | str = "auto",
    ) -> None:
        super().__init__()
        if isinstance(scale, float) and 0 < scale < 1:
            raise ValueError(
                f"scale is pixels of the image along a side of a view's pixel, got {scale}; pass {round(1 / scale)}"
            )
        placement = resolve_placement(attention, receptive_field, stacklevel=3)
        self.attention = attention
        self.scale = check_count("scale", scale)
        self.n = n
        both = context if isinstance(context, Sequence) else (context, context)
        if len(both) != 2:
            raise ValueError(f"context must be an int or a pair (y, x), got {context!r}")
        self.context = check_count("context", both[0], least=0), check_count("context", both[1], least=0)
        placed = isinstance(placement, Placement)
        self.receptive_field = placement if placed else check_count("receptive_field", placement, least=0)

    @property
    def n(self) -> int:
        """Cells drawn from an image or a region."""
        return self._n

    @n.setter
    def n(self, value: int) -> None:
        self._n = check_count("n", value)

    def extra_repr(self) -> str:
        """What is drawn, and where from."""
        shown = {"scale": self.scale, "n": self.n, "context": self.context, "receptive_field": self.receptive_field}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class Cells(NamedTuple):
    """Where the cells of a level lie.

    Attributes:
        grid: the cells, in what the network saw: the image, or a region's crop.
        margin: pixels of the image (y, x) between a crop's top left and its region's.
    """

    grid: Grid
    margin: tuple[int, int] = (0, 0)

    @property
    def side(self) -> Sides:
        """Pixels of the image that a cell covers, (y, x)."""
        return self._side(0), self._side(1)

    def _side(self, axis: int) -> Fraction:
        grid = self.grid
        step = grid.step[axis] if grid.step else (grid.view[axis] - 2 * grid.origin[axis]) / grid.cells[axis]
        return step * Fraction(grid.image[axis], grid.view[axis])

    def offsets(self, indices: Tensor, regions: Tensor, size: tuple[int, int], align: int = 1) -> Tensor:
        """The top-left pixels (R, N, 2) of boxes of a size on cells (R, N) of regions that begin at (R, 2).

        With `align` they are moved to the nearest multiples of it, which are the pixels of a view.
        """
        begin = regions - host_tensor(self.margin, regions.device)
        offsets = self.grid.offsets(indices, size) + begin.unsqueeze(1)
        return offsets if align == 1 else (offsets + align // 2).div(align, rounding_mode="floor") * align

    def corner(self, align: int) -> tuple[int, int]:
        """The pixel at which the first cell's box begins, as `offsets` has it for a region at pixel 0."""
        begin = [
            round(origin * Fraction(image, view)) - margin
            for origin, image, view, margin in zip(
                self.grid.origin, self.grid.image, self.grid.view, self.margin, strict=True
            )
        ]
        return (begin[0] + align // 2) // align * align, (begin[1] + align // 2) // align * align


def place_outer(zoom: Zoom, grids: Sequence[Size], views: Sequence[Size]) -> Cells:
    """The cells of the first level, of grids (gh, gw) on views (h, w): as one grid that holds them all."""
    rf = zoom.receptive_field
    steps = set()
    for grid, view in zip(grids, views, strict=True):
        if isinstance(rf, Placement):
            check_placement(rf, grid, view)
            steps.add(rf.step)
        else:
            steps.add((Fraction(view[0] - rf, grid[0]), Fraction(view[1] - rf, grid[1])))
    if len(steps) > 1:
        raise ValueError(
            f"images of different sizes get cells of different sizes, {_shown(steps)} view pixels: pass "
            "receptive_field='auto', or views whose sides are multiples of the attention network's stride"
        )
    (step,) = steps
    origin = rf.origin if isinstance(rf, Placement) else (Fraction(rf, 2), Fraction(rf, 2))
    cells = max(grid[0] for grid in grids), max(grid[1] for grid in grids)
    view = max(view[0] for view in views), max(view[1] for view in views)
    image = view[0] * zoom.scale, view[1] * zoom.scale
    return Cells(Grid(cells, image, view, origin, step))


def place_inner(zoom: Zoom, cells: tuple[int, int], region: tuple[int, int]) -> tuple[Cells, tuple[int, int]]:
    """The cells that partition regions (h, w), of those (gh, gw) of their crops, and which come first (row, column)."""
    rf = zoom.receptive_field
    seen = region[0] // zoom.scale, region[1] // zoom.scale
    crop = seen[0] + 2 * zoom.context[0], seen[1] + 2 * zoom.context[1]
    if isinstance(rf, Placement):
        check_placement(rf, cells, crop)
        origin, step = rf.origin, rf.step
    elif rf >= min(crop):
        raise ValueError(f"receptive_field={rf} leaves nothing of a region's view of {crop}")
    else:
        origin = Fraction(rf, 2), Fraction(rf, 2)
        step = Fraction(crop[0] - rf, cells[0]), Fraction(crop[1] - rf, cells[1])
    axes = [_keep(*axis) for axis in zip(cells, seen, zoom.context, origin, step, strict=True)]
    (first_row, rows), (first_column, columns) = axes
    first = origin[0] + first_row * step[0], origin[1] + first_column * step[1]
    grid = Grid((rows, columns), (crop[0] * zoom.scale, crop[1] * zoom.scale), crop, first, step)
    margin = zoom.context[0] * zoom.scale, zoom.context[1] * zoom.scale
    return Cells(grid, margin), (first_row, first_column)


def _keep(cells: int, seen: int, context: int, origin: Fraction, step: Fraction) -> tuple[int, int]:
    """Along an axis, the first of the cells that lie in the region, and how many do."""
    kept = seen / step
    if kept.denominator != 1:
        raise ValueError(
            f"a region's view of {seen} pixels is no multiple of its cells, {step} pixels each, which cannot partition "
            "it; choose a scale, or an attention network's stride, that divides it"
            + (
                ""
                if context == 0
                else ", and where receptive_field is a number, views and contexts that fit the stride"
            )
        )
    first = math.ceil((context - origin) / step - Fraction(1, 2))
    beside = origin + first * step - context  # view pixels between the region's border and its first cell's
    if first < 0 or first + kept > cells or abs(beside) > Fraction(1, 2):
        least = max(math.floor(origin + step * max(0, math.ceil((context - origin) / step))), 0)
        raise ValueError(
            f"the cells of a region's crop begin at view pixel {origin} and are {step} apart, so that with "
            f"context={context} none begins where the region does, or they do not reach over it; pass "
            f"context={least}"
        )
    return first, int(kept)


def region_size(side: Sides, scale: int) -> tuple[int, int]:
    """The pixels of a cell that the next level looks at as a region, at a scale."""
    for axis in side:
        if axis.denominator != 1:
            raise ValueError(
                f"cells of {_shown([side])} pixels are no regions, which have whole pixels: pass "
                "receptive_field='auto' to measure how far apart they are, or give images whose views the cells divide"
            )
        if axis.numerator % scale:
            raise ValueError(
                f"cells of {_shown([side])} pixels cannot be looked at with scale={scale}: their sides must be "
                f"multiples of it; choose a scale that divides {math.gcd(*(int(one) for one in side))}"
            )
    return int(side[0]), int(side[1])


def _shown(sides: "set[Sides] | list[Sides]") -> str:
    return ", ".join(f"{y}×{x}" for y, x in sorted(sides))


def check_scale(zoom: Zoom, sizes: Sequence[Size], views: Sequence[Size], grids: Sequence[Size]) -> None:
    """Raise where a view (h, w) is not that of its image (H, W) at the first level's scale.

    The last pixel may be there or not where it is not whole, and so may padding to a whole cell.
    """
    for size, view, grid in zip(sizes, views, grids, strict=True):
        whole = -(-size[0] // zoom.scale), -(-size[1] // zoom.scale)
        for axis in (0, 1):
            if not size[axis] // zoom.scale <= view[axis] < whole[axis] + max(1, view[axis] // grid[axis]):
                raise ValueError(
                    f"a view of {view} pixels is not that of an image of {size} at scale={zoom.scale}, which has "
                    f"{whole}; pass view=None to have it read, or make it with ats.area_downsample or ats.read_view"
                )


def attend_each(zoom: Zoom, views: Sequence[Tensor]) -> list[Tensor]:
    """Logits (gh, gw) of each view (C, h, w); those of one size go through the network together."""
    maps = list(views)  # each is put in its place below
    for shape in dict.fromkeys(view.shape for view in views):
        same = [number for number, view in enumerate(views) if view.shape == shape]
        logits = run_network("attention", zoom.attention, torch.stack([views[number] for number in same]))
        check_logits(logits)
        for number, own in zip(same, logits.view(len(same), *logits.shape[-2:]), strict=True):
            maps[number] = own
    return maps
