"""Views of images on disk, read by the workers of a `DataLoader` while the step before is computed.

Only views are read there: which patches are wanted, the network decides, and they are read by threads once it has.
Views are as the files have them: what an epoch changes of them, the training process does, so that a batch is the same
whoever read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ats.experiments.level_options import LevelOptions
from ats.experiments.levels import plain_view
from ats.sources import ImageSource, read_view

Read = tuple[int, Tensor | str]
"""What a sampler asked for, and its view; or what is wrong with the file, as text."""


class ViewBatch(NamedTuple):
    """What loaders yield in place of indices alone.

    Attributes:
        indices: (B,) int64, as a sampler gave them: ~i where image i is read and not counted.
        views: (C, h, w) each, or what is wrong with a file.
    """

    indices: Tensor
    views: list[Tensor | str]

    def by_image(self) -> dict[int, Tensor]:
        """The views by the image's index.

        Raises:
            ValueError: a file could not be read; its name is in the message.
        """
        found = {}
        for index, view in zip(self.indices.tolist(), self.views, strict=True):
            if isinstance(view, str):
                raise ValueError(view)
            found[index if index >= 0 else ~index] = view
        return found


def as_batch(read: Sequence[Read]) -> ViewBatch:
    """For `collate_fn`: views may differ in size, and stay a list."""
    return ViewBatch(torch.tensor([index for index, _ in read], device="cpu"), [view for _, view in read])


@dataclass(frozen=True)
class ViewReader(Dataset[Read]):
    """Images on disk, of which views are read.

    Args:
        sources: of the images.
        sizes: pixels (h, w) of each view.
        names: what messages call each image.
        cache: folder that keeps the views, if any.
        level: the first of nested attention, whose scale views have in place of a size.
    """

    sources: Sequence[ImageSource]
    sizes: Sequence[tuple[int, int]]
    names: Sequence[str]
    cache: Path | None = None
    level: LevelOptions | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Read:
        """View `index`, or that of image i for ~i.

        What is wrong is returned: an exception that comes out of a worker has its traceback for a message.
        """
        image = index if index >= 0 else ~index
        try:
            if self.level is not None:
                return index, plain_view(self.sources[image], self.level, cache=self.cache)
            return index, read_view(self.sources[image], size=self.sizes[image], cache=self.cache)
        except (ValueError, OSError) as error:
            return index, f"{self.names[image]}: {error}"
