"""Colon cancer and speed limits for Lightning: photographs in memory, changed at random in training."""

import numpy as np
import torch
from torch import Tensor

from ats.datasets.colon_cancer import colon_cancer_folds, load_colon_cancer
from ats.datasets.image_dataset import ImageDataset
from ats.datasets.painted_signs import MOST, put_limit, within
from ats.datasets.speed_limits import load_speed_limits
from ats.experiments.augmentation import apply_change, draw_change
from ats.experiments.config import ExperimentConfig
from ats.experiments.data import ExperimentData, MegapixelMNISTData
from ats.experiments.data_config import ColonCancerConfig, ImageConfig, SpeedLimitsConfig, data_folder


class ImageData(ExperimentData):
    """Labelled photographs, decoded once and kept as bytes in memory. There are none for validation."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._sets: dict[str, ImageDataset] = {}

    @property
    def source(self) -> str:
        return self.split("train").source

    @property
    def classes(self) -> tuple[str, ...]:
        return self.split("train").classes

    def split(self, name: str) -> ImageDataset:
        """The images of a split."""
        if not self._sets:
            self._sets = _read_splits(self.config)
        return self._sets[name]

    def labels(self, name: str) -> Tensor:
        return self.split(name).labels

    def class_counts(self) -> Tensor:
        counts, data = super().class_counts(), self.config.data
        if isinstance(data, SpeedLimitsConfig):
            drawn = data.drawn_limits * counts[0]
            counts[0] -= drawn
            counts[1:] += drawn / (len(counts) - 1)
        return counts

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        images, data, seed = self.split(name), self.config.data, self.config.seed
        assert isinstance(data, ImageConfig)
        made, labels = [], []
        for index in indices.tolist():
            image, label = images.image(index).to(indices.device), images.label(index)
            if epoch is not None:
                image = apply_change(image, draw_change(data, seed, epoch, index))
                if isinstance(data, SpeedLimitsConfig) and label == 0:
                    image, label = self._with_limit(image, data, seed, epoch, index)
            made.append(image)
            labels.append(label)
        return torch.stack(made), torch.tensor(labels, device=indices.device)

    def _with_limit(
        self, image: Tensor, data: SpeedLimitsConfig, seed: int, epoch: int, index: int
    ) -> tuple[Tensor, int]:
        """A photograph without a limit, in a share of the epochs with one that is drawn into it; and its label."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index, 1])))
        if random.random() >= data.drawn_limits:
            return image, 0
        images = self.split("train")
        label = int(random.integers(1, len(images.classes)))
        for _ in range(int(random.integers(1, MOST, endpoint=True))):
            image = put_limit(image, random, int(images.classes[label]), within(images.source))
        return image, label


def _read_splits(config: ExperimentConfig) -> dict[str, ImageDataset]:
    data = config.data
    folder = data_folder(data)
    if isinstance(data, ColonCancerConfig):
        images = load_colon_cancer(folder, cache=True)
        partition, fold = divmod(config.seed, data.folds)
        train, test = colon_cancer_folds(images.labels, data.folds, seed=partition)[fold]
        splits = {"train": images.subset(train), "test": images.subset(test)}
    else:
        assert isinstance(data, SpeedLimitsConfig)
        splits = {
            name: load_speed_limits(
                folder,
                name,
                source=data.source,
                limits=data.limits or None,
                other_signs_are_none=data.other_signs_are_none,
                cache=True,
            )
            for name in ("train", "test")
        }
    classes = len(splits["train"].classes)
    if classes != data.n_classes:
        raise ValueError(f"{folder} has {classes} classes, but the model is configured for {data.n_classes}")
    return splits | {"validation": splits["train"].subset([])}


def experiment_data(config: ExperimentConfig) -> ExperimentData:
    """The data that a configuration names."""
    return ImageData(config) if isinstance(config.data, ImageConfig) else MegapixelMNISTData(config)
