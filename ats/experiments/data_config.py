"""What the experiments' data are made of, as dataclasses, and where they lie. Each field is a command's option."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ats.datasets.image_files import default_folder


def check_least(values: Any, section: str, least: int, *names: str) -> None:
    """Raise ValueError where one of the options `names` of a section is less than `least`."""
    for name in names:
        if (value := getattr(values, name)) < least:
            raise ValueError(f"{section}.{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class MegapixelMNISTConfig:
    """Megapixel MNIST."""

    experiment: ClassVar[str] = "megapixel-mnist"
    n_classes: ClassVar[int] = 10
    channels: ClassVar[int] = 1

    digits: Literal["bundled", "full"] = "full"
    """The 6,000 digits that ship with the package, or all of MNIST."""
    folder: Path | None = None
    """Folder with MNIST's IDX files, for digits=full. Default: $ATS_DATA/mnist, else a cache; downloaded if missing."""
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


@dataclass(frozen=True)
class ImageConfig:
    """What data sets of real images share: where they are, and how training images are changed at random."""

    channels: ClassVar[int] = 3

    folder: Path | None = None
    """Folder of the data set, real or written by `ats synthesise`. Default: the experiment's folder in $ATS_DATA."""
    contrast: float = 0.2
    """Training images are multiplied with 1 ± this."""
    brightness: float = 0.1
    """Training images are shifted by ± this share of white."""
    tint: float = 0.0
    """Each colour of training images is shifted by ± this share of white."""
    translation: int = 0
    """Training images are moved by up to this many pixels along both axes; black moves in."""
    zoom: float = 1.0
    """Training images are enlarged about their middle, by a factor between 1 / this and this."""
    stretch: float = 1.0
    """Height and width of training images are enlarged apart from each other, by factors between 1 / this and this."""
    symmetries: bool = False
    """Turn and mirror training images: all 8 symmetries of a square."""
    probability: float = 0.8
    """Of changing an image's colours, and of moving and enlarging it."""

    def __post_init__(self) -> None:
        """Refuse values that no change can have."""
        check_least(self, "data", 0, "contrast", "brightness", "tint", "translation")
        check_least(self, "data", 1, "zoom", "stretch")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"data.probability must be in [0, 1], got {self.probability}")


@dataclass(frozen=True)
class ColonCancerConfig(ImageConfig):
    """Colon cancer: does an image show an epithelial nucleus?"""

    experiment: ClassVar[str] = "colon-cancer"
    n_classes: ClassVar[int] = 2

    folds: int = 10
    """Of a stratified partition: the run with seed s tests on fold s mod FOLDS of partition s // FOLDS, and trains on
    the others."""

    def __post_init__(self) -> None:
        """Refuse a partition that leaves nothing to train on."""
        super().__post_init__()
        check_least(self, "data", 2, "folds")


@dataclass(frozen=True)
class SpeedLimitsConfig(ImageConfig):
    """Speed limits: which sign, if any, does a photograph of a street show?"""

    experiment: ClassVar[str] = "speed-limits"

    source: Literal["auto", "swedish", "german"] = "auto"
    """Swedish Traffic Signs, the paper's, or the German Traffic Sign Detection Benchmark; auto: whichever is there."""
    limits: tuple[int, ...] = ()
    """Limits to tell apart, in km/h. Default: 30, 50 and 70 on the German photographs, 50, 70 and 80 on the Swedish."""
    other_signs_are_none: bool = False
    """Take photographs that show other signs only as ones without a limit, in place of leaving them out."""
    translation: int = 100
    drawn_limits: float = 0.0
    """Share of the photographs without a limit into which, in each epoch anew, the training draws one to eight signs of
    a limit, which is then their label: a few hundred streets are soon learned by heart if each keeps its label."""
    drawn_patches: int = 0
    """Patches with drawn limits on which features learn to read beforehand; the training leaves them as they are then,
    and learns where to look; in steps of 48, the last one full. 0: features learn from the photographs. A CNN has no
    features of patches."""

    def __post_init__(self) -> None:
        """Refuse values that no change can have."""
        super().__post_init__()
        check_least(self, "data", 0, "drawn_patches")
        if not 0 <= self.drawn_limits < 1:
            raise ValueError(f"data.drawn_limits must be at least 0 and below 1, got {self.drawn_limits}")

    @property
    def n_classes(self) -> int:
        """The limits, and none."""
        return 1 + (len(self.limits) or 3)


DataConfig = MegapixelMNISTConfig | ColonCancerConfig | SpeedLimitsConfig
DATA_CONFIGS: dict[str, type[Any]] = {
    config.experiment: config for config in (MegapixelMNISTConfig, ColonCancerConfig, SpeedLimitsConfig)
}


def data_folder(data: DataConfig) -> Path:
    """Where an experiment's data are; for MNIST, where they are to be put if they are nowhere.

    Raises:
        FileNotFoundError: nobody said where images are that cannot be downloaded.
    """
    if data.folder is not None:
        return data.folder
    if not isinstance(data, MegapixelMNISTConfig):
        return default_folder(data.experiment)
    if "ATS_DATA" in os.environ:
        return Path(os.environ["ATS_DATA"]) / "mnist"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch-ats" / "mnist"
