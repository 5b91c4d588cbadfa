"""Where in the images of a batch cells may be drawn, at every level of nested attention sampling alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ats.zoom import Sides
from ats_kernels.checks import check_tensor


def fit_masks(mask: Tensor | Sequence[Tensor], logits: Tensor, cells: tuple[int, int]) -> Tensor:
    """A mask as (B, k·gh, k·gw) or (1, k·gh, k·gw) bool, k×k elements a cell of the first level's grid (gh, gw).

    Raises:
        TypeError, ValueError: what is not bool, or of another shape.
    """
    batch = len(logits)
    if not isinstance(mask, Tensor):
        if len(mask) != batch:
            raise ValueError(f"there are {len(mask)} masks for {batch} images; give one an image")
        tall, wide = max(one.shape[-2] for one in mask), max(one.shape[-1] for one in mask)
        mask = torch.stack(
            [torch.nn.functional.pad(one, (0, wide - one.shape[-1], 0, tall - one.shape[-2])) for one in mask]
        )
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool, True where a cell may be drawn, got {mask.dtype}; compare it, e.g. mask > 0.5"
        )
    if mask.device != logits.device:
        raise ValueError(f"mask is on {mask.device} but logits are on {logits.device}; move the mask there")
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    elif mask.ndim == 2:
        mask = mask[None]
    times = mask.shape[-2] // cells[0]
    if mask.ndim != 3 or len(mask) not in (1, batch) or mask.shape[-2:] != (times * cells[0], times * cells[1]):
        raise ValueError(
            f"mask must be (gh, gw) or (B, gh, gw) with an entry a cell of the first level, {cells} of them, "
            f"or k×k entries a cell, got {tuple(mask.shape)}; ats.mask_cells makes it"
        )
    return mask


def coarsen(masks: Tensor, cells: tuple[int, int]) -> Tensor:
    """Masks (B, k·gh, k·gw) -> (B, gh, gw): whether any element of a cell is True."""
    times = masks.shape[-1] // cells[1]
    return masks.unflatten(2, (-1, times)).unflatten(1, (-1, times)).any(4).any(2)


class Ground:
    """Where in the images cells may be drawn: where there is an image, and where the mask is True.

    Args:
        sizes: (B, 2) int64 pixels (H, W) of the images, on the logits' device.
        origin: (2,) int64 pixel (y, x) at which the mask begins, there too.
        mask: (B, mh, mw) or (1, mh, mw) bool, or None.
        side: pixels (y, x) that an element of the mask covers.
    """

    def __init__(self, sizes: Tensor, origin: Tensor, mask: Tensor | None, side: tuple[int, int]) -> None:
        self.sizes, self.origin, self.side = sizes, origin, side
        self.before: Tensor | None = None  # how many elements above and left of each are True
        if mask is not None:
            inside = self.live(origin.expand(len(sizes), 1, 2), (mask.shape[1], mask.shape[2]), side)
            counts = (mask & inside[:, 0]).long()  # an element beyond an image would let cells beside it be drawn
            self.before = torch.nn.functional.pad(counts, (1, 0, 1, 0)).cumsum(-1).cumsum(-2)  # (B, mh + 1, mw + 1)

    def some(self, images: Tensor) -> "Ground":
        """That of some of the images (G,)."""
        ground = Ground(self.sizes[images], self.origin, None, self.side)
        ground.before = None if self.before is None else self.before[images]
        return ground

    def live(self, regions: Tensor, cells: tuple[int, int], side: Sides | tuple[int, int]) -> Tensor:
        """Which cells of regions (B, M, 2) hold a pixel that may be looked at, (B, M, gh, gw) bool."""
        spans = []
        for axis in (0, 1):
            numbers = torch.arange(cells[axis] + 1, device=regions.device)
            times, over = side[axis].numerator, side[axis].denominator
            begin, end = numbers[:-1] * times // over, -(-numbers[1:] * times // over)
            spans.append([regions[..., axis, None] + edge for edge in (begin, end)])  # (B, M, g) each
        (top, bottom), (left, right) = spans
        height, width = self.sizes[:, 0, None, None], self.sizes[:, 1, None, None]
        rows, columns = (top < height) & (bottom > 0), (left < width) & (right > 0)
        live = rows.unsqueeze(-1) & columns.unsqueeze(-2)  # (B, M, gh, gw)
        if self.before is not None:
            live &= self._any(self.before, top, bottom, left, right)
        return live

    def _any(self, before: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Whether the mask is True anywhere in boxes of rows [top, bottom) (B, M, gh) and columns (B, M, gw)."""
        edges = []
        for begin, end, axis in ((top, bottom, 0), (left, right, 1)):
            last, origin, side = before.shape[axis + 1] - 1, self.origin[axis], self.side[axis]
            first = (begin - origin).div(side, rounding_mode="floor")
            beyond = -(origin - end).div(side, rounding_mode="floor")
            edges.append((first.clamp(0, last), beyond.clamp(0, last)))
        which = torch.arange(len(before), device=before.device).view(-1, 1, 1, 1)

        def count(rows: Tensor, columns: Tensor) -> Tensor:
            return before[which, rows.unsqueeze(-1), columns.unsqueeze(-2)]

        (first, beyond), (begin, end) = edges
        return count(beyond, end) - count(first, end) - count(beyond, begin) + count(first, begin) > 0
