"""Megapixel MNIST: which digit is three times in an image that is nearly all black?"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ats.datasets.image_dataset import Finding, Region
from ats.datasets.megapixel_mnist import GLYPH, MegapixelMNIST
from ats.datasets.mnist import Digits
from ats.experiments.config import LESS_NOISE, ExperimentConfig, ModelConfig, OptimConfig, check_least
from ats.experiments.experiment import Experiment, ExperimentData
from ats.experiments.mnist_options import MNISTConfig
from ats.experiments.tables import Row, Table, cnn_row, draws_row
from ats.models import megapixel_mnist
from ats.models.networks import Networks

_SIZES = {"small": (3, 5), "medium": (2, 1), "full size": (1, 1)}
"""By stage of a training: how many times a side is shorter, and how many times less noise there is."""


@dataclass(frozen=True)
class MegapixelMNISTConfig(MNISTConfig):
    """Megapixel MNIST."""

    experiment: ClassVar[str] = "megapixel-mnist"
    networks: ClassVar[Mapping[str, Networks]] = megapixel_mnist.NETWORKS

    image_size: int = 1500
    """Pixels a side."""
    n_noise: int = 50
    """Patches of noise an image."""
    train_images: int = 5000
    """Images to train on."""
    small_epochs: int = 0
    """Epochs, at the start, on as many other images, new ones in each, of a third of the size with a fifth of the
    noise, where digits are found sooner."""
    medium_epochs: int = 0
    """Epochs, after those, on as many other images, new ones in each, of half the size with all of the noise: what is
    noise is as hard to tell as at full size, and an epoch takes about half as long."""
    validation_images: int = 0
    """Images, made of training digits, to validate on after each epoch; 0 for none."""
    test_images: int = 1000
    """Images, made of test digits, that `ats evaluate` uses."""

    def __post_init__(self) -> None:
        """Refuse values that no images can have."""
        check_least(self, "data", 1, "train_images", "test_images")
        check_least(self, "data", 0, "n_noise", "validation_images", "small_epochs", "medium_epochs")

    def check_run(self, config: ExperimentConfig) -> None:
        """Refuse a training that ends before its smaller images do."""
        before = self.small_epochs + self.medium_epochs
        if before > config.optim.epochs and not config.optim.updates:
            raise ValueError(
                f"data.small_epochs={self.small_epochs} and data.medium_epochs={self.medium_epochs} are more than "
                f"optim.epochs={config.optim.epochs}; set them to less, or to 0 for none"
            )


class MegapixelMNISTData(ExperimentData[MegapixelMNISTConfig]):
    """Megapixel MNIST, rendered on the device. Images of full size are the same in each epoch."""

    class_of_nothing: ClassVar[int | None] = None

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._digits: dict[str, Digits] = {}
        self._sets: dict[str, MegapixelMNIST] = {}
        self._smaller: tuple[int, MegapixelMNIST] | None = None  # those of one epoch

    @property
    def source(self) -> str:
        return self.options.called("Megapixel MNIST")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.options.n_classes)))

    def prepare_data(self) -> None:
        self.options.fetch()

    def split(self, name: str) -> MegapixelMNIST:
        """The images of a split; those of "validation" are other images of the training digits."""
        if name not in self._sets:
            self._sets[name] = self._images(name, getattr(self.options, f"{name}_images"))
        return self._sets[name]

    def labels(self, name: str) -> Tensor:
        return self.split(name).labels

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        split = self.split(name) if name != "train" or epoch is None else self.trained_on(epoch)
        return split.render(indices, indices.device), split.labels[indices.cpu()].to(indices.device)

    def trained_on(self, epoch: int) -> MegapixelMNIST:
        """The images of an epoch: those of "train", or smaller ones that no other epoch has."""
        small, medium = self.options.small_epochs, self.options.medium_epochs
        if epoch >= small + medium:
            return self.split("train")
        if self._smaller is None or self._smaller[0] != epoch:
            count = self.options.train_images
            if epoch < small:
                images = self._images("small", count, *_SIZES["small"], first=epoch * count)
            else:
                images = self._images("medium", count, *_SIZES["medium"], first=(epoch - small) * count)
            self._smaller = epoch, images
        return self._smaller[1]

    def stages(self) -> list[tuple[str, int]]:
        before = self.options.small_epochs, self.options.medium_epochs
        epochs = dict(zip(_SIZES, (*before, self.config.optim.epochs - sum(before)), strict=True))
        return [(stage, count * self.steps_an_epoch()) for stage, count in epochs.items() if count > 0]

    def alone(self, stage: str, images: int) -> ExperimentConfig:
        shrink, less_noise = _SIZES[stage]
        size, noise = self.options.image_size // shrink, self.options.n_noise // less_noise
        changes: dict[str, Any] = {
            "image_size": size,
            "n_noise": noise,
            "train_images": images,
            "small_epochs": 0,
            "medium_epochs": 0,
        }
        return dataclasses.replace(self.config, data=dataclasses.replace(self.options, **changes))

    def lengthened(self, times: float) -> ExperimentConfig:
        """With as many epochs of fewer images each, or of more epochs of each kind."""
        options, optim = self.options, self.config.optim
        if times < 1:  # a few epochs could not be in the same stages
            images = max(optim.batch_size, round(times * options.train_images))
            return dataclasses.replace(self.config, data=dataclasses.replace(options, train_images=images))
        small, medium = round(times * options.small_epochs), round(times * options.medium_epochs)
        epochs = max(round(times * optim.epochs), small + medium)
        return dataclasses.replace(
            self.config,
            data=dataclasses.replace(options, small_epochs=small, medium_epochs=medium),
            optim=dataclasses.replace(optim, epochs=epochs),
        )

    def _images(
        self, split: str, count: int, shrink: int = 1, less_noise: int = 1, *, first: int = 0
    ) -> MegapixelMNIST:
        of = "test" if split == "test" else "train"
        if of not in self._digits:
            self._digits[of] = self.options.load(of)
        return MegapixelMNIST(
            self._digits[of],
            count,
            image_size=self.options.image_size // shrink,
            n_noise=self.options.n_noise // less_noise,
            seed=self.config.seed,
            split=split,
            first=first,
        )

    def findings(self, index: int) -> tuple[Finding, ...]:
        """The digits, each of which speaks for its class, and the noise."""
        images, found = self.split("test"), []
        for number, (glyph, place) in enumerate(zip(images.glyph_ids[index], images.places[index], strict=True)):
            digit = number < images.n_digits
            says = int(self._digits["test"].labels[glyph]) if digit else None
            top, left = map(int, place)
            kind = f"digit {says}" if digit else "noise"
            found.append(Finding(Region(top, left, top + GLYPH, left + GLYPH, kind, target=digit), says))
        return tuple(found)

    def shown_image(self) -> int:
        """Any: all show digits."""
        return 0

    def shown_region(self, image_size: tuple[int, int]) -> tuple[slice, slice]:
        """Half of a side of the first test image, where most of its digits are."""
        height, width = image_size
        images = self.split("test")
        digits = images.places[0, : images.n_digits].long()  # (D, 2)
        side = max(8 * GLYPH, height // 2)
        corners = (digits + GLYPH // 2 - side // 2).clamp(min=0, max=max(0, height - side))  # of a region around each
        inside = (digits >= corners[:, None]) & (digits + GLYPH <= corners[:, None] + side)  # (D, D, 2)
        top, left = corners[inside.all(-1).sum(-1).argmax()].tolist()
        return slice(top, min(top + side, height)), slice(left, min(left + side, width))


_MODEL = ModelConfig(**LESS_NOISE)
_RANKED = ModelConfig(networks="wide", evidence="peaks", **LESS_NOISE)
_OPTIM = OptimConfig(
    batch_size=32, learning_rate=5e-3, weight_decay=0.05, warmup=0.03, schedule="cosine", entropy_weight=1e-3
)
_WIDENING = dataclasses.replace(_OPTIM, batch_size=16, widening=2.0, restart=0.12)
PRESETS = {
    "paper": ExperimentConfig(
        preset="paper",
        data=MegapixelMNISTConfig(),
        model=ModelConfig(networks="paper", feature_scale=1.0),
    ),
    "modern": ExperimentConfig(
        preset="modern",
        data=MegapixelMNISTConfig(small_epochs=8, medium_epochs=92),
        model=_RANKED,
        optim=dataclasses.replace(_WIDENING, epochs=100),
    ),
    "quick": ExperimentConfig(
        preset="quick",
        data=MegapixelMNISTConfig(small_epochs=6, medium_epochs=58),
        model=_RANKED,
        optim=dataclasses.replace(_WIDENING, epochs=64),
    ),
    "view-300": ExperimentConfig(
        preset="view-300",
        data=MegapixelMNISTConfig(small_epochs=6, medium_epochs=58),
        model=dataclasses.replace(_RANKED, networks="modern", view_scale=0.2),
        optim=dataclasses.replace(_WIDENING, epochs=64),
    ),
    "demo": ExperimentConfig(
        preset="demo",
        data=MegapixelMNISTConfig(digits="bundled", image_size=500, n_noise=10, train_images=14_000, test_images=500),
        model=_MODEL,
        optim=dataclasses.replace(_OPTIM, epochs=3),
    ),
}

_PATCHES = (5, 10, 25, 50, 100)  # the paper's
_MANY: dict[str, Any] = {"model.evidence": "cells"}  # draws that need not be spared for other digits
_MEMORY: dict[str, Any] = {
    "optim.learning_rate": 1e-3
}  # of batches as large as the memory of a few cores allows: 2 GB an image

TABLE = Table(
    "mnist",
    "Megapixel MNIST",
    PRESETS,
    (
        draws_row("U-10", "0.12/1"),
        cnn_row(0.25, quick=_MEMORY | {"optim.batch_size": 8}),
        cnn_row(1, quick=_MEMORY | {"optim.batch_size": 2}),
        Row("Deep MIL", "1", {"method": "mil"}, quick=_MEMORY | {"optim.batch_size": 2}),
        *(draws_row(f"ATS-{n}", "0.12/1", quick=_MANY if n >= 25 else None) for n in _PATCHES),
    ),
    few=("ATS-10",),
    tested={"ATS-10": _PATCHES},
)

MEGAPIXEL_MNIST = Experiment(MegapixelMNISTConfig, MegapixelMNISTData, PRESETS, (1500, 1500), TABLE)
