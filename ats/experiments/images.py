"""Your own images: what a manifest says of each is learned, a class, several labels or a number (docs/images.md)."""

import dataclasses
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ats.datasets.image_files import is_synthetic
from ats.datasets.manifest import SPLITS
from ats.experiments.augmentation import PHOTOGRAPHS_OPTIM
from ats.experiments.build import stacked
from ats.experiments.config import LESS_NOISE, SHORT_EPOCHS, ExperimentConfig, ModelConfig
from ats.experiments.experiment import Batch, Experiment, ExperimentData, Loaded
from ats.experiments.image_store import ImageStore, report_unread
from ats.experiments.images_config import ImagesConfig
from ats.experiments.manifest_splits import Splits, read_truth, split_rows
from ats.experiments.view_loading import ViewBatch, as_batch


class ImagesData(ExperimentData[ImagesConfig]):
    """What a manifest lists: kept in memory as it is stored, or read from its files."""

    on_disk: ClassVar[bool] = True
    tells_of_overlap: ClassVar[bool] = True

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
        made_up = "synthetic " if is_synthetic(manifest.path.parent) else ""
        return f"{made_up}{manifest.path.name}, {len(manifest.rows)} images"

    @property
    def digest(self) -> str | None:
        return self.splits.manifest.digest()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.splits.truth.classes or ("value",)

    def check(self) -> None:
        self._read(*SPLITS)

    def store(self, name: str) -> ImageStore:
        """The images of a split that can be read."""
        self._read(name)
        return self._stores[name]

    def _read(self, *names: str) -> None:
        """Read splits that were not yet, and say at once what of them cannot be."""
        fresh = [name for name in names if name not in self._stores]
        if not fresh:
            return
        manifest, rows = self.splits.manifest, self.splits.rows
        stores = [ImageStore(manifest, rows(name), self.config, self.options, name) for name in fresh]
        report_unread([store for store in stores if store.rows or store.unread] or stores)
        for store in stores:
            self.splits.check_classes(store.rows, store.name)
        self._stores.update(zip(fresh, stores, strict=True))

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

    def reading(self, name: str) -> dict[str, Any]:
        store = self.store(name)
        if not self.options.workers or store.in_memory:
            return super().reading(name)
        return {
            "dataset": store.reader(),
            "collate_fn": as_batch,
            "num_workers": self.options.workers,
            "prefetch_factor": 1,  # the next batch of each worker: views may be large
            "persistent_workers": True,
            "generator": torch.Generator("cpu").manual_seed(self.config.seed),  # for seeds that nothing uses
        }

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        if not isinstance(batch, ViewBatch):
            return super().on_after_batch_transfer(batch, dataloader_idx)
        store = self.store(self.current_split())
        store.given = batch.by_image()
        try:
            return super().on_after_batch_transfer(batch.indices, dataloader_idx)
        finally:
            store.given = {}

    def masks(self, name: str, indices: Tensor, epoch: int | None = None) -> Any:
        return _on(self.store(name).mask(indices.tolist(), epoch), indices.device)


def _on(maps: Tensor | list[Tensor] | None, device: torch.device) -> Any:
    """Maps on a device."""
    return [each.to(device) for each in maps] if isinstance(maps, list) else None if maps is None else maps.to(device)


_MODEL = ModelConfig(n_patches=10, patch_size=64, view_scale=0.2, grid_step=64, **LESS_NOISE)
_OPTIM = replace(PHOTOGRAPHS_OPTIM, epochs=100, batch_size=8, draws=2, entropy_weight=1e-3)
_MODERN = ExperimentConfig(preset="modern", data=ImagesConfig(), model=_MODEL, optim=_OPTIM, trainer=SHORT_EPOCHS)
PRESETS = {
    "modern": _MODERN,
    "quick": dataclasses.replace(_MODERN, preset="quick", optim=replace(_OPTIM, epochs=30)),
}

IMAGES = Experiment(ImagesConfig, ImagesData, PRESETS, (1000, 1000))
