"""Measure where an attention network's cells look, by letting the network say what each of them depends on."""

import copy
import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def receptive_field(module: nn.Module, *, channels: int | None = None) -> int:
    """The view pixels that an attention network loses along an axis, measured on the network itself.

    What a stride leaves over at the far edge is not part of it: give views of which (h − rf) is a multiple of the
    grid's step. rf is 0 for 'same' convolutions and Σ(k − 1) for unpadded ones; pooling k×k with stride k adds
    nothing.

    A copy of the network gets views with one row of NaN, then one column: the cells that come out as NaN depend on it.
    Away from the border the middle of what cell i depends on, (first + last + 1)/2, is c + i·J, on average where cells
    take turns (after upsampling). `cell_offsets` puts that centre at rf/2 + (i + ½)·J, so rf = 2c − J. What is found is
    checked against finite numbers: whatever changes outside of what a cell depends on must leave the cell as it is.

    Args:
        module: any network from views (B, C, h, w) to logits (B, gh, gw) or (B, 1, gh, gw) whose cells depend on a
            neighbourhood each: convolutions, pooling, upsampling, branches, modules of your own. It is copied and run
            in float64 on the CPU, in evaluation mode. Softmax, group, instance and layer normalisation, and means,
            sums and maxima over whole maps, are left out: they take statistics of the view, but move nothing.
        channels: C of the views; where None, what the network's first convolution takes, or what works of 1 to 4.

    Raises:
        ValueError: a network whose cells depend on nothing or on the whole view, that runs on no view up to 512
            pixels, whose axes differ, or of which no rf describes where its cells are, such as padding on one side
            more or padding that puts the first cell further out than half a step. Pass `receptive_field` as a number
            then.
    """
    return lost_and_step(module, channels=channels)[0]


_SIDES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # view pixels; a network may want multiples of 2ⁿ or 3·2ⁿ
_VIEWS_AT_ONCE = 64
_ADVICE = "pass receptive_field as a number: the view pixels lost along an axis"


def lost_and_step(module: nn.Module, *, channels: int | None = None) -> tuple[int, Fraction]:
    """`receptive_field` of a network, and the step of its grid, both in view pixels."""
    probe = _Probe(module, channels)
    (lost, step), across = (probe.measure(axis) for axis in (0, 1))
    if (lost, step) != across:
        raise ValueError(
            f"along y the network loses {lost} view pixels at a step of {step}, along x {across[0]} at {across[1]}, "
            "but one receptive_field stands for both: use the same kernels, strides and paddings along both axes"
        )
    return lost, step


class _Local(TorchFunctionMode):
    """Leave out what takes statistics of the whole view: those that are divided by or subtracted, and plain ones."""

    SKIPPED = frozenset({
        F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax,
        F.group_norm, torch.group_norm, F.instance_norm, F.layer_norm, torch.layer_norm,
    })  # fmt: skip

    STATISTICS = frozenset({
        torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.amax, Tensor.amax, torch.amin, Tensor.amin,
        torch.var, Tensor.var, torch.std, Tensor.std, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    })  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.SKIPPED:
            return args[0] if args else kwargs["input"]
        if func is F.interpolate and kwargs.get("align_corners"):
            raise ValueError("upsampling with align_corners=True spreads the cells unevenly; use align_corners=False")
        result = func(*args, **kwargs)
        if func in self.STATISTICS and args and args[0].ndim > 2:
            maps = args[0]  # (B, …, h, w)
            if 1 < maps.shape[-2] * maps.shape[-1] <= maps.numel() // max(1, result.numel()):
                stand_in = torch.linspace(0, 1, maps[0].numel(), dtype=maps.dtype, device="cpu").view_as(maps[0])
                return func(stand_in.expand_as(maps), *args[1:], **kwargs)  # of numbers that no view has a part in
        return result


class _Probe:
    """A copy of a network that says which pixels of the view its cells depend on."""

    def __init__(self, module: nn.Module, channels: int | None) -> None:
        try:
            self.network = copy.deepcopy(module).cpu().double().eval()
        except Exception as error:
            raise ValueError(f"cannot copy the attention network to measure it ({error!r}); {_ADVICE}") from error
        self.failure: Exception | None = None
        first = [layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)][:1]
        failure: Exception | None = None
        for self.channels in dict.fromkeys([channels] if channels else [*first, 1, 3, 4, 2]):
            if any(self._cells(side, side, 0) for side in _SIDES):
                return
            failure = failure or self.failure
        raise ValueError(
            f"the attention network runs on no view from {_SIDES[0]} to {_SIDES[-1]} pixels ({failure!r}); say how "
            f"many channels a view has, or {_ADVICE}"
        ) from failure

    def measure(self, axis: int) -> tuple[int, Fraction]:
        """Pixels lost and step along an axis: of the smallest view that shows them."""
        before = None
        for along in _SIDES:
            across = next((side for side in _SIDES if side <= along and self._cells(along, side, axis)), None)
            if across is None:
                continue
            extents = self._extents(along, across, axis)
            inner = [cell for cell in extents if cell[1] > 0 and cell[2] < along - 1]
            period = _period(inner)
            if period is None:  # too few cells away from the border
                continue
            step = Fraction(inner[period][1] - inner[0][1], period)
            centre = sum((Fraction(low + high + 1, 2) - cell * step for cell, low, high in inner[:period]), Fraction(0))
            lost = 2 * centre / period - step
            if period > 1 and before != (lost, step):  # upsampled: is it the same whatever the view's size?
                before = lost, step
                continue
            self._check_grid(lost, step, period, along, across, axis)
            self._check_independence(inner[:period], along, across, axis)
            return int(lost), step
        raise ValueError(
            f"in views up to {_SIDES[-1]} pixels no cells of the attention network were found that depend on a part of "
            "the view each and lie at equal steps: does it mix the whole view, or give a grid of fixed size? "
            f"Then {_ADVICE}"
        )

    def _extents(self, along: int, across: int, axis: int) -> list[tuple[int, int, int]]:
        """Each cell along the axis with the first and the last row of the view that it depends on."""
        seen = []
        for rows in torch.arange(along, device="cpu").split(_VIEWS_AT_ONCE):
            views = self._views(len(rows), along, across, axis)
            views.movedim(2 + axis, 1)[torch.arange(len(rows), device="cpu"), rows] = torch.nan
            seen.append(self._run(views).movedim(1 + axis, 1).flatten(2).isnan().any(-1))
        depends = torch.cat(seen)  # (along, cells)
        if not depends.any():
            raise ValueError(f"the attention network's cells do not depend on the view; {_ADVICE}")
        used = depends.any(0)
        first, last = depends.byte().argmax(0), along - 1 - depends.flip(0).byte().argmax(0)
        return [(cell, int(first[cell]), int(last[cell])) for cell in range(len(used)) if used[cell]]

    def _check_grid(self, lost: Fraction, step: Fraction, period: int, along: int, across: int, axis: int) -> None:
        """Raise where no rf says where the cells are."""
        if lost < 0:
            raise ValueError(
                f"the first cell's centre is {float((lost + step) / 2):g} view pixels from the edge, less than half "
                f"the grid's step of {step}; pad the strided layers less (a kernel as large as its stride needs no "
                f"padding), or {_ADVICE}"
            )
        reach = step * period  # what the view must grow by for the grid to grow
        larger = next((side for side in _SIDES if side >= 1.5 * along), 2 * along)
        grids = []
        for side in (*range(along, along + math.ceil(reach)), larger):
            if cells := self._cells(side, across, axis):
                grids.append((side, cells))
        rests = [side - lost - cells * step for side, cells in grids]
        if lost.denominator > 1 or 0 not in rests or not all(-reach < rest < reach for rest in rests):
            raise ValueError(
                f"the network's cells are {step} view pixels apart and the first is {float((lost + step) / 2):g} from "
                f"the edge, but the last is not as far from the other edge ({grids[0][1]} cells of {grids[0][0]} "
                f"pixels, {grids[-1][1]} of {grids[-1][0]}): one side is padded more, or the grid's size is fixed; "
                f"{_ADVICE}"
            )

    def _check_independence(self, cells: list[tuple[int, int, int]], along: int, across: int, axis: int) -> None:
        """Raise where a cell changes with what it was not found to depend on."""
        views = self._views(1 + len(cells), along, across, axis)
        rows = views.movedim(2 + axis, 1)  # (B, along, …)
        others = torch.rand(rows[0].shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(1), device="cpu")
        for number, (_, first, last) in enumerate(cells, start=1):
            rows[number, :first], rows[number, last + 1 :] = others[:first], others[last + 1 :]
        grids = self._run(views).movedim(1 + axis, 1)
        for number, (cell, _, _) in enumerate(cells, start=1):
            if not torch.allclose(grids[number, cell], grids[0, cell], rtol=1e-9, atol=1e-9):
                raise ValueError(
                    "a cell of the attention network depends on more of the view than NaNs in it show: a layer "
                    f"replaces NaN by numbers; {_ADVICE}"
                )

    def _views(self, count: int, along: int, across: int, axis: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        view = torch.rand(1, self.channels, along, across, dtype=torch.float64, generator=generator, device="cpu")
        return view.repeat(count, 1, 1, 1) if axis == 0 else view.repeat(count, 1, 1, 1).mT.contiguous()

    def _cells(self, along: int, across: int, axis: int) -> int:
        """Cells along the axis, 0 where the network does not take such a view."""
        try:
            grid = self._run(self._views(1, along, across, axis))
        except Exception as error:  # whatever a module raises for a view that is too small or has other channels
            self.failure = error
            return 0
        if grid.isnan().any():
            raise ValueError(f"the attention network gives NaN for a view in [0, 1]: look at its weights, or {_ADVICE}")
        return grid.shape[1 + axis] if grid.numel() else 0

    @torch.no_grad()
    def _run(self, views: Tensor) -> Tensor:  # -> (B, gh, gw)
        with _Local():
            grids = self.network(views)
        if not isinstance(grids, Tensor) or grids.ndim not in (3, 4) or len(grids) != len(views):
            what = tuple(grids.shape) if isinstance(grids, Tensor) else type(grids).__name__
            raise TypeError(f"the attention network must give a tensor (B, gh, gw) or (B, 1, gh, gw), got {what}")
        return grids if grids.ndim == 3 else grids.sum(1)


def _period(cells: list[tuple[int, int, int]]) -> int | None:
    """After how many cells what they depend on has moved on as a whole; None where too few cells show it."""
    for period in range(1, len(cells) // 3 + 1):
        pairs = zip(cells, cells[period:], strict=False)
        moves = {(later[1] - earlier[1], later[2] - earlier[2]) for earlier, later in pairs}
        if len(moves) == 1 and len(set(*moves)) == 1 and (0, 0) not in moves:
            return period
    return None
