"""Image files of every kind that sources read, with what they hold, and boxes of them."""

import numpy as np
import openslide
import rasterio
import tifffile
import torch
from PIL import Image
from rasterio.enums import Resampling

from ats.sources import Box


def pixels(height, width, channels=3, dtype=np.uint8, seed=0):
    """(H, W, C) of smooth colours with noise, so that a read of the wrong place or by interpolation shows."""
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max + 1, (height, width, channels), dtype)


def pyramid(height, width, n_levels, ratio=2, **options):
    """Levels of unrelated pixels: a read of the wrong level, or one that resamples, cannot pass."""
    sizes = [(height // ratio**level, width // ratio**level) for level in range(n_levels)]
    return [pixels(*size, seed=level, **options) for level, size in enumerate(sizes)]


def write_tiff(path, levels, **options):
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for index, level in enumerate(levels):
            file.write(level, subfiletype=int(index > 0), metadata=None, **options)


def write_geotiff(path, level, overviews=(), **options):
    """Through GDAL: overviews, JPEG, projections, many bands; returns the levels as GDAL itself reads them."""
    shape = {"height": level.shape[0], "width": level.shape[1], "count": level.shape[2], "dtype": level.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
        file.write(level.transpose(2, 0, 1))
        if overviews:
            file.build_overviews(overviews, Resampling.nearest)
    levels = []
    for number in (None, *range(len(overviews))):
        with rasterio.open(path, **({} if number is None else {"overview_level": number})) as file:
            levels.append(file.read().transpose(1, 2, 0))
    return levels


def written(folder):
    """(path, backend that it must be given to, levels (H, W, C), mpp) of files of every kind that is read."""
    tiles = {"tile": (64, 64), "photometric": "rgb"}
    even, odd, tall = pyramid(256, 320, 3), pyramid(301, 259, 3), pyramid(200, 180, 2, ratio=3)
    write_tiff(folder / "even.tif", even, **tiles)
    yield folder / "even.tif", "openslide", even, None
    write_tiff(folder / "odd.tif", odd, compression="zlib", **tiles)
    yield folder / "odd.tif", "openslide", odd, None
    write_tiff(folder / "tall.tif", tall, bigtiff=True, **tiles)
    yield folder / "tall.tif", "openslide", tall, None
    write_tiff(folder / "strips.tif", [pixels(150, 130)], rowsperstrip=7, photometric="rgb")
    yield folder / "strips.tif", "pillow", [pixels(150, 130)], None
    deep = [pixels(150, 130, 5, np.uint16)]
    write_tiff(folder / "deep.tif", deep, tile=(32, 32), photometric="minisblack", planarconfig="contig")
    yield folder / "deep.tif", "rasterio", deep, None
    signed = [pixels(90, 70, 1, np.int16)]
    write_tiff(folder / "signed.tif", [signed[0][..., 0]], photometric="minisblack")
    yield folder / "signed.tif", "pillow", signed, None
    smooth = np.add.outer(np.arange(300), np.arange(280))[..., None] // np.array([3, 4, 5])
    jpeg = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "jpeg", "photometric": "ycbcr"}
    sizes = [
        level.shape[1::-1] for level in write_geotiff(folder / "jpeg.tif", smooth.astype(np.uint8), (2, 4), **jpeg)
    ]
    with openslide.OpenSlide(folder / "jpeg.tif") as slide:  # decoders of JPEG differ by two levels of 255
        wholes = [np.asarray(slide.read_region((0, 0), level, size)) for level, size in enumerate(sizes)]
    yield folder / "jpeg.tif", "openslide", [whole[..., :3] for whole in wholes], None
    place = {"crs": "EPSG:32618", "transform": rasterio.Affine(30, 0, 5e5, 0, -20, 4e6)}
    levels = write_geotiff(folder / "geo.tif", pixels(133, 157, 4, np.int16), (2, 4), **place)
    yield folder / "geo.tif", "rasterio", levels, (20e6, 30e6)
    Image.fromarray(pixels(60, 80)).save(folder / "x.png")
    yield folder / "x.png", "pillow", [pixels(60, 80)], None


def boxes_of(source, count=8, seed=0):
    random = np.random.default_rng(seed)
    for level, size in enumerate(source.levels):
        yield Box(source, level, 0, 0, size.height, size.width)
        for _ in range(count):
            height, width = random.integers(1, min(size.height, size.width, 90) + 1, 2)
            top, left = random.integers(0, (size.height - height + 1, size.width - width + 1))
            yield Box(source, level, *(int(value) for value in (top, left, height, width)))


def cut(levels, box):
    part = levels[box.level][box.top : box.top + box.height, box.left : box.left + box.width]
    return torch.from_numpy(np.ascontiguousarray(part.transpose(2, 0, 1)))


def assert_exact(boxes, read, levels):
    for box, tensor in zip(boxes, read, strict=True):
        expected = cut(levels, box)
        assert tensor.dtype == expected.dtype == box.source.dtype
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), box  # uint16 has no torch.equal
