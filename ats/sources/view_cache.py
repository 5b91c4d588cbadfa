"""Views kept on disk: a file each, named by what it was made from, whole or not there."""

import contextlib
import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ats.paths import user_path
from ats.sources.image_source import ImageSource

_LEFT_OVER = 86_400  # seconds after which nobody writes an unfinished file any more
_FORMAT = 1  # of what is written; another one is another name


class CacheError(OSError):
    """The folder of views, not the image, is at fault: its disk is full, or it may not be read or written."""

    def __str__(self) -> str:
        return str(self.strerror)


def cached_view(
    folder: str | os.PathLike[str],
    source: ImageSource,
    level: int,
    size: tuple[int, int],
    made: Callable[[], Tensor],
) -> Tensor:
    """The view of `size` (h, w) of a source, from a file in `folder`, or else `made` now and kept there.

    Raises:
        ValueError: the source has no fingerprint, and its view could be that of other pixels.
        CacheError: the disk is full, or may not be read or written; nothing half-written is left.
    """
    fingerprint = getattr(source, "fingerprint", None)
    if not fingerprint:
        raise ValueError(
            f"{source.name} has no fingerprint, so a cached view could be of other pixels: leave cache out, or pass "
            "ats.sources.from_arrays(…, fingerprint=…) a text that changes when the pixels do"
        )
    key = json.dumps(
        {
            "format": _FORMAT,
            "image": fingerprint,
            "level": [level, source.levels[level].height, source.levels[level].width],
            "size": list(size),
            "channels": source.channels,
            "dtype": str(source.dtype),
            "background": repr(getattr(source, "background", None)),
            "reader": type(source).__name__,
        }
    )
    path = user_path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    view = _load(path, key, (source.channels, *size))
    if view is None:
        view = made()
        _save(path, key, view, source.name)
    return view


def _load(path: Path, key: str, shape: tuple[int, ...]) -> Tensor | None:
    """None where there is no such file, or a damaged one; zip files hold checksums."""
    try:
        with np.load(path, allow_pickle=False) as file:
            view, found = torch.from_numpy(file["view"]), str(file["key"])
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise CacheError(
            error.errno, f"{path}, which keeps a view, may not be read: let this user read it, or name another folder"
        ) from error
    except Exception:  # NumPy and zipfile raise a dozen types for damaged bytes; all mean: make it anew
        return None
    return view if found == key and view.shape == shape and view.is_floating_point() else None


def _clear(path: Path) -> None:
    """Remove what processes that were killed in the midst of writing this view have left, a day ago or more."""
    for part in path.parent.glob(f".{path.stem}.*.part"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            if time.time() - part.stat().st_mtime > _LEFT_OVER:
                part.unlink()


def _save(path: Path, key: str, view: Tensor, name: str) -> None:
    part = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, view=view.numpy(), key=np.array(key))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _clear(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space there, name another folder, or leave cache out"
        raise CacheError(
            error.errno,
            f"the view of {name} cannot be kept in {path.parent}: "
            f"{'its disk is full' if full else error.strerror or error}; {mend}",
        ) from error
    finally:
        part.unlink(missing_ok=True)
