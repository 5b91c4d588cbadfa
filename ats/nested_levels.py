"""What the levels of nested attention sampling see: whole images, regions in them, and patches in the last."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats._modules import SealedModule, run_network
from ats.batches import GridSizes, Images, Maps, Size, Views, check_images, check_view, each_size, pad_logits, sizes_of
from ats.cells import check_logits, mask_logits
from ats.functional import check_inputs
from ats.grid import make_grid, patch_positions
from ats.ground import Ground, coarsen, fit_masks
from ats.regions import Reading, host_tensor, read_regions, read_views
from ats.zoom import Cells, Zoom, attend_each, check_scale, place_inner, place_outer, region_size
from ats_kernels.checks import check_choice, check_pair
from ats_kernels.patches.op import PADDINGS


class Look(NamedTuple):
    """What a level sees of M regions of each of B images.

    Attributes:
        logits: (B·M, gh, gw), or with a channel, −inf where nothing may be drawn.
        cells: where they lie.
        regions: (B, M, 2) int64, the regions' top-left pixels.
        ground: what may be drawn at all; None where anything may.
        fewer: whether a region may have fewer cells than are drawn.
        grids: of images whose own grids differ, each one's cells.
    """

    logits: Tensor
    cells: Cells
    regions: Tensor
    ground: Ground | None
    fewer: bool
    grids: GridSizes = None


class NestedLevels(SealedModule):
    """The networks of `ats.nn.NestedAttentionSampling`, whose arguments it takes, and what they are shown."""

    def __init__(
        self,
        levels: Sequence[Zoom],
        feature: nn.Module,
        patch_size: int | tuple[int, int],
        *,
        positions: bool,
        reading: Reading,
    ) -> None:
        super().__init__()
        _check_levels(levels)
        check_choice("padding", reading.padding, PADDINGS)
        self.levels = nn.ModuleList(levels)
        self.feature = feature
        self.patch_size = check_pair("patch_size", patch_size)
        self.positions = positions
        self.reading = reading

    @property
    def n_patches(self) -> int:
        """Patches an image: the product of the levels' draws."""
        return math.prod(self.zoom(depth).n for depth in range(len(self.levels)))

    def zoom(self, depth: int) -> Zoom:
        """A level, 0 the outermost."""
        level = self.levels[depth]
        assert isinstance(level, Zoom)
        return level

    def look(self, view: Views | None, image: Images, mask: Maps | None = None) -> Look:
        """What the first level sees of whole images; arguments as in `forward`."""
        check_images(image)
        zoom, batch = self.zoom(0), len(image)
        views = read_views(image, zoom.scale, self.reading) if view is None else view
        check_view(views, image, zoom.receptive_field)
        maps = (
            run_network("attention", zoom.attention, views) if isinstance(views, Tensor) else attend_each(zoom, views)
        )
        logits, own = pad_logits(maps)
        check_inputs(image, logits, own)
        view_sizes, sizes = each_size("view", sizes_of(views), batch), each_size("image", sizes_of(image), batch)
        grids = own or [(logits.shape[-2], logits.shape[-1])] * batch
        ground = None
        if len(self.levels) == 1 and isinstance(image, Tensor) and isinstance(views, Tensor):
            # As in a model of one level, of views of any scale.
            cells = Cells(make_grid(grids[0], sizes[0], view_sizes[0], zoom.receptive_field))
        else:
            check_scale(zoom, sizes, view_sizes, grids)
            cells = place_outer(zoom, grids, view_sizes)
        masks = None if mask is None else fit_masks(mask, logits, cells.grid.cells)
        regions = torch.zeros(batch, 1, 2, dtype=torch.int64, device=logits.device)
        if len(self.levels) > 1:
            ground = self._ground(cells, sizes, masks, logits.device)
        if ground is not None:
            corner = regions + host_tensor(cells.corner(self.zoom(1).scale), logits.device)
            logits = mask_logits(logits, ground.live(corner, cells.grid.cells, cells.side)[:, 0])
        elif masks is not None:
            logits = mask_logits(logits, coarsen(masks, cells.grid.cells))
        fewer = ground is not None or masks is not None or own is not None
        return Look(logits, cells, regions, ground, fewer, own)

    def _ground(self, cells: Cells, sizes: Sequence[Size], masks: Tensor | None, device: torch.device) -> Ground | None:
        """Where cells of any level may be drawn; None where they may be everywhere."""
        scale = self.zoom(1).scale
        side, corner = region_size(cells.side, scale), cells.corner(scale)
        ends = [corner[axis] + side[axis] * cells.grid.cells[axis] for axis in (0, 1)]
        inside = min(corner) >= 0 and all(ends[0] <= height and ends[1] <= width for height, width in sizes)
        if masks is None and inside:
            return None
        times = 1 if masks is None else masks.shape[-1] // cells.grid.cells[1]
        if side[0] % times or side[1] % times:
            raise ValueError(f"mask has {times}×{times} entries a cell of {side} pixels, which they do not divide")
        element = side[0] // times, side[1] // times
        return Ground(host_tensor(sizes, device), host_tensor(corner, device), masks, element)

    def look_into(
        self, depth: int, image: Images, regions: Tensor, size: tuple[int, int], ground: Ground | None
    ) -> Look:
        """What level `depth` sees of regions (B, M, 2) of a size (h, w): all of them go through its network at once."""
        zoom = self.zoom(depth)
        margin = zoom.context[0] * zoom.scale, zoom.context[1] * zoom.scale
        crop = size[0] + 2 * margin[0], size[1] + 2 * margin[1]
        origins = regions - host_tensor(margin, regions.device)
        views = read_regions(image, origins, crop, zoom.scale, self.reading)  # (B, M, C, h, w)
        logits = run_network("attention", zoom.attention, views.flatten(0, 1))
        check_logits(logits)
        cells, (row, column) = place_inner(zoom, (logits.shape[-2], logits.shape[-1]), size)
        rows, columns = cells.grid.cells
        logits = logits[..., row : row + rows, column : column + columns]
        if ground is not None:
            live = ground.live(regions, cells.grid.cells, cells.side).flatten(0, 1)
            live |= ~live.flatten(1).any(-1)[:, None, None]  # a region without any weighs nothing; it must not fail
            logits = mask_logits(logits, live)
        return Look(logits, cells, regions, ground, ground is not None)

    def boxes(self, depth: int, look: Look, indices: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The boxes of cells (R, N) of a level, regions of the next or patches: first pixels (R, N, 2), and size."""
        regions = look.regions.flatten(0, 1)  # (R, 2)
        if depth + 1 == len(self.levels):
            return look.cells.offsets(indices, regions, self.patch_size), self.patch_size
        scale = self.zoom(depth + 1).scale
        size = region_size(look.cells.side, scale)
        return look.cells.offsets(indices, regions, size, align=scale), size

    def read_features(self, image: Images, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """The patches (R, N, C, ph, pw) at offsets (R, N, 2) in regions of B images, and their features (R, N, …)."""
        per_image = offsets.reshape(len(image), -1, 2)
        patches = read_regions(image, per_image, self.patch_size, 1, self.reading)
        arguments = [patches.flatten(0, 1)]
        if self.positions:
            every = zip(per_image, each_size("image", sizes_of(image), len(image)), strict=True)
            positions = torch.cat([patch_positions(own, self.patch_size, size) for own, size in every])
            arguments.append(positions.to(patches.dtype))
        features = run_network("feature", self.feature, *arguments)
        shape = tuple(offsets.shape[:2])
        return arguments[0].unflatten(0, shape), features.unflatten(0, shape)


def _check_levels(levels: Sequence[Zoom]) -> None:
    """Raise unless levels are `Zoom`s whose scales fall, each a multiple of the next, and the first has no context."""
    if not isinstance(levels, Sequence) or not levels or not all(isinstance(level, Zoom) for level in levels):
        raise TypeError(f"levels must be a sequence of ats.nn.Zoom, the outermost first, got {levels!r:.200}")
    scales = [level.scale for level in levels]
    if any(outer <= inner or outer % inner for outer, inner in pairwise(scales)):
        raise ValueError(f"scales must fall from level to level, each a multiple of the next, got {scales}")
    if levels[0].context != (0, 0):
        raise ValueError(
            f"the first level sees whole images, which have nothing around them, got context={levels[0].context}; "
            "leave it out there"
        )
