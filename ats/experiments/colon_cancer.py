"""Colon cancer: does an image of tissue show an epithelial nucleus? The paper's section 4.3 and Table 1."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ats.datasets.colon_cancer import colon_cancer_folds, load_colon_cancer
from ats.datasets.image_dataset import ImageDataset
from ats.experiments.augmentation import PHOTOGRAPHS_OPTIM, ImageConfig
from ats.experiments.config import LESS_NOISE, SHORT_EPOCHS, ExperimentConfig, ModelConfig, OptimConfig, check_least
from ats.experiments.experiment import Experiment
from ats.experiments.photographs import ImageData
from ats.experiments.tables import Row, Table, as_published, cnn_row, draws_row
from ats.models import colon_cancer
from ats.models.networks import Networks


@dataclass(frozen=True)
class ColonCancerConfig(ImageConfig):
    """Colon cancer: does an image show an epithelial nucleus?"""

    experiment: ClassVar[str] = "colon-cancer"
    networks: ClassVar[Mapping[str, Networks]] = colon_cancer.NETWORKS

    folds: int = 10
    """Parts of a stratified partition: the run with seed s tests on fold s mod FOLDS of partition s // FOLDS, and
    trains on the others."""

    def __post_init__(self) -> None:
        """Refuse a partition that leaves nothing to train on."""
        super().__post_init__()
        check_least(self, "data", 2, "folds")

    @property
    def n_classes(self) -> int:
        """Without and with."""
        return 2


class ColonCancerData(ImageData[ColonCancerConfig]):
    """All folds but one to train on, and that one to test on."""

    def read_splits(self) -> dict[str, ImageDataset]:
        images = load_colon_cancer(self.options.find_folder(), cache=True)
        partition, fold = divmod(self.config.seed, self.options.folds)
        train, test = colon_cancer_folds(images.labels, self.options.folds, seed=partition)[fold]
        return {"train": images.subset(train), "test": images.subset(test)}


_MODEL = ModelConfig(n_patches=10, patch_size=27, view_scale=0.2, grid_step=10)
_OPTIM = replace(PHOTOGRAPHS_OPTIM, epochs=300, batch_size=14, entropy_weight=1e-3)
_IMAGES = ColonCancerConfig(symmetries=True, translation=25, tint=0.05)
_QUIET = replace(_MODEL, **LESS_NOISE)
_MODERN = ExperimentConfig(preset="modern", data=_IMAGES, model=_QUIET, optim=_OPTIM, trainer=SHORT_EPOCHS)
PRESETS = {
    "paper": ExperimentConfig(
        preset="paper",
        data=ColonCancerConfig(),
        model=replace(_MODEL, networks="paper", feature_scale=1.0),
        optim=OptimConfig(updates=30_000, batch_size=5, entropy_weight=0.01),
        trainer=SHORT_EPOCHS,
    ),
    "modern": _MODERN,
    "quick": replace(
        _MODERN,
        preset="quick",
        data=replace(_IMAGES, folds=5),
        model=replace(_QUIET, grid_step=27),
        optim=replace(_OPTIM, epochs=120),
    ),
}


def _folds_note(config: ExperimentConfig, tested: int) -> str:
    data = config.data
    assert isinstance(data, ColonCancerConfig)
    return (
        f"The run with seed s tests on fold s of a stratified partition into {data.folds} "
        f"and trains on the rest; {tested} images were tested on in all."
    )


# An epoch that reads all of every image takes long: fewer of them, and smaller steps or networks.
_SHORTER = {"optim.epochs": 60, "optim.batch_size": 7}
_BAGS = {"optim.epochs": 20, "optim.batch_size": 2, "optim.learning_rate": 1e-3}  # as many steps from fewer images

TABLE = Table(
    "table1",
    "Colon cancer",
    PRESETS,
    (
        draws_row("U-10", "0.2/1", as_published(0.210, 0.031, 0.156, 0.006, 1.8, 19)),
        draws_row("U-50", "0.2/1", as_published(0.075, 0.000, 0.124, 0.010, 4.6, 24)),
        cnn_row(0.5, as_published(0.002, 0.000, 0.104, 0.009, 4.8, 65), _SHORTER),
        cnn_row(1, as_published(0.002, 0.000, 0.092, 0.012, 18.7, 250), _SHORTER),
        Row("Deep MIL", "1", {"method": "mil"}, as_published(0.007, 0.000, 0.093, 0.004, 48.5, 644), _BAGS),
        Row("Gated Deep MIL", "1", {"method": "gated-mil"}, quick=_BAGS),
        draws_row("ATS-10", "0.2/1", as_published(0.083, 0.019, 0.093, 0.014, 1.8, 21)),
        draws_row("ATS-50", "0.2/1", as_published(0.028, 0.002, 0.093, 0.019, 4.5, 26)),
    ),
    few=("U-10", "CNN 0.5", "Deep MIL", "ATS-10"),
    note=_folds_note,
    swept="ATS-10",
)

COLON_CANCER = Experiment(ColonCancerConfig, ColonCancerData, PRESETS, (500, 500), TABLE)
