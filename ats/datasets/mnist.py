"""MNIST's digits: a small set that ships with the package, or the whole from a folder or a download."""

import gzip
import hashlib
import math
import os
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ats._files import write_whole
from ats.paths import user_path

BUNDLED = Path(__file__).parent / "mnist_digits"

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

# SHA-256 of the uncompressed files, whose names end in .gz or not on disk.
CHECKSUMS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

MOST_BYTES = 1 << 30
"""The most of an unpacked file: twenty times MNIST's largest, twice EMNIST's. A file of more is none of digits."""

_PREFIX = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images (M, 28, 28) uint8, white on black, and labels (M,) int64."""

    images: Tensor
    labels: Tensor


def load_digits(split: str, folder: str | Path | None = None) -> Digits:
    """The digits of a split, "train" or "test", from IDX files in `folder` (gzip or plain); None: those shipped.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown split; a file that is not what its name says, which the message names.
    """
    if split not in _PREFIX:
        raise ValueError(f"unknown split {split!r}, expected 'train' or 'test'")
    folder = BUNDLED if folder is None else user_path(folder)
    images = read_idx(_find(folder, f"{_PREFIX[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte"))
    if images.shape[1:] != (28, 28) or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{folder}: the {split} files hold images {tuple(images.shape)} and labels {tuple(labels.shape)}; "
            "expected (M, 28, 28) and (M,)"
        )
    return Digits(images, labels.long())


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Read an IDX file of bytes, gzip-compressed or not, as a uint8 tensor.

    Raises:
        ValueError: the file is truncated, damaged or not an IDX file of bytes.
    """
    path = user_path(path)
    with _open(path) as file:
        head = file.read(4)
        if len(head) < 4 or head[:3] != b"\0\0\x08":
            raise ValueError(f"{path} is not an IDX file of bytes: it starts with {head.hex(' ')}, not 00 00 08")
        ndim = head[3]
        sizes = file.read(4 * ndim)
        if len(sizes) < 4 * ndim:
            raise ValueError(f"{path} is truncated within its header")
        shape = struct.unpack(f">{ndim}I", sizes)
        expected = math.prod(shape)  # of Python's integers, which don't overflow
        if expected > MOST_BYTES:
            raise ValueError(
                f"{path}: its header says {shape}, {expected} bytes; digits take {MOST_BYTES} at most. Fetch it anew"
            )
        data = file.read(expected + 1)  # and no more, whatever a small compressed file unpacks to
    if len(data) != expected:
        follow = "more" if len(data) > expected else len(data)
        raise ValueError(
            f"{path} is truncated or too long: its header says {shape}, {expected} bytes, and {follow} follow; "
            "fetch it anew"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(shape)


def fetch_mnist(folder: str | os.PathLike[str]) -> Path:
    """Make sure that the whole of MNIST lies in `folder`, downloading what is missing. Returns the folder.

    Raises:
        ConnectionError: a file is missing and no mirror could be reached.
        ValueError: a file's checksum is not the published one.
    """
    folder = user_path(folder)
    for name, checksum in CHECKSUMS.items():
        try:
            path = _find(folder, name)
        except FileNotFoundError:
            path = _download(folder, name)
        if _checksum(path) != checksum:
            raise ValueError(f"{path} is not the published {name}: its checksum differs; delete it and run again")
    return folder


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked; damage that shows while they are read is an error that names the file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast("BinaryIO", file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); delete it and fetch it anew") from error


def _checksum(path: Path) -> str:
    """SHA-256 of what a file unpacks to, no more of it than a set of digits can hold."""
    checksum, left = hashlib.sha256(), MOST_BYTES
    with _open(path) as file:
        while left > 0 and (part := file.read(1 << 20)):
            checksum.update(part)
            left -= len(part)
    return checksum.hexdigest()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds neither {name}.gz nor {name}; point to a folder with MNIST's IDX files")


def _download(folder: Path, name: str) -> Path:
    from rich.progress import wrap_file

    path = folder / f"{name}.gz"
    failures = []
    for mirror in MIRRORS:
        url = f"{mirror}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                size = int(response.headers.get("Content-Length", 0))
                with wrap_file(response, size, description=name) as reader:
                    data = reader.read()
        except (urllib.error.URLError, OSError) as error:
            failures.append(f"{url}: {error}")
            continue
        if size and len(data) != size:
            failures.append(f"{url}: {len(data)} of {size} bytes came")
            continue
        write_whole(path, data)
        return path
    raise ConnectionError(
        f"{name}.gz is not in {folder} and could not be downloaded:\n  "
        + "\n  ".join(failures)
        + "\nPut MNIST's four IDX files there by hand, name another folder with --data.folder, or use the digits that "
        "ship with the package with --data.digits bundled"
    )
