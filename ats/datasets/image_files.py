"""What the readers of image folders share: decoding, what is synthetic, where the data is by default."""

import importlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

SYNTHETIC_MARKER = "SYNTHETIC.txt"
"""A file of this name marks a folder whose images were made up; reports say so."""


def needed(module: str, package: str) -> ModuleType:
    """Import a module that only image data sets need.

    Raises:
        ModuleNotFoundError: its package is not installed; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{package} is not installed; image data sets need it: pip install 'torch-ats[experiments]'",
            name=error.name,
        ) from error


def pillow(module: str) -> ModuleType:
    """A module of Pillow's, e.g. "Image"; raises as `needed`."""
    return needed(f"PIL.{module}", "Pillow")


def read_image(path: Path) -> Tensor:
    """Decode an image file as (3, H, W) uint8: red, green, blue.

    Raises:
        ValueError: the file is damaged, cut short or no image.
        FileNotFoundError: there is no such file.
    """
    image = pillow("Image")
    try:
        with image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file in pixels, from its header.

    Raises:
        ValueError: the header is damaged, cut short or no image's.
        FileNotFoundError: there is no such file.
    """
    image = pillow("Image")
    try:
        with image.open(path) as file:
            return file.height, file.width
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


# What Pillow raises for damaged files, by format.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged, cut short or no image ({error}); put a whole copy in its place")


def check_same_size(sizes: Iterable[tuple[Path, tuple[int, int]]]) -> None:
    """Make sure that images can be stacked to a batch.

    Raises:
        ValueError: two (path, (height, width)) differ in size; names both.
    """
    first: tuple[Path, tuple[int, int]] | None = None
    for path, size in sizes:
        if first is None:
            first = path, size
        elif size != first[1]:
            raise ValueError(
                f"{path} is {size[0]}×{size[1]} but {first[0]} is {first[1][0]}×{first[1][1]} pixels (height × width); "
                "all images of a set must have one size: restore the original files"
            )


def find_image(folder: Path, stem: str, suffixes: Iterable[str]) -> Path | None:
    """The file `stem` with the first of `suffixes` that is there, whatever the case of its letters."""
    for suffix in suffixes:
        for path in (folder / f"{stem}{suffix}", folder / f"{stem}{suffix.upper()}"):
            if path.is_file():
                return path
    return None


def is_synthetic(*folders: Path) -> bool:
    """Whether any of the folders is marked as made up."""
    return any((folder / SYNTHETIC_MARKER).is_file() for folder in folders)


def default_folder(name: str) -> Path:
    """Where a data set is if its folder was not given: `name` below the folder that ATS_DATA names.

    Raises:
        FileNotFoundError: ATS_DATA is not set.
    """
    if not os.environ.get("ATS_DATA"):
        raise FileNotFoundError(
            f"where is {name}? Give its folder, or set ATS_DATA to the folder that holds {name}/; "
            "`ats synthesise` writes a synthetic stand-in (docs/data.md)"
        )
    return Path(os.environ["ATS_DATA"]) / name
