"""Teach the features of speed limits to read, before attention has learned where to look.

Attention learns from features that tell a sign from its street, and features learn from patches that show signs; to
begin with there are neither, and few photographs. Patches with drawn limits need no attention, no labels and no boxes.
"""

import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ats._files import write_whole
from ats.datasets.image_dataset import ImageDataset
from ats.datasets.painted_signs import SIDES, put_limit, within
from ats.experiments.augmentation import Change, apply_change, draw_change
from ats.experiments.build import Classifier, normalisation, patch_features
from ats.experiments.config import ExperimentConfig
from ats.experiments.data import ExperimentData
from ats.experiments.data_config import SpeedLimitsConfig
from ats.experiments.image_data import ImageData
from ats.experiments.schedule import learning_rate_factor
from ats.models import ATSClassifier

BATCH = 48
REPORT_EVERY = 10.0  # seconds
CHECKPOINT_EVERY = 20.0  # seconds
SIGNS = 0.75
"""Share of the patches that show one: with fewer, features learn what is a sign, and no digits for long."""
OFF_CENTRE = 16
"""Pixels from a patch's middle to the sign's, at most: about what the attention's grid makes of it."""


def drawn_patches(
    images: ImageDataset, data: SpeedLimitsConfig, size: int, count: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Patches of photographs without a limit, with one drawn into a share `SIGNS` of them.

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
            raise ValueError(f"photographs of {height}×{width} pixels are too small to draw patches of {size} from")
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


def teach_features(model: Classifier, data: ExperimentData, checkpoint: Path) -> None:
    """Train feature network and head to tell what limit a patch shows, for about `data.drawn_patches` patches.

    Does nothing where none are asked for, nor to a CNN, which has no features of patches. Writes `checkpoint` as it
    goes, and goes on from there if it exists: features end up the same.
    """
    config, options, feature = data.config, data.config.data, patch_features(model)
    if not isinstance(options, SpeedLimitsConfig) or not options.drawn_patches or feature is None:
        return
    assert isinstance(data, ImageData)
    classify = model.classify if isinstance(model, ATSClassifier) else model.head
    images, optim = data.split("train"), config.optim
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, 0, 0, 2])))
    steps = math.ceil(options.drawn_patches / BATCH)
    parameters = [*feature.parameters(), *model.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, optim))
    device = model.head.weight.device
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in _normalisation(config))
    model.train()
    state = _State(feature, model.head, optimizer, schedule, random)
    first = state.load(checkpoint, device) if checkpoint.exists() else 0
    if first < steps:
        _report(f"drawn patches, step {first}/{steps}")
    recent, reported, written = [], time.monotonic(), time.monotonic()
    for step in range(first + 1, steps + 1):
        patches, labels = drawn_patches(images, options, config.model.patch_size, BATCH, random)
        loss = F.cross_entropy(classify(feature((patches.to(device) / 255 - mean) / std)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent.append(float(loss.detach()))
        now = time.monotonic()
        if now - reported >= REPORT_EVERY or step == steps:
            _report(f"drawn patches, step {step}/{steps}  loss {sum(recent) / len(recent):.3f}")
            recent, reported = [], now
        if now - written >= CHECKPOINT_EVERY or step == steps:
            state.save(checkpoint, step)
            written = now


class _State:
    """All that the teaching changes."""

    def __init__(
        self,
        feature: nn.Module,
        head: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        random: np.random.Generator,
    ) -> None:
        self._parts: dict[str, Any] = {"feature": feature, "head": head, "optimizer": optimizer, "schedule": schedule}
        self._random = random

    @rank_zero_only
    def save(self, path: Path, step: int) -> None:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        file = io.BytesIO()
        torch.save(state | {"step": step, "random": _plain(self._random.bit_generator.state)}, file)
        write_whole(path, file.getvalue())

    def load(self, path: Path, device: torch.device) -> int:
        """Set everything as it was saved, and return the step at which."""
        state = torch.load(path, map_location=device, weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._random.bit_generator.state = state["random"]
        return int(state["step"])


def _plain(state: Any) -> Any:
    """A generator's state without arrays, which `torch.load` takes from no one; NumPy takes lists for them."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


@rank_zero_only
def _report(line: str) -> None:
    print(line, flush=True)


def _normalisation(config: ExperimentConfig) -> tuple[list[float], list[float]]:
    mean, std = normalisation(config)
    return mean or [0.0] * 3, std or [1.0] * 3
