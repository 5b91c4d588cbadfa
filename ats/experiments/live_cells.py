"""Where attention may look in an image, as cells of a model's grid: inside a mask of the user's, on tissue, or both."""

from pathlib import Path

import torch
from torch import Tensor

from ats.batches import size_of
from ats.experiments.backbones import networks_of
from ats.experiments.build import view_size
from ats.experiments.config import ExperimentConfig
from ats.experiments.levels import plain_view
from ats.functional import area_downsample
from ats.grid import Placement
from ats.probe import measure_placement
from ats.sources import ImageSource, mask_cells, read_view, tissue_mask


def placement_of(config: ExperimentConfig) -> int | Placement:
    """Where the cells of a run's attention lie, without its weights. No random number is used up."""
    networks = networks_of(config)
    if config.model.method != "ats" or config.model.nested:
        return networks.lost
    with torch.random.fork_rng(devices=[]):
        return measure_placement(networks.attention())


def live_cells(
    config: ExperimentConfig,
    placement: int | Placement,
    image: Tensor | ImageSource,
    *,
    mask: Path | None = None,
    tissue: bool = False,
    view: Tensor | None = None,
) -> Tensor:
    """Which cells (gh, gw) of an image may be drawn, bool: those that mask and tissue both touch; all, without any.

    With levels, pixels (h, w) of the first one's view, as `levels.plain_view` has them, in place of cells.

    Args:
        config: of the run.
        placement: of its cells.
        image: (C, H, W), or a source.
        mask: an image file or GeoJSON polygons, as `ats.mask_cells` takes them.
        tissue: leave out what `ats.tissue_mask` takes for background.
        view: (3, h, w), what tissue is looked for in, where it is there already: as read, not normalised.

    Raises:
        ValueError: a model without attention on a view, a mask of another shape, or none of the cells is left.
        FileNotFoundError: there is no such mask.
    """
    if config.model.method not in ("ats", "uniform"):
        raise ValueError(f"masks are for attention sampling, not {config.model.method}")
    size, networks, levels = size_of(image), networks_of(config), config.model.nested
    if levels:
        grid = -(-size[0] // levels[0].scale), -(-size[1] // levels[0].scale)
        shown, where = grid, {}
        if tissue and view is None:
            view = plain_view(image, levels[0])
    else:
        found_size = view_size(config, size)
        assert found_size is not None  # of attention sampling
        shown = found_size
        grid = ((shown[0] - networks.lost) // networks.stride, (shown[1] - networks.lost) // networks.stride)
        where = {"view_size": shown, "receptive_field": placement}
    cells = torch.ones(grid, dtype=torch.bool, device="cpu")
    if mask is not None:
        cells &= mask_cells(mask, grid, size, **where)  # type: ignore[arg-type]
    if tissue:
        if view is None and isinstance(image, Tensor):
            view = area_downsample(image[None], shown)[0]
        found = tissue_mask(read_view(image, size=shown) if view is None else view)  # type: ignore[arg-type]
        if not bool(found.any()):
            raise ValueError(
                "no tissue was found: the view is of one colour; leave the image out, or look at all of it"
            )
        # In pixels of the view, whose sides are whole cells and so not quite in the image's proportion.
        cells &= mask_cells(found, grid, shown, **where)  # type: ignore[arg-type]
        if not bool(cells.any()):
            raise ValueError(f"there is no tissue inside of {mask}; there would be nothing to look at")
    return cells
