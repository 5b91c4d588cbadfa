"""Slides as files: tiled pyramids without loss that OpenSlide and QuPath open."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ats._files import write_whole
from ats.datasets.image_files import pillow

LEVELS = 4
"""Of a slide: each half as large as the one before."""
MULTIPLE = 1 << (LEVELS - 1)
"""Of which sides are multiples, so that downsamples are whole numbers."""

_TILE = 128  # a patch touches few pixels beside its own


def write_pyramid(path: Path, pixels: NDArray[np.uint8], mpp: float) -> None:
    """Write a slide as a tiled TIFF with levels.

    Args:
        path: ends with .tif.
        pixels: (H, W, 3), red, green, blue, with sides that are multiples of `MULTIPLE`.
        mpp: micrometres a pixel.

    Raises:
        ModuleNotFoundError: tifffile is not installed.
        ValueError: pixels of another shape.
    """
    height, width = pixels.shape[:2]
    if pixels.ndim != 3 or pixels.shape[2] != 3 or height % MULTIPLE or width % MULTIPLE or not pixels.size:
        raise ValueError(f"pixels must be (H, W, 3) with sides that are multiples of {MULTIPLE}, got {pixels.shape}")
    buffer, image = io.BytesIO(), pillow("Image").fromarray(pixels)
    with tifffile().TiffWriter(buffer) as file:
        for level in range(LEVELS):
            file.write(
                np.asarray(image.reduce(1 << level)) if level else pixels,
                tile=(_TILE, _TILE),
                photometric="rgb",
                compression="zlib",
                compressionargs={"level": 1},
                subfiletype=int(level > 0),
                resolution=(10_000 / mpp / (1 << level),) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    write_whole(path, buffer.getbuffer())


def tifffile() -> Any:
    """The package that writes TIFFs.

    Raises:
        ModuleNotFoundError: it is not installed; says which extra brings it.
    """
    try:
        return importlib.import_module("tifffile")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tifffile is not installed; writing slides needs: pip install 'torch-ats[slides]'", name="tifffile"
        ) from error
