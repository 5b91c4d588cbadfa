"""What the sources that are files share: checks before a read, and errors that name the file."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ats.sources.decoding import Colour, ImageFileError
from ats.sources.handles import discard, handle
from ats.sources.image_source import Level, check_box, check_unchanged


@dataclass(frozen=True)
class FileSource:
    """A file of which boxes are read by a handle of this thread's own. It holds no open file, and so pickles.

    Attributes:
        path: absolute.
        background: behind transparent pixels; None: transparency is the last channel.
        levels, channels, dtype, mpp, fingerprint: see `ats.sources.ImageSource`.
    """

    path: Path
    background: Colour | None
    levels: Sequence[Level]
    channels: int
    dtype: torch.dtype
    mpp: tuple[float, float] | None
    fingerprint: str

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """See `ats.sources.ImageSource`."""
        level, top, left, height, width = check_box(self, level, top, left, height, width)
        key: Hashable = (type(self), self.fingerprint)
        opened = handle(key, self._open)
        try:
            return self._read(opened, level, top, left, height, width)
        except (ImageFileError, FileNotFoundError):  # these say by themselves which file, and why
            discard(key)
            raise
        except Exception as error:
            discard(key)
            raise ImageFileError(
                f"{self.path}: the box of {height}×{width} pixels at ({top}, {left}) of level {level} cannot be read "
                f"({error or type(error).__name__}); the file is damaged or cut short: put a whole copy in its place"
            ) from error

    def _open(self) -> Any:
        check_unchanged(self.path, self.fingerprint)
        return self._open_handle()

    def _open_handle(self) -> Any:
        raise NotImplementedError

    def _read(self, opened: Any, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        raise NotImplementedError
