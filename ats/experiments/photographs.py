"""What experiments on labelled photographs share: images in memory, changed at random in training."""

from abc import abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ats.datasets.image_dataset import Finding, ImageDataset, Region
from ats.experiments.augmentation import ImageConfig, apply_change, draw_change
from ats.experiments.config import ExperimentConfig
from ats.experiments.experiment import ExperimentData

ImageOptions = TypeVar("ImageOptions", bound=ImageConfig)


class ImageData(ExperimentData[ImageOptions]):
    """Labelled photographs, decoded once and kept as bytes in memory. There are none for validation."""

    on_disk: ClassVar[bool] = True
    knows_targets: ClassVar[bool] = True

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._sets: dict[str, ImageDataset] = {}

    @property
    def source(self) -> str:
        return self.split("train").source

    @property
    def classes(self) -> tuple[str, ...]:
        return self.split("train").classes

    @abstractmethod
    def read_splits(self) -> dict[str, ImageDataset]:
        """The images of "train" and "test"."""

    def change(self, image: Tensor, label: int, epoch: int, index: int) -> tuple[Tensor, int]:
        """What else becomes of a training image in an epoch, and its label then."""
        return image, label

    def targets(self, index: int) -> tuple[Region, ...]:
        return self.split("test").examples[index].targets

    def findings(self, index: int) -> tuple[Finding, ...]:
        example = self.split("test").examples[index]
        return tuple(Finding(region, self.says(region, example.label)) for region in example.regions)

    def says(self, region: Region, label: int) -> int | None:
        """The class that a region of an image speaks for; by default a target for its image's label."""
        return label if region.target else None

    def split(self, name: str) -> ImageDataset:
        """The images of a split."""
        if not self._sets:
            self._sets = self._checked_splits()
        return self._sets[name]

    def labels(self, name: str) -> Tensor:
        return self.split(name).labels

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        images = self.split(name)
        made, labels = [], []
        for index in indices.tolist():
            image, label = images.image(index).to(indices.device), images.label(index)
            if epoch is not None:
                image = apply_change(image, draw_change(self.options, self.config.seed, epoch, index))
                image, label = self.change(image, label, epoch, index)
            made.append(image)
            labels.append(label)
        return torch.stack(made), torch.tensor(labels, device=indices.device)

    def _checked_splits(self) -> dict[str, ImageDataset]:
        splits = self.read_splits()
        found, expected = len(splits["train"].classes), self.options.n_classes
        if found != expected:
            folder = self.options.find_folder()
            raise ValueError(f"{folder} has {found} classes, but the model is configured for {expected}")
        return splits | {"validation": splits["train"].subset([])}
