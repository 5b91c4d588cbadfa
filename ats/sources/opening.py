"""`open_image`: which reader a file is for."""

import importlib.util
import os
from pathlib import Path

from ats.paths import user_path
from ats.sources.decoding import Colour
from ats.sources.file_source import FileSource
from ats.sources.image_source import check_mpp
from ats.sources.plain import open_plain
from ats.sources.rasters import open_raster
from ats.sources.slides import is_slide, open_slide
from ats.sources.tiff_header import TiffHeader, read_tiff_header

_OPEN = {"openslide": open_slide, "rasterio": open_raster, "pillow": open_plain}
_MODULES = {"openslide": "openslide", "rasterio": "rasterio", "pillow": "PIL"}
_EXTRAS = {"openslide": "slides", "rasterio": "satellite", "pillow": "data"}
_SLIDES = (".svs", ".ndpi", ".scn", ".mrxs", ".vms", ".vmu", ".svslide", ".bif", ".czi", ".dcm")
_RASTERS = (".vrt", ".img", ".nc", ".hdf", ".h5", ".bil", ".dem", ".hgt", ".asc", ".grd")
_LARGE = 1 << 26  # pixels above which an image in strips is better read in parts than decoded whole


def open_image(
    path: str | os.PathLike[str],
    *,
    mpp: float | tuple[float, float] | None = None,
    background: Colour | str | None = "auto",
    backend: str | None = None,
) -> FileSource:
    """Open an image of any size: a slide, a raster, or an image file. Nothing but its header is read now.

    Args:
        path: the file.
        mpp: micrometres a pixel, a number or (y, x), in place of what the file says.
        background: what is behind transparent pixels: "auto", the slide's own colour or white; a number from 0 to 255,
            or one a channel; None: transparency is read as the last channel.
        backend: "openslide", "rasterio" or "pillow"; None: what the file is for.

    Returns:
        An `ImageSource`. It may be pickled, shared by threads and used after a fork: every thread of every process
        opens the file by itself.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the reader is not installed; says which extra brings it.
        ValueError: a file that is damaged, of another kind than its name, or cannot be read without loss.
    """
    place = Path(os.path.abspath(user_path(path)))
    if backend is not None and backend not in _OPEN:
        raise ValueError(f"unknown backend {backend!r}, expected None, {', '.join(map(repr, _OPEN))}")
    if isinstance(background, str) and background != "auto":
        raise ValueError(f"background must be 'auto', None, or a colour of numbers from 0 to 255; got {background!r}")
    if not place.exists():
        raise FileNotFoundError(f"{place} is missing; check the path")
    if place.is_dir():
        raise ValueError(f"{place} is a folder; name a file, of a slide in several files the one to open")
    chosen = backend or _choose(place)
    return _OPEN[chosen](place, mpp=check_mpp(mpp), background=background)


def _choose(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        raise ValueError(
            f"{path} is an array, whose axes have no names: load it with numpy.load(path, mmap_mode='r') and pass it "
            "to ats.sources.from_arrays"
        )
    backends = _backends_for(suffix, read_tiff_header(path))
    for backend in backends:
        if _installed(backend) and not (backend == "openslide" and len(backends) > 1 and not is_slide(path)):
            return backend
    missing = [backend for backend in backends if not _installed(backend)]
    ways = " or ".join(f"pip install 'torch-ats[{_EXTRAS[backend]}]'" for backend in missing)
    raise ModuleNotFoundError(f"{path} needs {' or '.join(missing)}, which is not installed: {ways}")


def _backends_for(suffix: str, tiff: TiffHeader | None) -> tuple[str, ...]:
    """Readers that give the same pixels of level 0, but for the rounding of JPEG's colours; the best first."""
    if suffix in _SLIDES:
        return ("openslide",)
    if suffix in _RASTERS:
        return ("rasterio",)
    if suffix in (".jp2", ".j2k"):
        return ("rasterio", "pillow")
    if tiff is None:
        return ("pillow",)
    plain = tiff.bits <= 8 and tiff.unsigned
    if tiff.geographic or not (plain or (tiff.samples == 1 and tiff.bits <= 32)):
        return ("rasterio",)
    if not tiff.tiled:
        large = tiff.height * tiff.width > _LARGE and tiff.photometric in (1, 2) and tiff.bits >= 8
        return ("rasterio", "pillow") if large else ("pillow",)
    if plain and tiff.samples == 3:
        return ("openslide", "rasterio") if tiff.more else ("openslide", "rasterio", "pillow")
    return ("rasterio",) if tiff.more else ("rasterio", "pillow")


def _installed(backend: str) -> bool:
    try:
        return importlib.util.find_spec(_MODULES[backend]) is not None
    except ValueError:  # it is being kept from being imported
        return False
