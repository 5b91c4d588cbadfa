"""An experiment's data for Lightning: loaders of indices; images are made, on the device, once a batch is there."""

from abc import abstractmethod

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ats.datasets.megapixel_mnist import MegapixelMNIST
from ats.datasets.mnist import Digits, fetch_mnist, load_digits
from ats.experiments.build import normalisation, view_size
from ats.experiments.config import ExperimentConfig
from ats.experiments.data_config import MegapixelMNISTConfig, data_folder
from ats.functional import area_downsample

Batch = tuple[Tensor, Tensor, Tensor]  # view (B, C, h, w), image (B, C, H, W) uint8, label (B,)


class ExperimentData(L.LightningDataModule):
    """Batches (view, image, label) of the splits "train", "validation" and "test"."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config

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
        """Labels (n,) int64 of a split's images."""

    @abstractmethod
    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) uint8 of a split and their labels (B,) int64, on the indices' device; as an epoch changes
        them, if one is given."""

    def class_counts(self) -> Tensor:
        """Training images of each class, (classes,) float64: as many as an epoch is expected to have."""
        return torch.bincount(self.labels("train"), minlength=self.config.data.n_classes).double()

    def load(self, name: str, indices: Tensor, epoch: int | None = None) -> Batch:
        """Images of a split with their views and labels, on the indices' device."""
        image, label = self.examples(name, indices, epoch)
        size = view_size(self.config, (image.shape[2], image.shape[3]))
        mean, std = normalisation(self.config)
        view = image if size is None else area_downsample(image, size, mean=mean, std=std)
        return view, image, label

    def class_weights(self) -> Tensor:
        """The inverse of the classes' shares of the training images, (classes,), scaled to be 1 for equal shares.

        Raises:
            ValueError: a class has no training image.
        """
        counts = self.class_counts()
        if bool((counts == 0).any()):
            raise ValueError(f"training images by class are {counts.tolist()}: a class without any cannot be learned")
        return counts.sum() / (counts * len(counts))

    def train_dataloader(self) -> DataLoader[int]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[int] | list[DataLoader[int]]:
        return self._loader("validation") if len(self.labels("validation")) else []

    def test_dataloader(self) -> DataLoader[int]:
        return self._loader("test")

    def _loader(self, name: str, *, shuffle: bool = False) -> DataLoader[int]:
        # The order depends on nothing but the seed and the epoch, so that a resumed run sees the same one.
        indices = range(len(self.labels(name)))
        trainer = self.trainer
        sampler: DistributedSampler[int] = DistributedSampler(
            indices,  # type: ignore[arg-type]
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            shuffle=shuffle,
            seed=self.config.seed,
        )
        return DataLoader(
            indices,  # type: ignore[arg-type]
            batch_size=self.config.optim.batch_size,
            sampler=sampler,
            drop_last=shuffle and len(sampler) > self.config.optim.batch_size,
        )

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Batch:
        trainer = self.trainer
        assert trainer is not None  # Lightning calls this within a trainer only
        if trainer.testing:
            return self.load("test", batch)
        if trainer.validating or trainer.sanity_checking:
            return self.load("validation", batch)
        return self.load("train", batch, epoch=trainer.current_epoch)


class MegapixelMNISTData(ExperimentData):
    """Megapixel MNIST, rendered on the device. Images of full size are the same in each epoch."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        assert isinstance(config.data, MegapixelMNISTConfig)
        self.data = config.data
        self._digits: dict[str, Digits] = {}
        self._sets: dict[str, MegapixelMNIST] = {}
        self._smaller: tuple[int, MegapixelMNIST] | None = None  # those of one epoch

    @property
    def source(self) -> str:
        return "Megapixel MNIST" if self.data.digits == "full" else "Megapixel MNIST of the bundled digits"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.data.n_classes)))

    def prepare_data(self) -> None:
        if self.data.digits == "full":
            fetch_mnist(data_folder(self.data))

    def split(self, name: str) -> MegapixelMNIST:
        """The images of a split; those of "validation" are other images of the training digits."""
        if name not in self._sets:
            self._sets[name] = self._images(name, getattr(self.data, f"{name}_images"))
        return self._sets[name]

    def labels(self, name: str) -> Tensor:
        return self.split(name).labels

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        split = self.split(name) if name != "train" or epoch is None else self.trained_on(epoch)
        return split.render(indices, indices.device), split.labels[indices.cpu()].to(indices.device)

    def trained_on(self, epoch: int) -> MegapixelMNIST:
        """The images of an epoch: those of "train", or smaller ones that no other epoch has."""
        small, medium = self.data.small_epochs, self.data.medium_epochs
        if epoch >= small + medium:
            return self.split("train")
        if self._smaller is None or self._smaller[0] != epoch:
            count = self.data.train_images
            if epoch < small:
                images = self._images("small", count, shrink=3, less_noise=5, first=epoch * count)
            else:
                images = self._images("medium", count, shrink=2, first=(epoch - small) * count)
            self._smaller = epoch, images
        return self._smaller[1]

    def _images(
        self, split: str, count: int, *, shrink: int = 1, less_noise: int = 1, first: int = 0
    ) -> MegapixelMNIST:
        of = "test" if split == "test" else "train"
        if of not in self._digits:
            self._digits[of] = load_digits(of, data_folder(self.data) if self.data.digits == "full" else None)
        return MegapixelMNIST(
            self._digits[of],
            count,
            image_size=self.data.image_size // shrink,
            n_noise=self.data.n_noise // less_noise,
            seed=self.config.seed,
            split=split,
            first=first,
        )
