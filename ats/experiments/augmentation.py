"""Random changes of training images: brightness and contrast, size, translation, turns and mirrors.

They are made to the full-resolution bytes, before any view or patch is taken, so that all of a model sees the same
image. What is drawn depends on the seed, the epoch and the image's index alone: neither on what else is in a batch nor
on the rank that has it, and a run that is resumed draws what it would have drawn.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ats.experiments.config import DataConfig, OptimConfig, check_least

PHOTOGRAPHS_OPTIM = OptimConfig(learning_rate=3e-3, weight_decay=0.05, warmup=0.05, schedule="cosine", average=0.99)
"""How networks learn from a few hundred images that are changed as these are."""


@dataclass(frozen=True)
class ImageConfig(DataConfig):
    """What data sets of real images share: where they are, and how training images are changed at random."""

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
    """How often an image's colours are changed, and how often it is moved and enlarged."""

    def __post_init__(self) -> None:
        """Refuse values that no change can have."""
        check_least(self, "data", 0, "contrast", "brightness", "tint", "translation")
        check_least(self, "data", 1, "zoom", "stretch")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"data.probability must be in [0, 1], got {self.probability}")


@dataclass(frozen=True)
class Change:
    """What happens to one image: value · scale + shift, enlarged about its middle, moved by (down, right) pixels,
    mirrored, then turned."""

    scale: float = 1.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of white: red, green, blue
    zoom: tuple[float, float] = (1.0, 1.0)  # along height and width
    down: int = 0
    right: int = 0
    mirror: bool = False
    quarter_turns: int = 0


def draw_change(data: ImageConfig, seed: int, epoch: int, index: int) -> Change:
    """The change of image `index` in an epoch (paper, section 4.3 and 4.4; ranges from the authors' release)."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index])))
    # All are drawn whatever is used, so that one option does not change what another does.
    colours, moves = random.random(2) < data.probability
    contrast, brightness = random.uniform(-1, 1, 2)
    down, right = random.integers(-data.translation, data.translation, 2, endpoint=True)
    symmetry = int(random.integers(8))
    shift = data.brightness * brightness + data.tint * random.uniform(-1, 1, 3)
    size, *stretch = random.uniform(-1, 1, 3)
    zoom = [data.zoom**size * data.stretch**along for along in stretch]
    return Change(
        scale=1 + data.contrast * float(contrast) if colours else 1.0,
        shift=(float(shift[0]), float(shift[1]), float(shift[2])) if colours else (0.0, 0.0, 0.0),
        zoom=(float(zoom[0]), float(zoom[1])) if moves else (1.0, 1.0),
        down=int(down) if moves else 0,
        right=int(right) if moves else 0,
        mirror=data.symmetries and symmetry >= 4,
        quarter_turns=symmetry % 4 if data.symmetries else 0,
    )


def apply_change(image: Tensor, change: Change, *, oblong: bool = False) -> Tensor:
    """The changed image, (C, H, W) uint8: values are rounded, and kept between black and white; black moves in.

    Args:
        image: (C, H, W) uint8.
        change: what happens to it.
        oblong: quarter turns may make height and width trade places.

    Raises:
        ValueError: a quarter turn of an image that is not square, and not `oblong`.
    """
    height, width = image.shape[-2:]
    if change.quarter_turns % 2 and height != width and not oblong:
        raise ValueError(f"an image of {height}×{width} cannot be turned by 90°; set data.symmetries=False")
    if change.scale != 1 or any(change.shift):
        # With a half: the cast to bytes cuts off.
        # Of images that have no three colours, and so no tint, the shifts are alike.
        shifts = change.shift if image.shape[0] == 3 else change.shift[:1]
        shift = torch.tensor(shifts, device=image.device).mul_(255).add_(0.5)
        changed = image.float().mul_(change.scale).add_(shift.view(-1, 1, 1))
        image = changed.clamp_(0, 255).to(torch.uint8)
    if change.zoom != (1.0, 1.0):
        size = [max(1, round(old * factor)) for old, factor in zip((height, width), change.zoom, strict=True)]
        image = F.interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True).squeeze(0)
    if change.down or change.right or image.shape[-2:] != (height, width):
        image = _move(image, (height, width), change.down, change.right)
    if change.mirror:
        image = image.flip(-1)
    if change.quarter_turns:
        image = image.rot90(change.quarter_turns, (-2, -1))
    return image


def _move(image: Tensor, size: tuple[int, int], down: int, right: int) -> Tensor:
    """The image in the middle of a black one of `size`, or what of it fits there, then moved."""
    placed = image.new_zeros(*image.shape[:-2], *size)
    top, left = ((new - old) // 2 + by for new, old, by in zip(size, image.shape[-2:], (down, right), strict=True))
    first_row, last_row = max(0, top), min(size[0], top + image.shape[-2])
    first_column, last_column = max(0, left), min(size[1], left + image.shape[-1])
    if first_row < last_row and first_column < last_column:
        part = image[..., first_row - top : last_row - top, first_column - left : last_column - left]
        placed[..., first_row:last_row, first_column:last_column] = part
    return placed
