"""What an experiment is: its options, its data for Lightning, its presets and, where the paper has one, its table.

Whatever differs between experiments is asked of these classes; `registry` says which experiments there are.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ats.datasets.image_dataset import Finding, Region
from ats.experiments.build import make_view
from ats.experiments.config import DataConfig, ExperimentConfig
from ats.experiments.samplers import EachOnce, Indices, read_and_counted
from ats.experiments.tables import Table

Options = TypeVar("Options", bound=DataConfig)

if TYPE_CHECKING:
    from lightning import LightningDataModule as DataModule
else:
    try:
        from lightning import LightningDataModule as DataModule
    except ModuleNotFoundError:  # presets, networks and data are of use without what trains

        class DataModule:
            """Stands in for Lightning's."""


Loaded = tuple[Any, Any, Tensor]
"""View, image and label of a `Batch`."""


class Batch(NamedTuple):
    """What a step takes: tensors or, where images differ in size or are on disk, lists for view, image and mask.

    Attributes:
        view: (B, C, h, w), or a list of (C, h, w).
        image: (B, C, H, W), or a list of tensors (C, H, W) and sources.
        label: (B,) classes, or (B, …) what else is true of an image.
        mask: (B, gh, gw) bool, or a list of (gh, gw), True where a cell may be drawn; None: everywhere.
    """

    view: Any
    image: Any
    label: Tensor
    mask: Any = None


class ExperimentData(DataModule, Generic[Options]):
    """An experiment's data for Lightning: batches (view, image, label) of the splits "train", "validation" and "test".

    Loaders yield indices; images are made, on the device, once a batch is there.
    """

    on_disk: ClassVar[bool] = False
    """Images are files, so that the same options may mean others in another folder, or tomorrow."""
    tells_of_overlap: ClassVar[bool] = False
    """It says of its images what `ats.nn.OverlapWarning` says, before a training begins."""
    knows_targets: ClassVar[bool] = False
    """It is known of test images where the evidence for their label is."""
    class_of_nothing: ClassVar[int | None] = 0
    """The class of an image in which nothing is to be found; None: there is no such class, and one can only guess."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config
        self.options = cast("Options", config.data)

    @property
    @abstractmethod
    def source(self) -> str:
        """What the images are, for reports."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The classes' names; a label is an index into them."""

    @abstractmethod
    def labels(self, name: str) -> Tensor:
        """Labels (n,) int64 of a split's images; (n, C) float where the objective is no class."""

    @abstractmethod
    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) uint8 of a split and their labels (B,) int64, on the indices' device; as an epoch changes
        them, if one is given."""

    def check(self) -> None:
        """Read what a training reads, all splits of it, before it begins.

        Raises:
            ValueError: what is wrong, all of it where it is several files.
            OSError: data that are not there.
        """
        self.labels("train")

    @property
    def digest(self) -> str | None:
        """Text that changes when the images, or what is said of them, do; None: their source and number are enough."""
        return None

    def targets(self, index: int) -> tuple[Region, ...]:
        """Where the evidence for the label of a test image is, if that is known."""
        return ()

    def findings(self, index: int) -> tuple[Finding, ...]:
        """Everything in a test image that attention is to tell apart, if that is known: targets and what is none.

        `ats study attention` ranks the ones against the others, and reads them perfectly.
        """
        return ()

    def shown_image(self) -> int:
        """The test image that figures show: the first that is not of class 0, which often stands for nothing there."""
        return int(self.labels("test").nonzero()[0])

    def shown_region(self, image_size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns that figures show of an image of this size."""
        return slice(0, image_size[0]), slice(0, image_size[1])

    def teaching_batch(self, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Patches (count, C, ph, pw) uint8 and labels (count,), for features to learn on where `taught_patches` are
        asked for."""
        raise NotImplementedError(f"{type(self).__name__} has no patches to teach features on")

    def class_counts(self) -> Tensor:
        """Training images of each class, (classes,) float64: as many as an epoch is expected to have."""
        return torch.bincount(self.labels("train"), minlength=self.config.data.n_classes).double()

    def load(self, name: str, indices: Tensor, epoch: int | None = None) -> Loaded:
        """Images of a split with their views and labels, on the indices' device."""
        image, label = self.examples(name, indices, epoch)
        return make_view(self.config, image), image, label

    def masks(self, name: str, indices: Tensor, epoch: int | None = None) -> Any:
        """Where attention may look in images of a split, as in a `Batch`, on the indices' device, as an epoch turns
        them, if one is given; None: everywhere."""
        return None

    def class_weights(self) -> Tensor:
        """The inverse of the classes' shares of the training images, (classes,), scaled to be 1 for equal shares; of
        labels those of their absence and presence, (2, labels).

        Raises:
            ValueError: a class has no training image, or the objective has no classes.
        """
        truth, objective = self.labels("train"), self.config.data.objective
        counts = self.class_counts() if truth.ndim == 1 else truth.double().sum(0)
        return objective.class_weights(truth, self.config.data.n_classes, counts)

    def stages(self) -> list[tuple[str, int]]:
        """Parts of the training whose steps take unlike times, by name, and the steps of each."""
        optim = self.config.optim
        return [("all of it", optim.updates or optim.epochs * self.steps_an_epoch())]

    def steps_an_epoch(self) -> int:
        """Steps that an epoch has on one device."""
        return max(1, len(self.labels("train")) // self.config.optim.batch_size)

    def alone(self, stage: str, images: int) -> ExperimentConfig:
        """A run of one stage alone, of `images` images an epoch where there are as many as anyone wants."""
        return self.config

    def lengthened(self, times: float) -> ExperimentConfig:
        """The run with a training `times` as long, or short, in the same stages."""
        optim = self.config.optim
        length = {
            name: max(1, round(times * value)) for name in ("epochs", "updates") if (value := getattr(optim, name))
        }
        return replace(self.config, optim=replace(optim, **length))

    def train_dataloader(self) -> DataLoader[int]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[int] | list[DataLoader[int]]:
        return self._loader("validation") if len(self.labels("validation")) else []

    def test_dataloader(self) -> DataLoader[int]:
        return self._loader("test")

    def reading(self, name: str) -> dict[str, Any]:
        """What a split's loader goes through, as the arguments of `DataLoader`: indices alone, unless something of the
        images is to be there before a step."""
        return {"dataset": Indices(len(self.labels(name)))}

    def _loader(self, name: str, *, shuffle: bool = False) -> DataLoader[int]:
        # The order depends on nothing but the seed and the epoch, so that a resumed run sees the same one.
        indices, reading = Indices(len(self.labels(name))), self.reading(name)
        trainer = self.trainer
        processes, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        sampler: DistributedSampler[int] | EachOnce = EachOnce(len(indices), processes, rank)
        if shuffle:
            sampler = DistributedSampler(indices, processes, rank, shuffle=True, seed=self.config.seed)
        return DataLoader(
            **reading,
            batch_size=self.config.optim.batch_size,
            sampler=sampler,
            drop_last=shuffle and len(sampler) > self.config.optim.batch_size,
        )

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Batch:
        trainer, name = self.trainer, self.current_split()
        assert trainer is not None  # Lightning calls this within a trainer only
        if name != "train":
            return self._evaluated(name, batch)
        epoch = trainer.current_epoch
        return Batch(*self.load("train", batch, epoch=epoch), self.masks("train", batch, epoch=epoch))

    def current_split(self) -> str:
        """Whose batches Lightning's trainer goes through right now."""
        trainer = self.trainer
        assert trainer is not None
        if trainer.testing:
            return "test"
        return "validation" if trainer.validating or trainer.sanity_checking else "train"

    def _evaluated(self, name: str, indices: Tensor) -> Batch:
        indices, counted = read_and_counted(indices)
        view, image, label = self.load(name, indices)
        label = self.config.data.objective.uncounted(label, counted)
        return Batch(view, image, label, self.masks(name, indices))


@dataclass(frozen=True)
class Experiment:
    """A data set, what is learned from it, and by which settings.

    Args:
        options: what its data are made of, the experiment's name and its networks.
        data: for Lightning.
        presets: complete configurations by name.
        image_size: pixels (H, W) of an image as published, which costs are measured on.
        table: of the paper or like them.
        more: other tables of the same kind of data.
    """

    options: type[DataConfig]
    data: Callable[[ExperimentConfig], ExperimentData]
    presets: Mapping[str, ExperimentConfig]
    image_size: tuple[int, int]
    table: Table | None = None
    more: tuple[Table, ...] = ()

    @property
    def name(self) -> str:
        """On the command line, in folders' names and in files."""
        return self.options.experiment
