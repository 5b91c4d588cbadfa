"""Which cells of an image are worth looking at: tissue by colour, a mask of one's own, or polygons.

A mask is True where attention may look. Where it is False the logits become −inf: `logits.masked_fill(~cells, -inf)`.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ats.grid import Grid, Placement, make_grid
from ats.paths import user_path
from ats.sources.decoding import ImageFileError, decode
from ats.sources.image_source import ImageSource
from ats_kernels.checks import check_number, check_pair

Mask = Tensor | np.ndarray[Any, np.dtype[Any]] | str | os.PathLike[str]

_GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")
_SUBSAMPLES = 8  # a side of a cell, at whose points polygons are looked up


def tissue_mask(view: Tensor) -> Tensor:
    """Which pixels of a view show tissue: those more saturated than Otsu's threshold.

    Args:
        view: (3, h, w), floating point in [0, 1] as `read_view` gives it, or uint8.

    Returns:
        (h, w) bool. Nothing of a view of one colour is tissue.

    Raises:
        ValueError: another number of channels, or values outside [0, 1].

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979; on the saturation of HSV, as slide
    pipelines do.
    """
    if not isinstance(view, Tensor) or view.ndim != 3 or view.shape[0] != 3:
        shape = tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__
        raise ValueError(f"view must be (3, h, w), red, green, blue, got {shape}; saturation is of colours")
    colours = view.float() / 255 if view.dtype == torch.uint8 else view.float()
    if not bool(((colours >= 0) & (colours <= 1)).all()):
        low, high = float(colours.min()), float(colours.max())
        raise ValueError(
            f"view must hold values from 0 to 1, before mean and std are taken off, got {low:.4g} to {high:.4g}"
        )
    brightest = colours.amax(0)
    saturation = torch.where(brightest > 0, (brightest - colours.amin(0)) / brightest.clamp(min=1e-12), 0)
    bins = (saturation * 255).round().long()  # (h, w) in 0 to 255
    return bins > _otsu(bins.flatten().bincount(minlength=256))


def _otsu(histogram: Tensor) -> int:
    """The bin up to which the lower class reaches, so that the variance between the classes is largest."""
    counts = histogram.double()
    values = torch.arange(len(counts), dtype=torch.float64, device=counts.device)
    below, above = counts.cumsum(0), counts.sum() - counts.cumsum(0)
    total_below = (counts * values).cumsum(0)
    total_above = (counts * values).sum() - total_below
    apart = total_below / below.clamp(min=1) - total_above / above.clamp(min=1)
    variance = torch.where((below > 0) & (above > 0), below * above * apart.square(), 0)
    if not bool(variance.max() > 0):
        return len(counts) - 1
    best = (variance >= variance.max() * (1 - 1e-12)).nonzero().flatten()  # equal between the classes: the middle
    return int(best[0] + best[-1]) // 2


def mask_cells(
    mask: Mask,
    grid_size: tuple[int, int],
    image: ImageSource | tuple[int, int],
    *,
    view_size: tuple[int, int] | None = None,
    receptive_field: int | Placement = 0,
    least: float = 0.0,
) -> Tensor:
    """Which cells of an attention map a mask leaves alive.

    Args:
        mask: (h, w), a tensor or array of any resolution that covers the whole image, True or above 0 where attention
            may look; or a path: an image file, or polygons as GeoJSON (also gzip-compressed) in level-0 pixels (x, y).
        grid_size: cells (gh, gw).
        image: the source, or pixels (H, W) of its full resolution.
        view_size: pixels (h, w) of the view; needed only with a receptive_field.
        receptive_field: view pixels that the attention network loses along an axis, see `ats.receptive_field`, or a
            `Placement`, see `ats.measure_placement`.
        least: share of a cell's area that must be covered by more than this; 0: any of it.

    Returns:
        (gh, gw) bool; False cells are to be masked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a mask of another shape than the image, a file that is no mask, a mask that leaves no cell.
    """
    cells = check_pair("grid_size", grid_size)
    levels = getattr(image, "levels", None)
    size = check_pair("image", image) if levels is None else (levels[0].height, levels[0].width)
    if not 0 <= (least := check_number("least", least)) < 1:
        raise ValueError(f"least must be a share of a cell from 0 to below 1, got {least}")
    if receptive_field and view_size is None:
        raise ValueError(f"receptive_field={receptive_field} is in pixels of the view: pass view_size=(h, w) as well")
    view = None if view_size is None else check_pair("view_size", view_size)
    grid = make_grid(cells, size, view, receptive_field)
    edges = [_edges(grid, axis) for axis in (0, 1)]
    name = str(mask) if isinstance(mask, (str, os.PathLike)) else "the mask"
    if isinstance(mask, (str, os.PathLike)) and str(mask).lower().endswith(_GEOJSON):
        points = [_points(axis) for axis in edges]
        inside = _inside(_polygons(_found(mask)), points[0], points[1])
        covered = (
            torch.from_numpy(inside).float().unflatten(1, (cells[1], -1)).unflatten(0, (cells[0], -1)).mean((1, 3))
        )
    else:
        covered = _coverage(_read_mask(mask), size, edges, name)
    alive = covered > least + 1e-6 if least else covered > 0
    if not bool(alive.any()):
        raise ValueError(f"{name} leaves none of {cells[0]}×{cells[1]} cells; there would be nothing to look at")
    return alive


def _edges(grid: Grid, axis: int) -> list[Fraction]:
    """Image pixels at which cells begin and end along an axis, (cells + 1): see `ats.grid`."""
    cells, view, origin = grid.cells[axis], grid.view[axis], grid.origin[axis]
    step = (view - 2 * origin) / cells if grid.step is None else grid.step[axis]
    if step <= 0:
        raise ValueError(f"the receptive_field leaves nothing of a view of {grid.view} pixels")
    return [(origin + i * step) * Fraction(grid.image[axis], view) for i in range(cells + 1)]


def _found(mask: str | os.PathLike[str]) -> Path:
    path = user_path(mask)
    if not path.exists():
        raise FileNotFoundError(f"there is no mask {path}; name an image file, or GeoJSON polygons, that is there")
    return path


def _read_mask(mask: Mask) -> np.ndarray[Any, np.dtype[Any]]:
    if isinstance(mask, (str, os.PathLike)):
        path = _found(mask)
        return np.asarray((decode(path) > 0).any(-1))
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"a mask must be (h, w), got {array.shape}")
    return np.asarray(array > 0)


def _coverage(
    mask: np.ndarray[Any, np.dtype[Any]], size: tuple[int, int], edges: list[list[Fraction]], name: str
) -> Tensor:
    """The share of each cell that the mask covers, exactly: (gh, gw)."""
    height, width = mask.shape
    if abs(height * size[1] - width * size[0]) > max(size):  # a pixel of the mask more or less, either way
        raise ValueError(
            f"{name} is {height}×{width}, whose shape is not that of the image, {size[0]}×{size[1]} (height × width); "
            "a mask covers the whole image, at any resolution"
        )
    rows = _overlaps(edges[0], size[0], height)  # (gh, h)
    columns = _overlaps(edges[1], size[1], width)  # (gw, w)
    return torch.from_numpy(rows @ mask.astype(np.float64) @ columns.T)


def _overlaps(edges: list[Fraction], image: int, pixels: int) -> np.ndarray[Any, np.dtype[Any]]:
    """How much of each cell along an axis each of a mask's pixels covers, as a share of what is in the image."""
    at = np.array([float(edge * pixels / image) for edge in edges])
    index = np.arange(pixels)
    shared = np.minimum(at[1:, None], index + 1) - np.maximum(at[:-1, None], index)
    shared[shared < 1e-9] = 0
    return shared / np.maximum(shared.sum(1, keepdims=True), 1e-9)


def _points(edges: list[Fraction]) -> np.ndarray[Any, np.dtype[Any]]:
    """Places within each cell at which polygons are looked up, along an axis."""
    begin, step = float(edges[0]), float(edges[1] - edges[0]) / _SUBSAMPLES
    return begin + (np.arange((len(edges) - 1) * _SUBSAMPLES) + 0.5) * step


Rings = list[np.ndarray[Any, np.dtype[Any]]]


def _polygons(path: Path) -> list[Rings]:
    """The polygons of a GeoJSON file, each an outer ring and its holes, (n, 2) of x, y."""
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        polygons = [[np.asarray(ring, np.float64)[:, :2] for ring in rings] for rings in _geometries(content) if rings]
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        EOFError,
        OSError,
        zlib.error,
        RecursionError,
    ) as error:
        raise ImageFileError(f"{path} is damaged or no GeoJSON of polygons ({error}); export it anew") from error
    if not polygons or not all(np.isfinite(ring).all() and len(ring) >= 3 for rings in polygons for ring in rings):
        raise ImageFileError(
            f"{path} holds no polygons, or rings of fewer than three points; a mask's are Polygon or MultiPolygon in "
            "pixels of the full resolution"
        )
    return polygons


def _geometries(content: Any) -> Iterator[list[Any]]:
    """The rings of each polygon of a Feature, a collection, a geometry, or a list of these, as QuPath writes them."""
    if isinstance(content, list):
        for part in content:
            yield from _geometries(part)
        return
    kind = content["type"]
    if kind == "FeatureCollection":
        yield from _geometries(content["features"])
    elif kind == "Feature":
        yield from _geometries(content["geometry"])
    elif kind == "GeometryCollection":
        yield from _geometries(content["geometries"])
    elif kind == "Polygon":
        yield content["coordinates"]
    elif kind == "MultiPolygon":
        yield from content["coordinates"]
    else:
        raise ValueError(f"a {kind}, which has no area")


def _inside(
    polygons: list[Rings], ys: np.ndarray[Any, np.dtype[Any]], xs: np.ndarray[Any, np.dtype[Any]]
) -> np.ndarray[Any, np.dtype[Any]]:
    """Whether points of a grid lie in any polygon: an odd number of its edges is to the left of them."""
    inside = np.zeros((len(ys), len(xs)), bool)
    for rings in polygons:
        starts = np.concatenate(rings)
        ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
        low, high = np.minimum(starts[:, 1], ends[:, 1]), np.maximum(starts[:, 1], ends[:, 1])
        for row in range(*np.searchsorted(ys, [low.min(), high.max()]).tolist()):
            y = ys[row]
            crossed = (low <= y) & (y < high)
            (x0, y0), (x1, y1) = starts[crossed].T, ends[crossed].T
            crossings = np.sort(x0 + (y - y0) * (x1 - x0) / (y1 - y0))
            inside[row] |= np.searchsorted(crossings, xs, side="right") % 2 == 1
    return inside
