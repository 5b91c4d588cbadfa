"""Gigapixel MNIST: which digit is three times in an image that no memory holds? For nested attention."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ats.datasets.gigapixel_mnist import DEMO, GigapixelMNIST
from ats.datasets.image_dataset import Finding, Region
from ats.datasets.megapixel_mnist import GLYPH
from ats.datasets.mnist import Digits
from ats.experiments.build import make_view
from ats.experiments.config import LESS_NOISE, ExperimentConfig, ModelConfig, OptimConfig, TrainerConfig, check_least
from ats.experiments.experiment import Experiment, ExperimentData, Loaded
from ats.experiments.levels import level_stride
from ats.experiments.mnist_options import MNISTConfig
from ats.models import gigapixel_mnist
from ats.models.networks import Networks

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class GigapixelMNISTConfig(MNISTConfig):
    """Gigapixel MNIST."""

    experiment: ClassVar[str] = "gigapixel-mnist"
    networks: ClassVar[Mapping[str, Networks]] = gigapixel_mnist.NETWORKS

    image_size: int = 32_768
    """Pixels a side."""
    n_places: int = 24
    """Places, squares a shade lighter than the rest, five of which are lighter still and have a digit each."""
    place_size: int = 1024
    """Pixels a side of a place."""
    place_noise: int = 40
    """Noise glyphs in each place."""
    n_noise: int | None = None
    """Noise glyphs elsewhere. Default: 20,000 in 32,768², in proportion to the area."""
    train_images: int = 1000
    """Images an epoch, new ones in each."""
    clear_epochs: int = 0
    """Epochs, at the start, on images without noise, in which digits are found at once."""
    rising_epochs: int = 0
    """Epochs, after those, in which noise rises to what it is in the end, everywhere in proportion."""
    validation_images: int = 0
    """Images, made of training digits, to validate on after each epoch; 0 for none."""
    test_images: int = 500
    """Images, made of test digits, that `ats evaluate` uses."""
    oracle: bool = False
    """Tell where the places with digits are: attention may look nowhere else, whatever it has learned. A bound."""

    def __post_init__(self) -> None:
        """Refuse values that no images can have."""
        check_least(self, "data", 1, "image_size", "n_places", "place_size", "train_images", "test_images")
        check_least(self, "data", 0, "place_noise", "clear_epochs", "rising_epochs", "validation_images")

    @property
    def variant(self) -> str:
        return "oracle" if self.oracle else ""

    def check_run(self, config: ExperimentConfig) -> None:
        """Refuse what would read whole images, and a training that never comes to images with all of the noise."""
        method = config.model.method
        if method not in ("ats", "uniform"):
            raise ValueError(
                f"model.method={method} reads whole images, which are too large here; choose ats or uniform"
            )
        before = self.clear_epochs + self.rising_epochs
        if before and not config.optim.updates and before >= config.optim.epochs:
            raise ValueError(
                f"data.clear_epochs={self.clear_epochs} and data.rising_epochs={self.rising_epochs} leave none of "
                f"optim.epochs={config.optim.epochs} for images with all of the noise; set them to less"
            )

    def noise_share(self, epoch: int) -> float:
        """The share of the noise that images of an epoch have."""
        return min(1.0, max(0, epoch + 1 - self.clear_epochs) / (self.rising_epochs + 1))

    def images(
        self, digits: Digits, count: int, split: Split, seed: int, first: int = 0, share: float = 1.0
    ) -> GigapixelMNIST:
        """Some of a split's images, with a share of the noise."""
        every = 20_000 * self.image_size**2 // 32_768**2 if self.n_noise is None else self.n_noise
        return GigapixelMNIST(
            digits,
            count,
            image_size=self.image_size,
            n_places=self.n_places,
            place_size=self.place_size,
            place_noise=round(share * self.place_noise),
            n_noise=round(share * every),
            seed=seed,
            split=split,
            first=first,
        )


class GigapixelMNISTData(ExperimentData[GigapixelMNISTConfig]):
    """Gigapixel MNIST, rendered box by box as it is read, in bytes as on disk. Each epoch has images of its own."""

    class_of_nothing: ClassVar[int | None] = None

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._digits: dict[str, Digits] = {}
        self._sets: dict[str, GigapixelMNIST] = {}
        self._epoch: tuple[int, GigapixelMNIST] | None = None

    @property
    def source(self) -> str:
        return self.options.called("Gigapixel MNIST")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.options.n_classes)))

    def prepare_data(self) -> None:
        self.options.fetch()

    def split(self, name: str) -> GigapixelMNIST:
        """The images of a split; those of "validation" are other images of the training digits."""
        if name not in self._sets:
            self._sets[name] = self._images(name, getattr(self.options, f"{name}_images"))
        return self._sets[name]

    def trained_on(self, epoch: int) -> GigapixelMNIST:
        """The images of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            count, share = self.options.train_images, self.options.noise_share(epoch)
            self._epoch = epoch, self._images("train", count, first=epoch * count, share=share)
        return self._epoch[1]

    def labels(self, name: str) -> Tensor:
        return self.split(name).labels

    def examples(self, name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor]:
        raise ValueError("images of Gigapixel MNIST are read box by box, and make no tensor; see load")

    def load(self, name: str, indices: Tensor, epoch: int | None = None) -> Loaded:
        """Images of a split as sources, with their views and labels on the indices' device."""
        images = self.split(name) if name != "train" or epoch is None else self.trained_on(epoch)
        sources = [images.image(index, dtype=torch.uint8) for index in indices.tolist()]
        views = make_view(self.config, sources)
        assert isinstance(views, Tensor)  # of images of one size
        return views.to(indices.device), sources, images.labels[indices.cpu()].to(indices.device)

    def masks(self, name: str, indices: Tensor, epoch: int | None = None) -> Tensor | None:
        """For an oracle, where cells touch a place with a digit, in cells of the last level (B, gh, gw)."""
        if not self.options.oracle:
            return None
        images = self.split(name) if name != "train" or epoch is None else self.trained_on(epoch)
        side, count = _mask_cells(self.config)
        first = torch.arange(count, device="cpu") * side
        found = []
        for index in indices.tolist():
            begin = torch.from_numpy(images.scene(index).places[: images.n_inhabited])[..., None]  # (5, 2, 1)
            touched = (first < begin + images.place_size) & (first + side > begin)  # (5, 2, cells)
            found.append((touched[:, 0, :, None] & touched[:, 1, None]).any(0))
        return torch.stack(found).to(indices.device)

    def _images(self, name: Split | str, count: int, *, first: int = 0, share: float = 1.0) -> GigapixelMNIST:
        of = "test" if name == "test" else "train"
        if of not in self._digits:
            self._digits[of] = self.options.load(of)
        return self.options.images(self._digits[of], count, name, self.config.seed, first, share)  # type: ignore[arg-type]

    def findings(self, index: int) -> tuple[Finding, ...]:
        """The digits, each of which speaks for its class, and the places that have none."""
        images = self.split("test")
        scene, labels = images.scene(index), self._digits["test"].labels
        found = []
        for glyph, (top, left) in zip(scene.glyph_ids, scene.corners[: images.n_inhabited].tolist(), strict=False):
            says = int(labels[int(glyph)])
            found.append(Finding(Region(top, left, top + GLYPH, left + GLYPH, f"digit {says}"), says))
        for top, left in scene.places[images.n_inhabited :].tolist():
            box = Region(top, left, top + images.place_size, left + images.place_size, "empty place", target=False)
            found.append(Finding(box, None))
        return tuple(found)

    def shown_image(self) -> int:
        """Any: all show digits."""
        return 0


def _mask_cells(config: ExperimentConfig) -> tuple[int, int]:
    """Pixels a side of what an oracle's mask says of one element, and how many of these a side of an image has."""
    model, side = config.model, config.data.image_size  # type: ignore[attr-defined]
    networks = config.data.networks_for(model)
    if not model.nested:
        cells = networks.view_size((side, side), model.view_scale)[0] // networks.stride
        return -(-side // cells), cells
    outer, inner = (level.scale * level_stride(level, networks) for level in (model.nested[0], model.nested[-1]))
    return inner, -(-side // outer) * (outer // inner)


_LEVELS = "128:10:4", "8:2:4"
_MODEL = ModelConfig(levels=_LEVELS, n_patches=20, patch_size=50, view_scale=1 / 128, **LESS_NOISE)
_OPTIM = OptimConfig(
    epochs=50,
    batch_size=16,
    learning_rate=5e-3,
    weight_decay=0.05,
    warmup=0.03,
    schedule="cosine",
    entropy_weight=1e-3,
)
_TRAINER = TrainerConfig(checkpoint_seconds=20.0)
_DEMO = GigapixelMNISTConfig(
    digits="bundled",
    **DEMO,
    train_images=1000,
    clear_epochs=12,
    rising_epochs=10,
)
PRESETS = {
    "modern": ExperimentConfig(
        preset="modern",
        data=GigapixelMNISTConfig(clear_epochs=10, rising_epochs=60),
        model=dataclasses.replace(_MODEL, levels=("128:10:8", "8:4:4"), n_patches=40),
        optim=dataclasses.replace(_OPTIM, epochs=150),
        trainer=_TRAINER,
    ),
    "quick": ExperimentConfig(
        preset="quick",
        data=dataclasses.replace(_DEMO, image_size=2048, train_images=500, clear_epochs=4, rising_epochs=4),
        model=_MODEL,
        optim=dataclasses.replace(_OPTIM, epochs=12),
        trainer=_TRAINER,
    ),
    "demo": ExperimentConfig(preset="demo", data=_DEMO, model=_MODEL, optim=_OPTIM, trainer=_TRAINER),
}

GIGAPIXEL_MNIST = Experiment(GigapixelMNISTConfig, GigapixelMNISTData, PRESETS, (32_768, 32_768))
