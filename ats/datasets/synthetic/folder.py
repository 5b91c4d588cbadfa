"""How synthetic data sets come into being: seeded streams of numbers, and folders that are written whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ats._files import remove_unfinished, unfinished, write_whole
from ats.datasets.image_files import SYNTHETIC_MARKER
from ats.datasets.integers import Integers
from ats.paths import user_path
from ats.version import __version__


def integers(seed: int, *what: str | int) -> Integers:
    """Another stream for each purpose and image.

    Args:
        seed: of the data set.
        what: the purpose and, where it has them, the number of the image.

    Raises:
        ValueError: a seed of more than 64 bits.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer of 0 to 2⁶⁴ − 1, got {seed}")
    kinds = {"labels": 0, "image": 1, "train": 2, "test": 3, "slide": 4}
    name, index = what[0], what[1] if len(what) > 1 else (1 << 32) - 1
    assert isinstance(name, str)
    return Integers(np.random.Philox(key=[seed, kinds[name] << 32 | int(index)]))


@contextmanager
def new_folder(
    folder: str | os.PathLike[str], content: str, *, real: str = "Only the layout is real."
) -> Iterator[Path]:
    """A place to write to; once all is there, it moves into `folder`, the mark that says it is synthetic first.

    Args:
        folder: where to; new or empty.
        content: what is written, for the mark.
        real: what of it is not made up.

    Raises:
        FileExistsError: the folder is not empty.
    """
    folder = user_path(folder)
    remove_unfinished(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not an empty folder; name a new one, nothing is overwritten")
    place, created = unfinished(folder), not folder.exists()
    place.mkdir(parents=True)
    try:
        text = f"Synthetic images, made up by torch-ats {__version__}: {content}. {real}\n"
        write_whole(place / SYNTHETIC_MARKER, text.encode())
        yield place
        for part in sorted(place.iterdir(), key=lambda path: path.name != SYNTHETIC_MARKER):
            part.rename(folder / part.name)
    finally:
        shutil.rmtree(place)
        if created and not any(folder.iterdir()):
            folder.rmdir()
