"""Paths as users write them."""

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `~name` as the home folders that they stand for: a shell does so, Python does not.

    Raises:
        TypeError: neither text nor a path.
        ValueError: a home folder that is not known.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"expected a path, as text or a Path, got {path!r}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)}: {error}; write the path without ~") from error
