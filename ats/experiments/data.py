"""Megapixel MNIST for Lightning: loaders of indices; images are rendered, on the device, once a batch is there."""

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ats.datasets.megapixel_mnist import MegapixelMNIST
from ats.datasets.mnist import fetch_mnist, load_digits
from ats.experiments.config import ExperimentConfig, mnist_folder
from ats.functional import area_downsample

Batch = tuple[Tensor, Tensor, Tensor]  # view (B, 1, h, w), image (B, 1, H, W) uint8, label (B,)


class MegapixelMNISTData(L.LightningDataModule):
    """Batches (view, image, label) of the splits "train", "validation" and "test"."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__()
        self.config = config
        self._sets: dict[str, MegapixelMNIST] = {}

    def prepare_data(self) -> None:
        if self.config.data.digits == "full":
            fetch_mnist(mnist_folder(self.config.data))

    def split(self, name: str) -> MegapixelMNIST:
        """The images of a split; validation images are other images of the training digits."""
        if name not in self._sets:
            data = self.config.data
            folder = mnist_folder(data) if data.digits == "full" else None
            self._sets[name] = MegapixelMNIST(
                load_digits("test" if name == "test" else "train", folder),
                getattr(data, f"{name}_images"),
                image_size=data.image_size,
                n_noise=data.n_noise,
                seed=self.config.seed,
                split=name,
            )
        return self._sets[name]

    def train_dataloader(self) -> DataLoader[int]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[int] | list[DataLoader[int]]:
        return self._loader("validation") if self.config.data.validation_images else []

    def test_dataloader(self) -> DataLoader[int]:
        return self._loader("test")

    def _loader(self, name: str, *, shuffle: bool = False) -> DataLoader[int]:
        # The order depends on nothing but the seed and the epoch, so that a resumed run sees the same one.
        indices = range(len(self.split(name)))
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
        return self.load("validation" if trainer.validating or trainer.sanity_checking else "train", batch)

    def load(self, name: str, indices: Tensor) -> Batch:
        """Render images of a split, and their views, on the indices' device."""
        images = self.split(name)
        image = images.render(indices, indices.device)
        view = area_downsample(image, self.config.view_size)
        return view, image, images.labels[indices.cpu()].to(indices.device)
