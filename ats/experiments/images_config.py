"""The options of `ats train images`, and what of them only the manifest says."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from ats.datasets.manifest import Manifest, Row, read_manifest
from ats.experiments.augmentation import ImageConfig
from ats.experiments.config import ModelConfig, check_least
from ats.experiments.image_kinds import dtype_name
from ats.experiments.manifest_splits import read_truth, split_rows
from ats.experiments.objectives import Classes, Labels, Objective, Task, Value
from ats.models.images import image_networks
from ats.models.networks import Networks
from ats.sources import ImageSource, open_image
from ats.sources.image_source import DTYPES


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
    workers: int = 0
    """Processes that read the next views of images on disk while a step is computed. Without a cache, a run then keeps
    no views in memory, and reads them again in each epoch."""
    tissue: bool = False
    """Look at tissue alone, by its colour: for slides, whose background is pale (`ats.tissue_mask`)."""
    mean: tuple[float, ...] = ()
    """Mean of the images, by channel, where a byte of 255 is 1 and other numbers are in their own unit: networks see
    (x − mean) / std. Default: 0.5, of bytes."""
    std: tuple[float, ...] = ()
    """As mean. Default: 0.25, of bytes."""
    bands: int = 0
    """Channels of an image. Default: those of the first one."""
    dtype: str = ""
    """Numbers of an image: uint8 (bytes), uint16, float32, … Default: those of the first one."""
    centre: float = 0.0
    """task value: what the model starts from. Default: the mean of the training images' values."""
    spread: float = 0.0
    """task value: the unit in which it errs. Default: the standard deviation of the training images' values."""

    def __post_init__(self) -> None:
        """Refuse what no data can be."""
        super().__post_init__()
        check_least(self, "data", 2, "folds")
        check_least(self, "data", 0, "bands", "spread", "workers")
        if len(self.mean) != len(self.std):
            raise ValueError(f"data.mean and data.std need as many numbers, got {self.mean} and {self.std}")
        if any(not value > 0 for value in self.std):
            raise ValueError(f"data.std must be positive, got {self.std}")
        known = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        if self.dtype and self.dtype not in known:
            raise ValueError(f"data.dtype is {self.dtype!r}, expected one of {', '.join(known)}")
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
            raise FileNotFoundError(
                f"there is no manifest {place}; name a CSV file with --data.manifest or, of a run that was trained "
                "before, the folder where the file is now with --data-folder"
            )
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
        if not self.bands or not self.dtype:
            sources = (_open(row, manifest) for row in splits.rows("train"))
            first = next((each for each in sources if each is not None), None)
            if first is not None:
                found = replace(found, bands=self.bands or first.channels, dtype=self.dtype or dtype_name(first))
            found = replace(found, bands=found.bands or 3)
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


def _open(row: Row, manifest: Manifest) -> ImageSource | None:
    """The image, or None where it cannot be opened, which reading it says again."""
    try:
        return open_image(row.path, mpp=row.mpp)
    except (ValueError, OSError):
        return None
