"""Rasters through rasterio (extra `satellite`): GeoTIFF, cloud-optimised too, JPEG 2000 and what else GDAL reads.

Any number of bands, as they are stored: no scale, offset or palette is applied, and pixels without data keep the value
that stands for it.
"""

import importlib
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ats.sources.decoding import Colour, ImageFileError, background_colour, chosen_background, composite, needed
from ats.sources.file_source import FileSource
from ats.sources.image_source import DTYPES, Level, check_mpp, check_unchanged, file_fingerprint

_CACHE = 32 << 20
"""Bytes that GDAL may keep of decoded blocks in a process, in place of a twentieth of the machine's memory."""

_limited = False  # whether it has been told


class _Datasets:
    """The full resolution and the overviews of a file, each a dataset of rasterio's, opened when it is read."""

    def __init__(self, source: "RasterSource") -> None:
        self._source = source
        self._opened: dict[int, Any] = {}

    def level(self, level: int) -> Any:
        if level not in self._opened:
            check_unchanged(self._source.path, self._source.fingerprint)
            self._opened[level] = _open(self._source.path, self._source.overviews[level])
        return self._opened[level]

    def close(self) -> None:
        for dataset in self._opened.values():
            dataset.close()
        self._opened.clear()


@dataclass(frozen=True)
class RasterSource(FileSource):
    """A raster.

    Attributes:
        overviews: GDAL's number of each level's overview; None for the full resolution.
        alpha: whether the last band is transparency, to be laid on the background.
    """

    overviews: tuple[int | None, ...]
    alpha: bool

    def _open_handle(self) -> _Datasets:
        return _Datasets(self)

    def _read(self, opened: _Datasets, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        dataset = opened.level(level)
        with _rasterio().Env():  # outside of one GDAL writes its own lines about errors, beside what is raised
            pixels = dataset.read(window=((top, top + height), (left, left + width)))  # (C, height, width)
        if self.alpha and self.background is not None:
            colour = background_colour(self.background, self.channels, self.name)
            pixels = np.ascontiguousarray(composite(pixels.transpose(1, 2, 0), colour).transpose(2, 0, 1))
        return torch.from_numpy(pixels)


def open_raster(path: Path, *, mpp: tuple[float, float] | None, background: Colour | str | None) -> RasterSource:
    """A raster.

    Args:
        path: of its file.
        mpp: in place of what its projection says: micrometres a pixel, so 30 m are 3e7.
        background: behind pixels that its alpha band makes transparent; "auto" is white.

    Raises:
        ModuleNotFoundError: rasterio is not installed.
        ValueError: damaged, no raster, or of numbers that would have to be converted.
    """
    fingerprint = file_fingerprint(path)
    with _open(path, None) as dataset:
        bands, size = dataset.count, Level(dataset.height, dataset.width)
        if not bands:
            raise ImageFileError(f"{path} holds no bands of its own; name one of its parts: {dataset.subdatasets[:3]}")
        dtype = _dtype(path, dataset.dtypes)
        alpha = bands > 1 and dataset.colorinterp[-1].name == "alpha"
        own_mpp = _read_mpp(dataset)
        n_overviews = len(dataset.overviews(1))
    levels: list[Level] = [size]
    overviews: list[int | None] = [None]
    found = []
    for number in range(n_overviews):
        with _open(path, number) as dataset:
            found.append((dataset.height, dataset.width, number))
    for height, width, number in sorted(found, reverse=True):
        if _same_picture(size, height, width) and height < levels[-1].height and width < levels[-1].width:
            levels.append(Level(height, width))
            overviews.append(number)
    behind = chosen_background(background)
    composited = alpha and behind is not None
    if composited:
        if dtype != torch.uint8:
            raise ImageFileError(
                f"{path} has transparency of {dtype}; only that of bytes is laid on a background: pass "
                "background=None, and it comes as the last channel"
            )
        background_colour(behind, bands - 1, str(path))
    return RasterSource(
        path=path,
        background=behind,
        levels=tuple(levels),
        channels=bands - composited,
        dtype=dtype,
        mpp=mpp or own_mpp,
        fingerprint=fingerprint,
        overviews=tuple(overviews),
        alpha=alpha,
    )


def _rasterio() -> Any:
    return needed("rasterio", "rasterio", "satellite", "rasters")


def _open(path: Path, overview: int | None) -> Any:
    rasterio = _rasterio()
    options = {} if overview is None else {"overview_level": overview}
    _limit_cache()
    # A picture need not lie anywhere on Earth.
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    try:
        return rasterio.open(path, **options)
    except Exception as error:
        raise ImageFileError(
            f"{path} is damaged, cut short or no raster that GDAL reads ({error}); put a whole copy in its place"
        ) from error


def _limit_cache() -> None:
    """Once, as the first raster is opened, so that what a user sets afterwards stays; a fork takes both along."""
    global _limited
    if not _limited and "GDAL_CACHEMAX" not in os.environ:
        # Of rasterio's numbers this one is in bytes; in GDAL's own variable it is in megabytes.
        importlib.import_module("rasterio.env").set_gdal_config("GDAL_CACHEMAX", _CACHE)
    _limited = True


def _dtype(path: Path, dtypes: tuple[str, ...]) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if len(set(dtypes)) > 1 or dtypes[0] not in known:
        raise ImageFileError(
            f"{path} holds bands of {', '.join(sorted(set(dtypes)))}, expected all of one of {', '.join(known)}; "
            "convert them, e.g. with gdal_translate -ot Float32"
        )
    return known[dtypes[0]]


def _read_mpp(dataset: Any) -> tuple[float, float] | None:
    """Micrometres a pixel where the projection is in a unit of length."""
    if dataset.crs is None or not dataset.crs.is_projected:
        return None
    metres = dataset.crs.linear_units_factor[1] * 1e6
    place = dataset.transform
    try:
        return check_mpp((math.hypot(place.b, place.e) * metres, math.hypot(place.a, place.d) * metres))
    except ValueError:
        return None


def _same_picture(size: Level, height: int, width: int) -> bool:
    """Whether an overview can be the whole of an image, its sides rounded: slides keep thumbnails and labels there."""
    return abs(height * size.width - width * size.height) <= 2 * max(size.height, size.width)
