"""Attention for other programs: GeoJSON for QuPath, and a pyramidal OME-TIFF heatmap."""

import gzip
import importlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ats._files import write_whole
from ats.grid import Placement
from ats.heatmaps import heatmap
from ats.nested_sample import NestedSample
from ats.paths import user_path
from ats.samples import BoxSample, Estimator
from ats.sources import ImageSource

_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis
_TILE = 256
_PIXELS_A_CELL = 4


def geojson(
    path: str | os.PathLike[str],
    source: ImageSource | Tensor,
    sample: BoxSample | NestedSample,
    *,
    estimator: Estimator = "ordered",
    origin: tuple[int, int] = (0, 0),
    overwrite: bool = False,
) -> None:
    """Write the patches that were drawn as detections that QuPath opens: a FeatureCollection of boxes.

    Boxes are in pixels of level 0, cut to the image, and coloured by their weight; those outside of it are left out.
    Each has the measurements attention, weight and draw.

    Args:
        path: ends with .geojson, .json or either and .gz.
        source: the image, or a tensor (…, H, W).
        sample: of one image, e.g. one of a `Prediction`'s samples; several rows are several draws from it.
        estimator: what the weights are of, as in `ats.expectation`.
        origin: row and column of the image that the other program takes for (0, 0): the slide's
            openslide.bounds-y and openslide.bounds-x where it crops to these.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: there is a file already, and not `overwrite`.
        ValueError: another ending, or nothing to write.
    """
    target = _target(path, (".geojson", ".json", ".geojson.gz", ".json.gz"), overwrite=overwrite)
    height, width = _size(source)
    rows = sample.table(estimator)
    heaviest = max((abs(row["weight"]) for row in rows), default=0.0) or 1.0
    features = []
    for row in rows:
        top, left = max(0, int(row["top"])), max(0, int(row["left"]))
        bottom = min(height, int(row["top"] + row["height"]))
        right = min(width, int(row["left"] + row["width"]))
        if top >= bottom or left >= right:
            continue
        features.append(
            _feature(row, (top - origin[0], left - origin[1], bottom - origin[0], right - origin[1]), heaviest)
        )
    if not features:
        raise ValueError(f"no patch of the sample lies in the image of {height}×{width} pixels: nothing to write")
    text = json.dumps({"type": "FeatureCollection", "features": features}, allow_nan=False)
    data = text.encode()
    write_whole(target, gzip.compress(data, mtime=0) if target.suffix == ".gz" else data)


def _feature(row: dict[str, int | float], box: tuple[int, int, int, int], heaviest: float) -> dict[str, Any]:
    top, left, bottom, right = box
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    number = len(_COLOURS) * abs(row["weight"]) / heaviest
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {
            "objectType": "detection",
            "name": f"patch {int(row['draw'])}",
            "classification": {"name": "Attention", "color": list(_COLOURS[min(int(number), len(_COLOURS) - 1)])},
            "measurements": {name: float(row[name]) for name in ("attention", "weight", "draw")},
        },
    }


def heatmap_tiff(
    path: str | os.PathLike[str],
    source: ImageSource | Tensor,
    logits: Tensor,
    *,
    size: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    view_size: tuple[int, int] | None = None,
    receptive_field: int | Placement = 0,
    overwrite: bool = False,
) -> None:
    """Write attention as a tiled, pyramidal OME-TIFF of floats, where 1 is what pixels would have if all were alike.

    It covers the whole image with fewer pixels, whose size in micrometres it says where the image's mpp is known, so
    that viewers lay it over the slide.

    Args:
        path: ends with .tif or .tiff.
        source: the image, or a tensor (…, H, W).
        logits: (gh, gw), (1, gh, gw) or (1, 1, gh, gw) of one image.
        size: pixels (h, w) of the largest level; four a cell, and no more than the image has, where None.
        mask, view_size, receptive_field: as in `ats.heatmap`.
        overwrite: replace a file that is there.

    Raises:
        FileExistsError: there is a file already, and not `overwrite`.
        ModuleNotFoundError: tifffile is not installed.
        ValueError: another ending, logits of several images.
    """
    maps = logits[None] if logits.ndim == 2 else logits
    if maps.shape[0] != 1:
        raise ValueError(f"logits must be of one image, (gh, gw) or (1, gh, gw), got {tuple(logits.shape)}")
    full = _size(source)
    if size is None:
        height, width = (min(_PIXELS_A_CELL * cells, side) for cells, side in zip(maps.shape[-2:], full, strict=True))
        size = height, width
    mass = heatmap(maps, full, size=size, mask=mask, view_size=view_size, receptive_field=receptive_field)[0]
    mass_tiff(path, source, mass, overwrite=overwrite)


def mass_tiff(
    path: str | os.PathLike[str], source: ImageSource | Tensor, mass: Tensor, *, overwrite: bool = False
) -> None:
    """Write a picture of the whole image as `heatmap_tiff` does, e.g. one of `ats.nested_maps.zoomed_heatmap`.

    Args:
        path, source, overwrite: as there.
        mass: (h, w), what of the attention, or of the weight, lies on each pixel.
    """
    target = _target(path, (".tif", ".tiff"), overwrite=overwrite)
    tifffile, full, size = _tifffile(), _size(source), tuple(mass.shape)
    levels = [(mass * mass.numel()).float().cpu()]
    while max(levels[-1].shape) > _TILE:
        levels.append(F.avg_pool2d(levels[-1][None, None], 2, ceil_mode=True, count_include_pad=False)[0, 0])
    about: dict[str, Any] = {"axes": "YX", "Name": "attention"}
    mpp = None if isinstance(source, Tensor) else source.mpp
    if mpp is not None:
        for axis, index in (("Y", 0), ("X", 1)):
            about[f"PhysicalSize{axis}"] = mpp[index] * full[index] / size[index]
            about[f"PhysicalSize{axis}Unit"] = "µm"
    buffer = io.BytesIO()
    how = {"tile": (_TILE, _TILE), "compression": "zlib", "photometric": "minisblack"}
    with tifffile.TiffWriter(buffer, ome=True) as file:
        file.write(levels[0].numpy(), subifds=len(levels) - 1, metadata=about, **how)
        for level in levels[1:]:
            file.write(level.numpy(), subfiletype=1, metadata=None, **how)
    write_whole(target, buffer.getbuffer())


def _tifffile() -> Any:
    try:
        return importlib.import_module("tifffile")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tifffile is not installed; OME-TIFF heatmaps need: pip install 'torch-ats[slides]'", name="tifffile"
        ) from error


def _size(source: ImageSource | Tensor) -> tuple[int, int]:
    if isinstance(source, Tensor):
        return source.shape[-2], source.shape[-1]
    return source.levels[0].height, source.levels[0].width


def _target(path: str | os.PathLike[str], endings: tuple[str, ...], *, overwrite: bool) -> Path:
    target = user_path(path)
    if not target.name.lower().endswith(endings):
        raise ValueError(f"{target} must end with one of {', '.join(endings)}, as other programs expect")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already; name another file, or pass overwrite=True")
    return target
