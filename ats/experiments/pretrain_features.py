"""Teach features what patches show, before attention has learned where to look.

Attention learns from features that tell a sign from its street, and features learn from patches that show signs; to
begin with there are neither. Patches that an experiment makes by itself, as speed limits paints signs, need no
attention, no labels and no boxes.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from ats.experiments.backbones import networks_of
from ats.experiments.build import Classifier, patch_features
from ats.experiments.checkpoints import read_checkpoint, write_checkpoint
from ats.experiments.experiment import ExperimentData
from ats.experiments.schedule import learning_rate_factor
from ats.models import SamplingClassifier

BATCH = 48
REPORT_EVERY = 10.0  # seconds
CHECKPOINT_EVERY = 20.0  # seconds


def teach_features(model: Classifier, data: ExperimentData, checkpoint: Path) -> None:
    """Train feature network and head to tell what a patch shows, on about as many as `taught_patches` says.

    Does nothing where none are asked for, nor to a CNN, which has no features of patches. Writes `checkpoint` as it
    goes, and goes on from there if it exists: features end up the same.
    """
    config, feature = data.config, patch_features(model)
    if not config.data.taught_patches or feature is None:
        return
    classify = model.classify if isinstance(model, SamplingClassifier) else model.head
    optim = config.optim
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, 0, 0, 2])))
    steps = math.ceil(config.data.taught_patches / BATCH)
    parameters = [*feature.parameters(), *model.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, optim))
    device = model.head.weight.device
    networks = networks_of(config)
    mean = torch.tensor(networks.mean or [0.0], device=device).view(-1, 1, 1)
    std = torch.tensor(networks.std or [1.0], device=device).view(-1, 1, 1)
    model.train()
    state = _State(feature, model.head, optimizer, schedule, random)
    first = state.load(checkpoint) if checkpoint.exists() else 0
    if first < steps:
        _report(f"drawn patches, step {first}/{steps}")
    recent, reported, written = [], time.monotonic(), time.monotonic()
    for step in range(first + 1, steps + 1):
        patches, labels = data.teaching_batch(BATCH, random)
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
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        write_checkpoint(path, state | {"step": step, "random": _plain(self._random.bit_generator.state)})

    def load(self, path: Path) -> int:
        """Set everything as it was saved, and return the step at which.

        Raises:
            ValueError: what was saved is damaged, or of another model.
        """
        try:
            state = read_checkpoint(path)
            try:
                for name, part in self._parts.items():
                    part.load_state_dict(state[name])
                self._random.bit_generator.state = state["random"]
                return int(state["step"])
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
                raise ValueError(f"{path} is of another model, or damaged ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{error}; remove it to teach the features anew") from error


def _plain(state: Any) -> Any:
    """A generator's state without arrays, which `torch.load` takes from no one; NumPy takes lists for them."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state


@rank_zero_only
def _report(line: str) -> None:
    print(line, flush=True)
