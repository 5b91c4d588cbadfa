"""An experiment as small as one can be: is the bright square of an image on a dark or on a light ground?

All of it is here: options, data, networks and a preset. `register(TOY)` is what else it takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ats.experiments.config import DataConfig, ExperimentConfig, ModelConfig, OptimConfig, TrainerConfig
from ats.experiments.experiment import Experiment, ExperimentData
from ats.models.networks import Networks

CELL = 4


def attention_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, CELL, CELL), nn.ReLU(), nn.Conv2d(4, 1, 1))


def feature_network(*, normalised: bool = True) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.LayerNorm(8)] if normalised else []))


@dataclass(frozen=True)
class ToyConfig(DataConfig):
    """Squares."""

    experiment: ClassVar[str] = "toy"
    networks: ClassVar[Mapping[str, Networks]] = {
        "modern": Networks(attention_network, feature_network, 8, stride=CELL)
    }

    side: int = 32
    """Pixels a side of an image."""

    @property
    def channels(self) -> int:
        return 1

    @property
    def n_classes(self) -> int:
        return 2


class ToyData(ExperimentData[ToyConfig]):
    """Images that a generator makes from their number."""

    @property
    def source(self) -> str:
        return "toy squares"

    @property
    def classes(self) -> tuple[str, ...]:
        return "dark", "light"

    def labels(self, name: str) -> Tensor:
        return torch.arange({"train": 16, "validation": 0, "test": 6}[name]) % 2

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        labels, side = self.labels(name)[indices], self.options.side
        images = (60 + 100 * labels).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, side, side)
        for image, index in zip(images, indices.tolist(), strict=True):
            top, left = 4 * index % (side - 8), 7 * index % (side - 8)
            image[:, top : top + 8, left : left + 8] = 255
        return images, labels


PRESETS = {
    "quick": ExperimentConfig(
        preset="quick",
        data=ToyConfig(),
        model=ModelConfig(n_patches=3, patch_size=8, view_scale=0.5),
        optim=OptimConfig(epochs=2, batch_size=8, learning_rate=1e-2),
        trainer=TrainerConfig(accelerator="cpu", devices="1"),
    )
}

TOY = Experiment(ToyConfig, ToyData, PRESETS, image_size=(32, 32))
