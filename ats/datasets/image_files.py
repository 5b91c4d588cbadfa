"""What the readers of image folders share: decoding, what is synthetic, where the data is by default."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ats.paths import user_path
from ats.sources import decoding
from ats.sources.decoding import pillow as pillow

SYNTHETIC_MARKER = "SYNTHETIC.txt"
"""A file of this name marks a folder whose images were made up; reports say so."""


def needed(module: str, package: str) -> ModuleType:
    """Import a module that only image data sets need.

    Raises:
        ModuleNotFoundError: its package is not installed; says how to get it.
    """
    return decoding.needed(module, package, "experiments", "image data sets")


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Decode an image file as (3, H, W) uint8: red, green, blue, the right way up, on white where it is transparent.

    Raises:
        ValueError: the file is damaged, cut short, no image, or deeper than 8 bits a channel.
        FileNotFoundError: there is no such file.
    """
    path = user_path(path)
    header = decoding.read_header(path)
    if header.dtype != np.uint8:
        raise ValueError(
            f"{path} of mode {header.mode} holds {header.dtype} values, expected 8 bits a channel, which a choice of "
            "range must come before; convert it, or read it as it is with ats.open_image"
        )
    pixels = torch.from_numpy(decoding.decode(path)).permute(2, 0, 1)
    return pixels.expand(3, -1, -1).contiguous()


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of an image file in pixels, the right way up, from its header.

    Raises:
        ValueError: the header is damaged, cut short or no image's.
        FileNotFoundError: there is no such file.
    """
    header = decoding.read_header(user_path(path))
    return header.height, header.width


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
    return user_path(os.environ["ATS_DATA"]) / name
