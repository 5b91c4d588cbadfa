"""Measure where an attention network's cells look, by letting the network say what each of them depends on."""

import math
import warnings
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn

from ats.dependence import ADVICE, SIDES, Extent, Probe
from ats.grid import Placement
from ats_kernels.checks import check_pair


def measure_placement(
    module: nn.Module, *, channels: int | None = None, view_size: tuple[int, int] | None = None
) -> Placement:
    """Where an attention network's cells lie in its view, exactly, measured on the network itself.

    A copy of the network gets views with NaN in some rows, then in some columns: the cells that come out as NaN depend
    on them. Away from the border the middle of what cell i depends on, (first + last + 1)/2, is c + i·step, on average
    where cells take turns (after upsampling); the origin is c − step/2. What is found is checked on views of other
    sizes, and against finite numbers: whatever changes outside of what a cell depends on must leave the cell as it is.

    Args:
        module: any network from views (B, C, h, w) to logits (B, gh, gw) or (B, 1, gh, gw), or to a feature map
            (B, D, gh, gw), whose cells depend on a neighbourhood each: convolutions of any stride and padding,
            pooling, upsampling, branches, modules of your own. It is copied and run in float64 on the CPU, in
            evaluation mode. Softmax, group, instance and layer normalisation, and means, sums and maxima over whole
            maps, are left out: they take statistics of the view, but move nothing.
        channels: C of the views; where None, what the network's first convolution takes, or what works of 1 to 4.
        view_size: (h, w) of the views to come, for networks that pad by the view's size (TensorFlow's 'same').

    Raises:
        ValueError: a network whose cells depend on nothing or on the whole view, that runs on no view up to 512
            pixels, or whose cells move with the view's size and no view_size is given.
    """
    probe = Probe(module, channels)
    try:
        return _placement(_both_axes(probe, (None, None)))
    except _MovesWithViewError:
        if view_size is None:
            raise
    sizes = check_pair("view_size", view_size)
    measured = _placement(_both_axes(probe, sizes))
    return Placement(measured.origin, measured.step, sizes)


def receptive_field(module: nn.Module, *, channels: int | None = None) -> int:
    """The view pixels that an attention network loses along an axis, measured on the network itself.

    rf is 0 for 'same' convolutions and Σ(k − 1) for unpadded ones; pooling k×k with stride k adds nothing. One number
    describes networks whose cells divide what is left of the view, (h − rf), on both axes alike; what a stride leaves
    over at the far edge is not part of it: give views of which (h − rf) is a multiple of the grid's step.
    `ats.measure_placement`, which has the arguments, describes the others: strides with padding, as in ResNets, one
    side padded more, axes that differ.

    Raises:
        ValueError: a network that no rf describes, or that cannot be measured.
    """
    probe = Probe(module, channels)
    y, x = _both_axes(probe, (None, None))
    for axis, measured in enumerate((y, x)):
        _check_one_number(probe, axis, measured)
    if (y.origin, y.step) != (x.origin, x.step):
        raise ValueError(
            f"along y the network loses {2 * y.origin} view pixels at a step of {y.step}, along x {2 * x.origin} at "
            f"{x.step}, but one receptive_field stands for both: {_MEASURE}"
        )
    return int(2 * y.origin)


def shifting_layer(module: nn.Module) -> str | None:
    """The first convolution or pooling, as its name and text, whose cells do not divide what it sees evenly.

    Looks at the layers' numbers only, which costs nothing; a later layer may make up for it.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            options = [getattr(layer, what, 1) for what in ("kernel_size", "dilation", "stride", "padding")]
            kernels, dilations, strides, paddings = (_both(option) for option in options)
            for kernel, dilation, stride, padding in zip(kernels, dilations, strides, paddings, strict=True):
                seen = dilation * (kernel - 1) + 1
                lost = seen - stride - 2 * padding if isinstance(padding, int) else (seen - 1) % 2
                if padding == "valid":
                    lost = seen - stride
                if lost:
                    return f"{layer} ({name})" if name else str(layer)
    return None


def resolve_placement(
    attention: nn.Module, receptive_field: int | Placement | str | None, *, stacklevel: int
) -> int | Placement:
    """Where cells lie by the option of that name: "auto" is measured, None is 0, with a warning where that is wrong."""
    if isinstance(receptive_field, str):
        if receptive_field != "auto":
            raise ValueError(f"receptive_field must be an int, 'auto' or an ats.Placement, got {receptive_field!r}")
        return measure_placement(attention)
    if receptive_field is not None:
        return receptive_field
    if layer := shifting_layer(attention):
        warnings.warn(
            f"patches may lie beside the cells: {layer} in the attention network shifts or shrinks its grid, "
            "but receptive_field was not given, and is 0 by default; pass receptive_field='auto' to measure "
            "where cells lie, or 0 to keep this",
            stacklevel=stacklevel + 1,
        )
    return 0


def _both(option: Any) -> tuple[Any, Any]:
    return (option, option) if isinstance(option, int | str) else tuple(option)


_LONG = (*SIDES, 768, 1024, 1536, 2048)  # along the axis that is looked at: deep backbones see much of a view
_MODULUS = 192  # sizes that are equal modulo this are padded alike
_FEW = 4  # inner cells that show a step, where cells do not take turns
_MEASURE = (
    "use receptive_field=ats.measure_placement(network), as receptive_field='auto' of ats.nn.AttentionSampling does"
)


class _MovesWithViewError(ValueError):
    """A network whose cells lie elsewhere in views of another size."""


class _Measured(NamedTuple):
    """An axis: where the first cell begins, the step, after how many cells they take turns, and what shows it."""

    origin: Fraction
    step: Fraction
    period: int
    along: int
    across: int
    extents: list[Extent]


def _placement(axes: list[_Measured]) -> Placement:
    return Placement([axis.origin for axis in axes], [axis.step for axis in axes])


def _both_axes(probe: Probe, view: tuple[int | None, int | None]) -> list[_Measured]:
    """y and x: cells along x are asked first whether they see what those along y do, which takes few views."""
    y = _measure(probe, 0, view[0])
    if view[0] != view[1] or probe.across(y.along, 1) != y.across:
        return [y, _measure(probe, 1, view[1])]
    if not all(probe.sees(extent, y.along, y.across, 1) for extent in y.extents):
        return [y, _measure(probe, 1, view[1])]
    _check(probe, 1, y, fixed=view[1] is not None)
    return [y, y]


def _measure(probe: Probe, axis: int, view: int | None) -> _Measured:
    """An axis, in the smallest views that show it, or in those of the sizes which are padded as `view` pixels are."""
    before = None
    for along in _sizes(view):
        across = probe.across(along, axis)
        if across is None:
            continue
        inner = probe.inner(along, across, axis)
        middle = max(0, len(inner) - _FEW) // 2
        extents = probe.extents(inner[middle : middle + _FEW], along, across, axis)
        period = _period(extents)
        if period is None and len(inner) > _FEW:
            extents = probe.extents(inner, along, across, axis)
            period = _period(extents)
        if period is None:  # too few cells away from the border
            continue
        step = Fraction(extents[period].first - extents[0].first, period)
        middles = (Fraction(first + last + 1, 2) - cell * step for cell, first, last in extents[:period])
        origin = sum(middles, Fraction(0)) / period - step / 2
        if period > 1 and before != (origin, step):  # upsampled: is it the same whatever the view's size?
            before = origin, step
            continue
        measured = _Measured(origin, step, period, along, across, extents)
        _check(probe, axis, measured, fixed=view is not None)
        return measured
    raise ValueError(
        f"in views up to {_LONG[-1]} pixels no cells of the attention network were found that depend on a part of "
        "the view each and lie at equal steps: does it mix the whole view, or give a grid of fixed size? "
        f"Then {ADVICE}"
    )


def _sizes(view: int | None) -> list[int]:
    if view is None:
        return list(_LONG)
    rest = view % _MODULUS
    return [size for size in range(rest, _LONG[-1] + _MODULUS, _MODULUS) if size >= SIDES[0]]


def _check(probe: Probe, axis: int, measured: _Measured, *, fixed: bool) -> None:
    """Raise where cells lie elsewhere in larger views or those with a rest, or see more than NaN shows."""
    _, step, period, along, across, extents = measured
    extent = extents[0]
    reach = step * period  # what the view must grow by for the grid to grow
    larger, more = along + _MODULUS, [0]
    if not fixed:
        larger = next((side for side in _LONG if side > along), 2 * along)
        more = [2**power for power in range(math.ceil(reach).bit_length()) if 2**power < reach]
        more.append(math.ceil(reach) - 1)  # the most that is left over
    for side in (larger, *dict.fromkeys(along + rest for rest in more)):
        cells = probe.cells(side, across, axis)
        if cells == 0:  # not a size that the network takes
            continue
        turns = max(0, cells - 1 - extent.cell) // (2 * period) if side == larger else 0  # well into the larger view
        move = int(turns * reach)
        there = Extent(extent.cell + turns * period, extent.first + move, extent.last + move)
        if there.last >= side or not probe.sees(there, side, across, axis):
            here = probe.cells(along, across, axis)
            raise _MovesWithViewError(
                "where the network's cells lie depends on the view's size: it pads by it, as TensorFlow's 'same' "
                f"does, or the grid's size is fixed ({here} cells of {along} pixels, {cells} of {side}). Pad by fixed "
                "numbers; or give views of one size (h, w), and "
                f"receptive_field=ats.measure_placement(network, view_size=(h, w)); or {ADVICE}"
            )
    probe.check_independence(extents[:period], along, across, axis)


def _check_one_number(probe: Probe, axis: int, measured: _Measured) -> None:
    """Raise where no rf says where the cells are."""
    lost, step = 2 * measured.origin, measured.step
    first = float((lost + step) / 2)
    if lost < 0:
        raise ValueError(
            f"the first cell's centre is {first:g} view pixels from the edge, less than half the grid's step of "
            f"{step}, which no receptive_field of one number says; {_MEASURE}"
        )
    reach, along = step * measured.period, measured.along
    larger = next((side for side in _LONG if side >= 1.5 * along), 2 * along)
    sizes = (*range(along, along + math.ceil(reach)), larger)
    grids = [(side, cells) for side in sizes if (cells := probe.cells(side, measured.across, axis))]
    rests = [side - lost - cells * step for side, cells in grids]
    if lost.denominator > 1 or 0 not in rests or not all(-reach < rest < reach for rest in rests):
        raise ValueError(
            f"the network's cells are {step} view pixels apart and the first is {first:g} from the edge, but the last "
            f"is not as far from the other edge ({grids[0][1]} cells of {grids[0][0]} pixels, {grids[-1][1]} of "
            f"{grids[-1][0]}): one side is padded more; {_MEASURE}"
        )


def _period(cells: list[Extent]) -> int | None:
    """After how many cells what they depend on has moved on as a whole; None where too few cells show it."""
    for period in range(1, len(cells) // 3 + 1):
        pairs = zip(cells, cells[period:], strict=False)
        moves = {(later.first - earlier.first, later.last - earlier.last) for earlier, later in pairs}
        if len(moves) == 1 and len(set(*moves)) == 1 and (0, 0) not in moves:
            return period
    return None
