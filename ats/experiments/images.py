"""Your own images: what a manifest says of each is learned, a class, several labels or a number (docs/images.md)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ats.datasets.manifest import Manifest, Row, read_manifest
from ats.experiments.augmentation import ImageConfig, apply_change, draw_change
from ats.experiments.config import LESS_NOISE, SHORT_EPOCHS, ExperimentConfig, ModelConfig, OptimConfig, check_least
from ats.experiments.console import say
from ats.experiments.experiment import Experiment, ExperimentData
from ats.experiments.manifest_splits import Splits, read_truth, split_rows
from ats.experiments.objectives import Classes, Labels, Objective, Task, Value
from ats.models.images import image_networks
from ats.models.networks import Networks
from ats.sources import ImageSource, open_image


@dataclass(frozen=True)
class ImagesConfig(ImageConfig):
    """Images of your own, as a manifest lists them: what is said of each is learned."""

    experiment: ClassVar[str] = "images"
    networks: ClassVar[Mapping[str, Networks]] = {"modern": image_networks(3, (0.5,) * 3, (0.25,) * 3)}

    manifest: Path | None = None
    """A CSV file with the columns path and label and, where wanted, split, group, mpp and mask (docs/images.md)."""
    folder: Path | None = None
    """Where the manifest and its images are now, if that is another folder than the manifest's."""
    task: Task = "classes"
    """What a label is: one of several classes; any number of labels, separated by ";"; or a value, a number."""
    classes: tuple[str, ...] = ()
    """The classes' names, or the labels', in the order wanted. Default: those of the manifest, sorted."""
    folds: int = 5
    """Without a column split: parts of a partition that keeps groups together and spreads labels evenly. The run with
    seed s tests on part s mod FOLDS of partition s // FOLDS, and trains on the others."""
    validation: bool = False
    """Without rows for validation in the manifest: keep one of FOLDS parts of the training images for it."""
    unreadable: Literal["stop", "skip"] = "stop"
    """Files that cannot be read are named; then stop, or leave them out."""
    mean: tuple[float, ...] = ()
    """Of the images, by channel, where a byte of 255 is 1 and other numbers are in their own unit: networks see (x −
    mean) / std. Default: 0.5, of bytes."""
    std: tuple[float, ...] = ()
    """As mean. Default: 0.25, of bytes."""
    bands: int = 0
    """Channels of an image. Default: those of the first one."""
    centre: float = 0.0
    """task value: what the model starts from. Default: the mean of the training images' values."""
    spread: float = 0.0
    """task value: the unit in which it errs. Default: the standard deviation of the training images' values."""

    def __post_init__(self) -> None:
        """Refuse what no data can be."""
        super().__post_init__()
        check_least(self, "data", 2, "folds")
        check_least(self, "data", 0, "bands", "spread")
        if len(self.mean) != len(self.std):
            raise ValueError(f"data.mean and data.std need as many numbers, got {self.mean} and {self.std}")
        if any(not value > 0 for value in self.std):
            raise ValueError(f"data.std must be positive, got {self.std}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"data.classes names one twice: {', '.join(self.classes)}")

    @property
    def n_classes(self) -> int:
        """Outputs: classes, labels, or the one value."""
        return 1 if self.task == "value" else len(self.classes) or len(read_truth(self.read(), self.task).classes)

    @property
    def channels(self) -> int:
        return self.bands or 3

    @property
    def objective(self) -> Objective:
        if self.task == "value":
            return Value(self.centre, self.spread or 1.0)
        return Classes() if self.task == "classes" else Labels()

    def read(self) -> Manifest:
        """The manifest.

        Raises:
            ValueError: none was named, or something is wrong with it.
            FileNotFoundError: it is not there.
        """
        if self.manifest is None:
            raise ValueError("ats train images needs --data.manifest FILE, a CSV file with the columns path and label")
        place = self.manifest if self.folder is None else self.folder / self.manifest.name
        if not place.exists():
            raise FileNotFoundError(f"there is no manifest {place}; name a CSV file with --data.manifest")
        return read_manifest(place)

    def resolved(self, seed: int) -> "ImagesConfig":
        """With classes, channels and, for a value, its unit."""
        manifest = self.read()
        splits = split_rows(manifest, read_truth(manifest, self.task, self.classes), self.folds, self.validation, seed)
        found = replace(self, classes=splits.truth.classes)
        if self.task == "value" and not self.spread:
            values = splits.truth.values(splits.rows("train")).double()
            spread = float(values.std(correction=0))
            if spread == 0:
                raise ValueError(f"{manifest.path}: all training images have the value {float(values[0])}")
            found = replace(found, centre=float(values.mean()), spread=spread)
        if not self.bands:
            sources = (_opened(row, manifest) for row in splits.rows("train"))
            found = replace(found, bands=next((each.channels for each in sources if each is not None), 3))
        return found

    def networks_for(self, model: ModelConfig) -> Networks:
        super().networks_for(model)  # there is one of that name
        channels = self.channels
        for name in ("mean", "std"):
            if getattr(self, name) and len(getattr(self, name)) != channels:
                raise ValueError(
                    f"data.{name} needs a number for each of {channels} channels, got {getattr(self, name)}"
                )
        return image_networks(channels, self.mean or (0.5,) * channels, self.std or (0.25,) * channels)


def _opened(row: Row, manifest: Manifest) -> ImageSource | None:
    """The image, or None where it cannot be opened, which reading it says again."""
    try:
        return open_image(row.path, mpp=row.mpp)
    except (ValueError, OSError):
        return None


class ImagesData(ExperimentData[ImagesConfig]):
    """What a manifest lists, decoded once and kept in memory as it is stored."""

    on_disk: ClassVar[bool] = True

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._images: dict[str, list[Tensor]] = {}
        self._rows: dict[str, tuple[Row, ...]] = {}

    @cached_property
    def splits(self) -> Splits:
        """Which images are for what."""
        data, manifest = self.options, self.options.read()
        truth = read_truth(manifest, data.task, data.classes)
        return split_rows(manifest, truth, data.folds, data.validation, self.config.seed)

    @property
    def source(self) -> str:
        manifest = self.splits.manifest
        return f"{manifest.path.name}, {len(manifest.rows)} images"

    @property
    def digest(self) -> str | None:
        return self.splits.manifest.digest()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.splits.truth.classes or ("value",)

    def rows(self, name: str) -> tuple[Row, ...]:
        """The rows of a split whose images can be read; they are read."""
        if name not in self._rows:
            self._read(name)
        return self._rows[name]

    def labels(self, name: str) -> Tensor:
        return self.splits.truth.values(self.rows(name))

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        truth = self.labels(name)
        made = []
        for index in indices.tolist():
            image = self._images[name][index].to(indices.device)
            if epoch is not None:
                image = apply_change(image, draw_change(self.options, self.config.seed, epoch, index))
            made.append(image)
        return torch.stack(made), truth[indices.cpu()].to(indices.device)

    def _read(self, name: str) -> None:
        """Decode a split's images.

        Raises:
            ValueError: files that cannot be read, if so asked; images that do not go together.
        """
        manifest, images, kept, unread = self.splits.manifest, [], [], []
        for row in self.splits.rows(name):
            try:
                source = open_image(row.path, mpp=row.mpp)
                image = source.read(0, 0, 0, source.levels[0].height, source.levels[0].width)
            except (ValueError, OSError) as error:
                unread.append(f"{manifest.where(row)}: {error}")
                continue
            images.append(self._fitted(image, row))
            kept.append(row)
        self._report(name, unread, len(kept))
        for row, image in zip(kept, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{manifest.where(row)}: {row.path} is {image.shape[1]}×{image.shape[2]} pixels, but "
                    f"{kept[0].path} is {images[0].shape[1]}×{images[0].shape[2]} (height × width); crop both alike"
                )
        self._images[name], self._rows[name] = images, tuple(kept)
        self.splits.check_classes(self._rows[name], name)

    def _report(self, name: str, unread: list[str], kept: int) -> None:
        if not unread:
            return
        few = "; ".join(unread[:10]) + (f"; and {len(unread) - 10} more" if len(unread) > 10 else "")
        if self.options.unreadable == "stop":
            raise ValueError(
                f"{len(unread)} of {kept + len(unread)} {name} images cannot be read: {few}. Mend them, or leave them "
                "out with --data.unreadable skip"
            )
        for line in unread:
            say(f"left out: {line}", stderr=True)

    def _fitted(self, image: Tensor, row: Row) -> Tensor:
        """An image with the channels and in the unit that the model takes."""
        data, where = self.options, self.splits.manifest.where(row)
        if image.shape[0] == 1 and data.channels == 3:
            image = image.expand(3, -1, -1)
        if image.shape[0] != data.channels:
            raise ValueError(
                f"{where}: {row.path} has {image.shape[0]} channels, expected {data.channels} as in the first image; "
                "convert it, or set --data.bands"
            )
        if image.dtype != torch.uint8:
            if not data.mean:
                raise ValueError(
                    f"{where}: {row.path} holds {image.dtype} and not bytes, whose range is not known; say with "
                    "--data.mean and --data.std, a number a channel, what its values are like"
                )
            if data.contrast or data.brightness or data.tint or data.zoom != 1 or data.stretch != 1:
                raise ValueError(
                    f"{where}: {row.path} holds {image.dtype}, and random colours and sizes are of bytes alone; "
                    "set --data.contrast 0 --data.brightness 0 --data.tint 0 --data.zoom 1 --data.stretch 1"
                )
        if data.channels != 3 and data.tint:
            raise ValueError(f"data.tint is for images of three colours, and these have {data.channels}; set it to 0")
        return image


_MODEL = ModelConfig(n_patches=10, patch_size=64, view_scale=0.2, grid_step=64, **LESS_NOISE)
_OPTIM = OptimConfig(
    epochs=100,
    batch_size=8,
    draws=2,
    learning_rate=3e-3,
    weight_decay=0.05,
    warmup=0.05,
    schedule="cosine",
    entropy_weight=1e-3,
    average=0.99,
)
_MODERN = ExperimentConfig(preset="modern", data=ImagesConfig(), model=_MODEL, optim=_OPTIM, trainer=SHORT_EPOCHS)
PRESETS = {
    "modern": _MODERN,
    "quick": dataclasses.replace(_MODERN, preset="quick", optim=replace(_OPTIM, epochs=30)),
}

IMAGES = Experiment(ImagesConfig, ImagesData, PRESETS, (1000, 1000))
