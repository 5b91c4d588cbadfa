"""Where the cells of an attention map lie in the full-resolution image.

Along one axis, with H pixels in the image, h in the view, and cells that begin at view pixel o and are s view pixels
apart,

    centre_i = (o + (i + ½)·s)·H/h          top_i = round(centre_i − p/2)

rounded half to even. All of it is rational, so it is computed in integers: the same on every device, and a half is a
half. (o, s) of both axes is a `Placement`, which `ats.measure_placement` finds for any network. One number rf, the view
pixels that an unpadded network loses, stands for o = rf/2 and s = (h − rf)/g, with g cells.
"""

import functools
import numbers
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ats_kernels.checks import check_count, check_pair
from ats_kernels.patches.cells import CellMap, cell_offsets_ref


@dataclass(frozen=True, init=False, repr=False)
class Placement:
    """Where a network's cells lie in its view: cell i is centred on view pixel origin + (i + ½)·step of each axis.

    Pixel p covers [p, p + 1), so that cells which divide the view evenly have origin 0, and padded ones whose first
    cell is centred on the first pixel (most strided backbones) have origin (1 − step)/2, which is negative.

    Args:
        origin: view pixels at which the first cell begins, its centre less half a step: one number, or (y, x).
        step: view pixels from one cell to the next, a network's stride (timm's `reduction`): one number, or (y, x).
        view_size: (h, w) where the placement holds for views of this size only, as it does for networks that pad by
            the view's size (TensorFlow's 'same').

    Numbers are int, float, `Fraction` or text such as "-7/2", and are kept exactly.

    Raises:
        TypeError, ValueError: what is no finite number, and steps that are not positive.
    """

    origin: tuple[Fraction, Fraction]
    step: tuple[Fraction, Fraction]
    view_size: tuple[int, int] | None

    def __init__(self, origin: Any, step: Any, view_size: tuple[int, int] | None = None) -> None:
        values = {"origin": _fractions("origin", origin), "step": _fractions("step", step)}
        if min(values["step"]) <= 0:
            raise ValueError(f"step must be positive view pixels, got {step!r}")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "view_size", None if view_size is None else check_pair("view_size", view_size))

    @classmethod
    def padded(cls, stride: Any) -> "Placement":
        """Where cells lie whose first is centred on the first pixel: odd kernels k padded by (k − 1)/2 and any strides.

        So are the feature maps of ResNet, MobileNet and EfficientNet, whose strides timm lists:
        ``[Placement.padded(stage["reduction"]) for stage in model.feature_info]``. Maps of patches (ViT, ConvNeXt,
        Swin) divide the view: ``Placement(0, stride)``.
        """
        return cls([(1 - step) / 2 for step in _fractions("stride", stride)], stride)

    def __repr__(self) -> str:
        shown = []
        for name, (y, x) in (("origin", self.origin), ("step", self.step)):
            shown.append(f"{name}={_short(y)}" if y == x else f"{name}=({_short(y)}, {_short(x)})")
        if self.view_size is not None:
            shown.append(f"view_size={self.view_size}")
        return f"Placement({', '.join(shown)})"


def _fractions(name: str, value: Any) -> tuple[Fraction, Fraction]:
    try:
        values = (value, value) if isinstance(value, str | numbers.Real) else tuple(value)
        if len(values) == 2 and not any(isinstance(one, bool) for one in values):
            y, x = (_fraction(one) for one in values)
            return y, x
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        pass
    raise TypeError(f"{name} must be a finite number of view pixels, or two, (y, x), got {value!r}")


def _fraction(value: Any) -> Fraction:
    if isinstance(value, str | Fraction):
        return Fraction(value)
    return Fraction(int(value) if isinstance(value, numbers.Integral) else float(value))  # numpy's are no Fractions'


def _short(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"'{value}'"


class Affine(NamedTuple):
    """The first pixel of cell i's patch along an axis: (a·i + b)/d, rounded half to even."""

    a: int
    b: int
    d: int


@dataclass(frozen=True)
class Grid:
    """The cells of an attention map, and how they lie in an image.

    Attributes:
        cells: (gh, gw).
        image: pixels (H, W) of the full-resolution image.
        view: pixels (h, w) of the view that the attention network saw.
        origin: view pixels (y, x) at which the first cell begins: its centre less half a step.
        step: view pixels (y, x) from one cell to the next; None: what the cells divide the view into, less the origin
            at both ends.
    """

    cells: tuple[int, int]
    image: tuple[int, int]
    view: tuple[int, int]
    origin: tuple[Fraction, Fraction] = (Fraction(0), Fraction(0))
    step: tuple[Fraction, Fraction] | None = None

    def affine(self, patch_size: tuple[int, int]) -> tuple[Affine, Affine]:
        """What turns the rows and the columns of cells into the first pixels of their patches (ph, pw)."""
        return self._along(0, patch_size[0]), self._along(1, patch_size[1])

    def _along(self, axis: int, patch: int) -> Affine:
        cells, image, view = self.cells[axis], self.image[axis], self.view[axis]
        on, od = self.origin[axis].numerator, self.origin[axis].denominator
        if self.step is None:
            covered = view * od - 2 * on  # view pixels that the cells cover, times od
            a, d = 2 * covered * image, 2 * od * view * cells
            b = covered * image + (2 * on * image - patch * od * view) * cells
        else:
            sn, sd = self.step[axis].numerator, self.step[axis].denominator
            a, d = 2 * sn * od * image, 2 * od * sd * view
            b = sn * od * image + 2 * on * sd * image - patch * od * sd * view
        return Affine(a, b, d)

    def offsets(self, indices: Tensor, patch_size: tuple[int, int]) -> Tensor:
        """The top-left pixels (…, 2) int64 (y, x) of the patches centred on flat cells (…) int64."""
        return cell_offsets_ref(indices, CellMap(self.cells, *self.affine(patch_size)))


def cell_offsets(
    indices: Tensor,
    grid_size: tuple[int, int],
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    view_size: tuple[int, int] | None = None,
    receptive_field: int | Placement = 0,
) -> Tensor:
    """Top-left pixels of the patches centred on cells.

    Args:
        indices: (…) int64, flat cells of a row-major grid.
        grid_size: cells (gh, gw).
        image_size: pixels (H, W).
        patch_size: pixels (ph, pw).
        view_size: pixels (h, w) of the view; needed only with a receptive_field.
        receptive_field: view pixels that the attention network loses along an axis, see `ats.receptive_field`, or a
            `Placement`, see `ats.measure_placement`.

    Returns:
        (…, 2) int64 pixels (y, x). Patches near the border start or end outside the image.

    Raises:
        ValueError: a placement whose cells leave the view, or that was made for views of another size.
    """
    grid = make_grid(grid_size, image_size, view_size, receptive_field)
    return grid.offsets(indices, check_pair("patch_size", patch_size))


def make_grid(
    cells: tuple[int, int],
    image_size: tuple[int, int],
    view_size: tuple[int, int] | None,
    receptive_field: int | Placement,
) -> Grid:
    """The grid of (gh, gw) cells that a network with this receptive field gives for a view of an image."""
    cells, image_size = check_pair("grid_size", cells), check_pair("image_size", image_size)
    view_size = None if view_size is None else check_pair("view_size", view_size)  # NumPy's integers would overflow
    if isinstance(receptive_field, Placement):
        if view_size is None:
            raise ValueError(f"{receptive_field} is in pixels of the view: pass view_size=(h, w) as well")
        check_placement(receptive_field, cells, view_size)
        return Grid(cells, image_size, view_size, receptive_field.origin, receptive_field.step)
    origin = Fraction(check_count("receptive_field", receptive_field, least=0), 2)
    return Grid(cells, image_size, view_size or image_size, (origin, origin))  # without a loss the view cancels out


def cell_map(
    cells: tuple[int, int],
    image_size: tuple[int, int],
    view_size: tuple[int, int] | None,
    receptive_field: int | Placement,
    patch_size: tuple[int, int],
) -> CellMap:
    """What turns (gh, gw) cells into the first pixels of their patches (ph, pw). Kept: it is the same at every step."""
    if torch.compiler.is_compiling():
        return _map_cells(cells, image_size, view_size, receptive_field, patch_size)
    cells, image_size = check_pair("grid_size", cells), check_pair("image_size", image_size)
    view_size = None if view_size is None else check_pair("view_size", view_size)
    if not isinstance(receptive_field, Placement):
        receptive_field = check_count("receptive_field", receptive_field, least=0)
    return _kept_map(cells, image_size, view_size, receptive_field, patch_size)


def _map_cells(
    cells: tuple[int, int],
    image_size: tuple[int, int],
    view_size: tuple[int, int] | None,
    receptive_field: int | Placement,
    patch_size: tuple[int, int],
) -> CellMap:
    grid = make_grid(cells, image_size, view_size, receptive_field)
    return CellMap(grid.cells, *grid.affine(patch_size))


_kept_map = functools.lru_cache(_map_cells)


def check_placement(placement: Placement, cells: tuple[int, int], view_size: tuple[int, int]) -> None:
    """Raise where a placement cannot be that of (gh, gw) cells on a view (h, w)."""
    if placement.view_size is not None and placement.view_size != tuple(view_size):
        raise ValueError(
            f"{placement} was measured for views of {placement.view_size} but the view is {tuple(view_size)}, for "
            "which the network pads differently; measure anew with ats.measure_placement(network, view_size=…)"
        )
    for axis in (0, 1):
        origin, step, view = placement.origin[axis], placement.step[axis], view_size[axis]
        # In integers, for torch.compile's sizes: the last centre, and what the cells cover, times 2·od·sd.
        unit = 2 * origin.denominator * step.denominator
        first, stride = origin.numerator * 2 * step.denominator, step.numerator * 2 * origin.denominator
        last = first + stride * cells[axis] - stride // 2
        if last > unit * view + stride or 2 * abs(first) + stride * cells[axis] < unit * view // 2:
            raise ValueError(
                f"{cells[axis]} cells do not lie in {view} view pixels as {placement} says; is it another network's, "
                "another feature map's, or is the view's size another? Measure the attention network itself with "
                "ats.measure_placement(network)"
            )


def patch_positions(offsets: Tensor, patch_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Where the centres of patches lie in the image: 0 its top or left edge, 1 its bottom or right edge.

    Args:
        offsets: (…, 2) int64, top-left pixels (y, x), as `cell_offsets` gives them.
        patch_size: pixels (ph, pw).
        image_size: pixels (H, W).

    Returns:
        (…, 2) float32 in [0, 1], (y, x).

    Source: paper, end of section 3.4.
    """
    # Sizes as numbers: a tensor of them on a GPU would make the host wait, and cannot be captured in a graph.
    sizes = check_pair("patch_size", patch_size), check_pair("image_size", image_size)
    axes = zip(offsets.double().unbind(-1), *sizes, strict=True)
    return torch.stack([(first + patch / 2) / pixels for first, patch, pixels in axes], dim=-1).float()
