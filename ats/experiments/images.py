"""Your own images: what a manifest says of each is learned, a class, several labels or a number (docs/images.md)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ats.datasets.manifest import Manifest, Row, read_manifest
from ats.experiments.augmentation import ImageConfig
from ats.experiments.build import stacked
from ats.experiments.config import LESS_NOISE, SHORT_EPOCHS, ExperimentConfig, ModelConfig, OptimConfig, check_least
from ats.experiments.experiment import Experiment, ExperimentData, Loaded
from ats.experiments.image_store import ImageStore
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
    storage: Literal["auto", "memory", "disk"] = "auto"
    """Keep images in memory, or read views and patches from their files; auto: in memory up to 4 GiB a split."""
    cache: Path | None = None
    """Folder that keeps the views of images on disk from run to run. Default: a run keeps them in memory."""
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
    """What a manifest lists: kept in memory as it is stored, or read from its files."""

    on_disk: ClassVar[bool] = True

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._stores: dict[str, ImageStore] = {}

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

    def store(self, name: str) -> ImageStore:
        """The images of a split that can be read."""
        if name not in self._stores:
            store = ImageStore(self.splits.manifest, self.splits.rows(name), self.config, self.options, name)
            self.splits.check_classes(store.rows, name)
            self._stores[name] = store
        return self._stores[name]

    def labels(self, name: str) -> Tensor:
        return self.splits.truth.values(self.store(name).rows)

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        _, image, label = self.load(name, indices, epoch)
        if not isinstance(image, Tensor):
            raise ValueError(f"the {name} images are on disk or differ in size, and make no tensor; see load")
        return image, label

    def load(self, name: str, indices: Tensor, epoch: int | None = None) -> Loaded:
        """Images of a split, sources where they are on disk, with their views and labels, on the indices' device."""
        store, device, chosen = self.store(name), indices.device, indices.tolist()
        images, views = store.batch(chosen, epoch)
        in_memory = [image.to(device) for image in images if isinstance(image, Tensor)]
        labels = self.labels(name)[indices.cpu()].to(device)
        return _on(stacked(views), device), stacked(in_memory) if in_memory else images, labels

    def masks(self, name: str, indices: Tensor) -> Any:
        return _on(self.store(name).mask(indices.tolist()), indices.device)


def _on(maps: Tensor | list[Tensor] | None, device: torch.device) -> Any:
    """Maps on a device."""
    return [each.to(device) for each in maps] if isinstance(maps, list) else None if maps is None else maps.to(device)


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
