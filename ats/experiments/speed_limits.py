"""Speed limits: which limit, if any, does a photograph of a street show? The paper's section 4.4 and Table 2."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ats.datasets.image_dataset import ImageDataset, Region
from ats.datasets.painted_signs import MOST, SIDES, put_limit, within
from ats.datasets.speed_limits import load_speed_limits
from ats.experiments.augmentation import PHOTOGRAPHS_OPTIM, Change, ImageConfig, apply_change, draw_change
from ats.experiments.config import LESS_NOISE, SHORT_EPOCHS, ExperimentConfig, ModelConfig, OptimConfig, check_least
from ats.experiments.experiment import Experiment
from ats.experiments.photographs import ImageData
from ats.experiments.tables import Row, Table, as_published, cnn_row, draws_row
from ats.models import speed_limits
from ats.models.networks import Networks

SIGNS = 0.75
"""Share of the patches that features are taught on that show a sign: with fewer, they learn what is one, and no digits
for long."""
OFF_CENTRE = 16
"""Pixels from such a patch's middle to the sign's, at most: about what the attention's grid makes of it."""


@dataclass(frozen=True)
class SpeedLimitsConfig(ImageConfig):
    """Speed limits: which sign, if any, does a photograph of a street show?"""

    experiment: ClassVar[str] = "speed-limits"
    networks: ClassVar[Mapping[str, Networks]] = speed_limits.NETWORKS

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

    @property
    def taught_patches(self) -> int:
        """Those with painted limits."""
        return self.drawn_patches

    def check_run(self, config: ExperimentConfig) -> None:
        """Refuse to tell features where patches lie that lie nowhere."""
        if self.drawn_patches and config.model.positions:
            raise ValueError(
                "data.drawn_patches teaches features from patches that lie nowhere, model.positions tells them where; "
                "set data.drawn_patches=0 or model.positions=False"
            )


class SpeedLimitsData(ImageData[SpeedLimitsConfig]):
    """Photographs of streets; limits are painted into some of those without one in training."""

    def read_splits(self) -> dict[str, ImageDataset]:
        data = self.options
        return {
            name: load_speed_limits(
                data.find_folder(),
                name,
                source=data.source,
                limits=data.limits or None,
                other_signs_are_none=data.other_signs_are_none,
                cache=True,
            )
            for name in ("train", "test")
        }

    def says(self, region: Region, label: int) -> int | None:
        """Any limit that is a class speaks for that class, be it the image's or not."""
        limit = region.kind.removeprefix("speed-limit-")
        classes = self.split("test").classes
        return classes.index(limit) if limit in classes[1:] else None

    def class_counts(self) -> Tensor:
        counts = super().class_counts()
        painted = self.options.drawn_limits * counts[0]
        counts[0] -= painted
        counts[1:] += painted / (len(counts) - 1)
        return counts

    def change(self, image: Tensor, label: int, epoch: int, index: int) -> tuple[Tensor, int]:
        """A photograph without a limit has, in a share of the epochs, one painted into it, and its label."""
        if label != 0:
            return image, label
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.config.seed, epoch, index, 1])))
        if random.random() >= self.options.drawn_limits:
            return image, 0
        images = self.split("train")
        label = int(random.integers(1, len(images.classes)))
        for _ in range(int(random.integers(1, MOST, endpoint=True))):
            image = put_limit(image, random, int(images.classes[label]), within(images.source))
        return image, label

    def teaching_batch(self, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return painted_patches(self.split("train"), self.options, self.config.model.patch_size, count, random)


def painted_patches(
    images: ImageDataset, data: SpeedLimitsConfig, size: int, count: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Patches of photographs without a limit, with one painted into a share `SIGNS` of them.

    Args:
        images: labelled photographs; those with label 0 are used.
        data: how colours are changed.
        size: of a patch, pixels a side.
        count: patches.
        random: decides everything.

    Returns:
        Patches (count, 3, size, size) uint8 and labels (count,) int64.
    """
    streets = images.labels.eq(0).nonzero().flatten().tolist()
    margin = SIDES[1] // 2  # a near sign is larger than a patch, of which it fills all
    around = size + 2 * margin
    patches, labels = [], []
    for _ in range(count):
        street = images.image(streets[int(random.integers(len(streets)))])
        label = int(random.integers(1, len(images.classes))) if random.random() < SIGNS else 0
        height, width = street.shape[-2:]
        if min(height, width) < around:
            raise ValueError(f"photographs of {height}×{width} pixels are too small to cut patches of {size} from")
        top, left = (int(random.integers(0, side - around, endpoint=True)) for side in (height, width))
        patch = street[:, top : top + around, left : left + around]
        if label:
            limit = int(images.classes[label])
            patch = put_limit(patch, random, limit, within(images.source), off_centre=OFF_CENTRE)
        patch = patch[:, margin : margin + size, margin : margin + size]
        change = draw_change(data, *random.integers(2**31, size=3).tolist())
        patches.append(apply_change(patch, Change(scale=change.scale, shift=change.shift)))
        labels.append(label)
    return torch.stack(patches), torch.tensor(labels, device="cpu")


_MODEL = ModelConfig(n_patches=5, patch_size=100, view_scale=0.3, grid_step=80)
_OPTIM = replace(PHOTOGRAPHS_OPTIM, epochs=300, batch_size=8, draws=4, entropy_weight=5e-4, class_weights=True)
_IMAGES = SpeedLimitsConfig(
    contrast=0.3,
    brightness=0.15,
    tint=0.05,
    translation=50,
    zoom=1.35,
    stretch=1.08,
    drawn_limits=0.5,
    drawn_patches=28_800,
)
_PAPER = ExperimentConfig(
    preset="paper",
    data=SpeedLimitsConfig(),
    model=replace(_MODEL, networks="paper", feature_scale=1.0),
    optim=OptimConfig(updates=300_000, batch_size=32, entropy_weight=0.05, class_weights=True),
    trainer=SHORT_EPOCHS,
)
_QUIET = replace(_MODEL, **LESS_NOISE)
_MODERN = ExperimentConfig(preset="modern", data=_IMAGES, model=_QUIET, optim=_OPTIM, trainer=SHORT_EPOCHS)
_QUICK = replace(
    _MODERN,
    preset="quick",
    model=replace(_QUIET, patch_size=64, grid_step=64),
    optim=replace(_OPTIM, epochs=150),
)
PRESETS = {"paper": _PAPER, "modern": _MODERN, "quick": _QUICK}

_SLIMMER = {"optim.epochs": 12, "model.cnn_channels": 16}
_FEWER = {"optim.epochs": 20}  # of bags of 286 patches
_BLIND = {"optim.epochs": 40}  # of street scenes: uniform draws hardly ever show the sign, more epochs learn by heart

TABLE = Table(
    "table2",
    "Speed limits",
    PRESETS,
    (
        draws_row("U-5", "0.3/1", as_published(1.468, 0.317, 0.531, 0.004, 7.8, 39), _BLIND),
        draws_row("U-10", "0.3/1", as_published(0.851, 0.408, 0.472, 0.008, 10.8, 78), _BLIND),
        cnn_row(0.3, as_published(0.003, 0.001, 0.311, 0.049, 6.6, 86), _SLIMMER),
        cnn_row(0.5, as_published(0.002, 0.001, 0.295, 0.039, 15.6, 239), _SLIMMER),
        cnn_row(1, as_published(0.002, 0.000, 0.247, 0.001, 64.2, 958), _SLIMMER),
        Row("Deep MIL", "1", {"method": "mil"}, as_published(0.077, 0.089, 0.083, 0.006, 97.2, 1497), _FEWER),
        Row("Gated Deep MIL", "1", {"method": "gated-mil"}, quick=_FEWER),
        draws_row("ATS-5", "0.3/1", as_published(0.162, 0.124, 0.089, 0.002, 8.5, 86)),
        draws_row("ATS-10", "0.3/1", as_published(0.082, 0.032, 0.095, 0.008, 10.3, 118)),
    ),
    few=("U-5", "CNN 0.3", "ATS-5"),
)

_ALL = (30, 50, 60, 70, 80, 100, 120)  # of the German photographs, but 20, which four show
ALL_LIMITS = Table(
    "table2-all",
    "Speed limits, all of the German photographs'",
    {
        name: replace(preset, data=replace(cast("SpeedLimitsConfig", preset.data), source="german", limits=_ALL))
        for name, preset in PRESETS.items()
    },
    (
        draws_row("U-5", "0.3/1", quick=_BLIND),
        Row("Deep MIL", "1", {"method": "mil"}, quick=_FEWER),
        draws_row("ATS-5", "0.3/1"),
        draws_row("ATS-10", "0.3/1"),
    ),
    few=("U-5", "ATS-5"),
)

SPEED_LIMITS = Experiment(SpeedLimitsConfig, SpeedLimitsData, PRESETS, (960, 1280), TABLE, (ALL_LIMITS,))
