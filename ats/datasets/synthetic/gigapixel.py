"""Gigapixel MNIST as files: tiled pyramids, written tile by tile, with a manifest for `ats train images`."""

import csv
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ats._files import whole_file, write_whole
from ats.datasets.gigapixel_mnist import DEMO, GigapixelMNIST
from ats.datasets.mnist import load_digits
from ats.datasets.synthetic.folder import new_folder
from ats.datasets.synthetic.pyramid import tifffile
from ats.sources.image_source import ImageSource

_TILE = 256
_BIG = 1 << 31  # bytes of a level above which TIFF's own offsets may not do


def write_gigapixel_mnist(
    folder: str | os.PathLike[str], train_images: int, test_images: int, *, image_size: int | None = None, seed: int = 0
) -> None:
    """Write images of `ats train gigapixel-mnist --preset demo`: train-0000.tif, …, test-0000.tif, … and labels.csv.

    A run of that preset and seed is evaluated on the same test images. Those to train on have all of the noise.

    Args:
        folder: where to; new or empty.
        train_images, test_images: how many of either.
        image_size: pixels a side; the preset's where None.
        seed: of the images.

    Raises:
        FileExistsError: the folder is not empty.
        ModuleNotFoundError: tifffile is not installed.
        ValueError: a number of images or a size that cannot be.
    """
    if min(train_images, test_images) < 0 or train_images + test_images < 1:
        raise ValueError(
            f"train_images and test_images must be at least 0, and one of them 1, got {train_images} and {test_images}"
        )
    options = dict(DEMO)
    if image_size is not None:
        options["image_size"] = image_size
    sets = {
        name: GigapixelMNIST(load_digits(name), count, seed=seed, split=name, **options)
        for name, count in (("train", train_images), ("test", test_images))
    }
    content = f"Gigapixel MNIST, seed {seed}, {train_images} and {test_images} images of {options['image_size']} pixels"
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("path", "label", "split"))
    with new_folder(folder, content, real="Its digits are handwritten.") as place:
        for name, images in sets.items():
            for index, label in enumerate(images.labels.tolist()):
                file = f"{name}-{index:04}.tif"
                write_source(place / file, images.image(index, dtype=torch.uint8))
                rows.writerow((file, label, name))
        write_whole(place / "labels.csv", table.getvalue().encode())


def write_source(path: Path, source: ImageSource) -> None:
    """Write an image of one channel as a tiled, pyramidal TIFF without loss, a tile at a time.

    Args:
        path: ends with .tif.
        source: the image; its levels become those of the file.

    Raises:
        FileExistsError: there is a file of that name.
        ModuleNotFoundError: tifffile is not installed.
        ValueError: an image of several channels.
    """
    if source.channels != 1:
        raise ValueError(f"{source.name} has {source.channels} channels, expected 1")
    full = source.levels[0]
    big = full.height * full.width * source.dtype.itemsize > _BIG
    with whole_file(path, overwrite=False) as target, tifffile().TiffWriter(target, bigtiff=big) as file:
        for number, level in enumerate(source.levels):
            file.write(
                data=_tiles(source, number),
                shape=(level.height, level.width),
                dtype=str(source.dtype).removeprefix("torch."),
                tile=(_TILE, _TILE),
                photometric="minisblack",
                compression="zlib",
                compressionargs={"level": 1},
                subfiletype=int(number > 0),
                metadata=None,
            )


def _tiles(source: ImageSource, number: int) -> Iterator["np.ndarray[Any, Any]"]:
    """The tiles of a level, row by row; those at the far edges are padded with zeros."""
    level = source.levels[number]
    for row in range(math.ceil(level.height / _TILE)):
        for column in range(math.ceil(level.width / _TILE)):
            top, left = row * _TILE, column * _TILE
            height, width = min(_TILE, level.height - top), min(_TILE, level.width - left)
            box = source.read(number, top, left, height, width)[0].numpy()
            yield np.pad(box, ((0, _TILE - height), (0, _TILE - width)))
