"""Which pixels of the view the cells of an attention network depend on, found by letting NaN run through it."""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SIDES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # view pixels; a network may want multiples of 2ⁿ or 3·2ⁿ
_NARROW = (1, 2, 4, 8)  # across the axis that is looked at, where the network takes so little: it costs the least
_PIXELS_AT_ONCE = 2**17
ADVICE = "pass receptive_field as the view pixels lost along an axis, or as an ats.Placement"


class Extent(NamedTuple):
    """A cell, and the first and the last row of the view that it depends on."""

    cell: int
    first: int
    last: int


class Probe:
    """A copy of a network that says which pixels of the view its cells depend on.

    Rows of NaN in a view come out as NaN in the cells that depend on them. `axis` 0 looks along y, 1 along x.
    """

    def __init__(self, module: nn.Module, channels: int | None) -> None:
        try:
            self.network = copy.deepcopy(module).cpu().double().eval()
        except Exception as error:
            raise ValueError(f"cannot copy the attention network to measure it ({error!r}); {ADVICE}") from error
        self.failure: Exception | None = None
        first = [layer.in_channels for layer in module.modules() if isinstance(layer, nn.Conv2d)][:1]
        failure: Exception | None = None
        for self.channels in dict.fromkeys([channels] if channels else [*first, 1, 3, 4, 2]):
            if any(self.cells(side, side, 0) for side in SIDES):
                return
            failure = failure or self.failure
        raise ValueError(
            f"the attention network runs on no view from {SIDES[0]} to {SIDES[-1]} pixels ({failure!r}); say how "
            f"many channels a view has, or {ADVICE}"
        ) from failure

    def cells(self, along: int, across: int, axis: int) -> int:
        """Cells along the axis, 0 where the network does not take such a view."""
        try:
            grid = self._run(self._views(1, along, across, axis))
        except Exception as error:  # whatever a module raises for a view that is too small or has other channels
            self.failure = error
            return 0
        if grid.isnan().any():
            raise ValueError(f"the attention network gives NaN for a view in [0, 1]: look at its weights, or {ADVICE}")
        return grid.shape[1 + axis] if grid.numel() else 0

    def across(self, along: int, axis: int) -> int | None:
        """The fewest pixels that the network takes across views of so many along the axis."""
        return next((side for side in (*_NARROW, *SIDES) if side <= along and self.cells(along, side, axis)), None)

    def inner(self, along: int, across: int, axis: int) -> list[int]:
        """The cells away from the border: those that depend on the view, but not on its first or last row."""
        every, first, last = self._depends([[(0, along)], [(0, 1)], [(along - 1, along)]], along, across, axis)
        if not every.any():
            raise ValueError(f"the attention network's cells do not depend on the view; {ADVICE}")
        return (every & ~first & ~last).nonzero().flatten().tolist()

    def extents(self, cells: list[int], along: int, across: int, axis: int) -> list[Extent]:
        """What inner cells depend on: halving the rows, of which a view has NaN up to one, or from one on."""
        sides = along, across, axis
        first = self._halve(cells, *sides, from_row=False)
        last = self._halve(cells, *sides, from_row=True)
        return [Extent(*extent) for extent in zip(cells, first, last, strict=True)]

    def _halve(self, cells: list[int], along: int, across: int, axis: int, *, from_row: bool) -> list[int]:
        low, high = (torch.full((len(cells),), row, device="cpu") for row in (0, along - 1))
        while (open_ := low < high).any():
            rows = ((low + high + from_row) // 2)[open_].unique()
            spans = [[(int(row), along) if from_row else (0, int(row) + 1)] for row in rows]
            depends = self._depends(spans, along, across, axis)[:, cells]  # (rows, cells)
            column = rows.unsqueeze(1)
            if from_row:  # the last row is at or past each row that shows, and before each that does not
                low = torch.maximum(low, column.where(depends, 0).amax(0))
                high = torch.minimum(high, (column - 1).where(~depends, along).amin(0))
            else:
                high = torch.minimum(high, column.where(depends, along).amin(0))
                low = torch.maximum(low, (column + 1).where(~depends, 0).amax(0))
        return low.tolist()

    def sees(self, extent: Extent, along: int, across: int, axis: int) -> bool:
        """Whether a cell depends on the first and last row of an extent and on none outside of it."""
        cell, first, last = extent
        spans = [[(first, first + 1)], [(last, last + 1)], [(0, first), (last + 1, along)]]
        depends = self._depends(spans, along, across, axis)
        return cell < depends.shape[1] and depends[:, cell].tolist() == [True, True, False]

    def check_independence(self, extents: list[Extent], along: int, across: int, axis: int) -> None:
        """Raise where a cell changes with what it was not found to depend on."""
        views = self._views(1 + len(extents), along, across, axis)
        rows = views.movedim(2 + axis, 1)  # (B, along, …)
        others = torch.rand(rows[0].shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(1), device="cpu")
        for number, (_, first, last) in enumerate(extents, start=1):
            rows[number, :first], rows[number, last + 1 :] = others[:first], others[last + 1 :]
        grids = self._run(views).movedim(1 + axis, 1)
        for number, (cell, _, _) in enumerate(extents, start=1):
            if not torch.allclose(grids[number, cell], grids[0, cell], rtol=1e-9, atol=1e-9):
                raise ValueError(
                    "a cell of the attention network depends on more of the view than NaNs in it show: a layer "
                    f"replaces NaN by numbers; {ADVICE}"
                )

    def _depends(self, spans: list[list[tuple[int, int]]], along: int, across: int, axis: int) -> Tensor:
        """For each list of spans of rows, from one up to another, the cells along the axis that depend on it: bool."""
        seen = []
        at_once = max(1, _PIXELS_AT_ONCE // (along * across))
        for start in range(0, len(spans), at_once):
            some = spans[start : start + at_once]
            views = self._views(len(some), along, across, axis)
            rows = views.movedim(2 + axis, 1)
            for number, first, end in ((number, *span) for number, group in enumerate(some) for span in group):
                rows[number, first:end] = torch.nan
            seen.append(self._run(views).movedim(1 + axis, 1).flatten(2).isnan().any(-1))
        return torch.cat(seen)

    def _views(self, count: int, along: int, across: int, axis: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        view = torch.rand(1, self.channels, along, across, dtype=torch.float64, generator=generator, device="cpu")
        return view.repeat(count, 1, 1, 1) if axis == 0 else view.repeat(count, 1, 1, 1).mT.contiguous()

    @torch.no_grad()
    def _run(self, views: Tensor) -> Tensor:  # -> (B, gh, gw)
        with _Local():
            grids = self.network(views)
        if not isinstance(grids, Tensor) or grids.ndim not in (3, 4) or len(grids) != len(views):
            what = tuple(grids.shape) if isinstance(grids, Tensor) else type(grids).__name__
            raise TypeError(f"the attention network must give a tensor (B, gh, gw) or (B, 1, gh, gw), got {what}")
        return grids if grids.ndim == 3 else grids.sum(1)


class _Local(TorchFunctionMode):
    """Leave out what takes statistics of the whole view: those that are divided by or subtracted, and plain ones."""

    SKIPPED = frozenset({
        F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax,
        F.group_norm, torch.group_norm, F.instance_norm, F.layer_norm, torch.layer_norm,
    })  # fmt: skip

    POOLS = frozenset({F.adaptive_avg_pool2d, F.adaptive_max_pool2d})

    STATISTICS = frozenset({
        torch.mean, Tensor.mean, torch.sum, Tensor.sum, torch.amax, Tensor.amax, torch.amin, Tensor.amin,
        torch.var, Tensor.var, torch.std, Tensor.std,
    })  # fmt: skip

    NORMS = frozenset({torch.norm, Tensor.norm, torch.linalg.vector_norm})  # these say the order before the dimensions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.SKIPPED:
            return args[0] if args else kwargs["input"]
        if func is F.interpolate and kwargs.get("align_corners"):
            raise ValueError("upsampling with align_corners=True spreads the cells unevenly; use align_corners=False")
        result = func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].ndim > 2 and self._is_of_whole_maps(func, args, kwargs):
            maps = args[0]  # (B, …, h, w)
            stand_in = torch.linspace(0, 1, maps[0].numel(), dtype=maps.dtype, device="cpu").view_as(maps[0])
            return func(stand_in.expand_as(maps), *args[1:], **kwargs)  # of numbers that no view has a part in
        return result

    def _is_of_whole_maps(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function takes a statistic over both axes of maps (B, …, h, w), or (B, h, w, C)."""
        if func in self.POOLS:
            size = args[1] if len(args) > 1 else kwargs["output_size"]
            return size in (1, (1, 1), [1, 1])
        if func not in self.STATISTICS and func not in self.NORMS:
            return False
        dims = kwargs.get("dim", kwargs.get("axis"))
        if dims is None and len(args) > 1 + (func in self.NORMS):
            dims = args[1 + (func in self.NORMS)]
        ndim = args[0].ndim
        if dims is None or isinstance(dims, bool) or dims in ((), []):  # a bool is var's `unbiased`
            return True
        over = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
        return {ndim - 2, ndim - 1} <= over or (ndim == 4 and {1, 2} <= over)
