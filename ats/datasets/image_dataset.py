"""Images on disk with a label each, and where in them the evidence for it is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ats.datasets.image_files import read_image, read_size


@dataclass(frozen=True)
class Region:
    """A box, or with no area a point, in pixels of the full image; pixel i covers i to i + 1.

    Args:
        top, left, bottom, right: the box. A point has top = bottom and left = right.
        kind: what is there, e.g. "epithelial" or "speed-limit-50".
        target: whether it is what the label is about, and so what attention should be on.
    """

    top: float
    left: float
    bottom: float
    right: float
    kind: str
    target: bool = True

    @property
    def centre(self) -> tuple[float, float]:
        """Its middle as (y, x)."""
        return (self.top + self.bottom) / 2, (self.left + self.right) / 2

    @property
    def area(self) -> float:
        """Square pixels; 0 for a point."""
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True)
class Finding:
    """Something in an image that can be found, and what whoever reads a patch of it perfectly would say.

    Args:
        region: where it is; a `target`, or what may be taken for one.
        says: the class that it speaks for; None: nothing, e.g. noise.
    """

    region: Region
    says: int | None


@dataclass(frozen=True)
class Example:
    """One image.

    Args:
        name: for messages and reports, the file's name without its ending.
        path: the image file.
        label: index of its class.
        regions: the ground truth for attention, whether `target` or not.
    """

    name: str
    path: Path
    label: int
    regions: tuple[Region, ...] = ()

    @property
    def targets(self) -> tuple[Region, ...]:
        """The regions that the label is about."""
        return tuple(region for region in self.regions if region.target)


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled images of one size, decoded when asked for.

    Args:
        classes: names; a label is an index into them.
        examples: the images.
        source: where they are from, for reports, e.g. "GTSDB"; begins with "synthetic" where they were made up.
        cache: keep decoded images in memory, H·W·3 bytes each. Each process has its own.

    Raises:
        ValueError: a label that is no class.
    """

    def __init__(
        self, classes: Sequence[str], examples: Iterable[Example], source: str, *, cache: bool = False
    ) -> None:
        self.classes = tuple(classes)
        self.examples = tuple(examples)
        self.source = source
        for example in self.examples:
            if not 0 <= example.label < len(self.classes):
                raise ValueError(
                    f"{example.path}: label {example.label} is no class; there are {len(self.classes)}: "
                    f"{', '.join(self.classes)}"
                )
        self._cache: dict[Path, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image (3, H, W) uint8 and label."""
        return self.image(index), self.label(index)

    def image(self, index: int) -> Tensor:
        """The image (3, H, W) uint8, red, green, blue. A cached one is shared: copy it before changing it in place.

        Raises:
            ValueError: the file is damaged, cut short or no image.
            FileNotFoundError: it is gone.
        """
        path = self.examples[index].path
        if self._cache is None:
            return read_image(path)
        if path not in self._cache:
            self._cache[path] = read_image(path)
        return self._cache[path]

    def label(self, index: int) -> int:
        """The class of an image."""
        return self.examples[index].label

    @property
    def labels(self) -> Tensor:
        """The class of every image, (n,) int64."""
        return torch.tensor([example.label for example in self.examples], dtype=torch.int64, device="cpu")

    @property
    def class_counts(self) -> Tensor:
        """Images of every class, (len(classes),) int64."""
        return self.labels.bincount(minlength=len(self.classes))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of every image, in pixels."""
        if not self.examples:
            raise ValueError("a data set without images has no image size")
        return read_size(self.examples[0].path)

    def subset(self, indices: Iterable[int] | Tensor) -> "ImageDataset":
        """The images of `indices`, in that order, as a data set of their own; a cache is shared."""
        chosen = indices.tolist() if isinstance(indices, Tensor) else indices
        part = ImageDataset(self.classes, [self.examples[index] for index in chosen], self.source)
        part._cache = self._cache
        return part
