"""Trainings of a given length: how long the steps of a run take is tried, once, and kept beside the run."""

import dataclasses
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ats._files import write_json
from ats.experiments.config import ExperimentConfig
from ats.experiments.console import plain_console
from ats.experiments.environment import hardware
from ats.experiments.registry import experiment_data
from ats.experiments.reproduce.runs import read_json
from ats.experiments.training import train

_SETTLING, _TIMED = 3, 8  # steps of a trial


def of_minutes(config: ExperimentConfig, minutes: float, path: Path, *, look: bool = True) -> ExperimentConfig | None:
    """A run whose training takes about so many minutes on this machine, everything else as in `config`.

    Args:
        config: of a run.
        minutes: of training.
        path: JSON file that keeps how long steps took, so that the same call gives the same run later on.
        look: whether to try where there is no such file; else the result is None then.

    Raises:
        ValueError: features that are taught beforehand, for which no step is timed.
    """
    if config.data.taught_patches:
        raise ValueError(
            f"features of {config.experiment} are taught before the training, in a time that --minutes knows nothing "
            "of; leave it out"
        )
    recorded = read_json(path)
    if recorded is None:
        if not look:
            return None
        recorded = {"stages": _tried(config), "hardware": hardware()}
        write_json(path, recorded)
    whole = sum(stage["steps"] * stage["seconds_a_step"] for stage in recorded["stages"])
    return experiment_data(config).lengthened(60 * minutes / whole)


def _tried(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Of each stage of a training its steps, and the seconds of one: the median of a few."""
    found = []
    for stage, steps in experiment_data(config).stages():
        plain_console().print(f"Timing steps of {config.model.label.upper()}: {stage}")
        times = _StepTimes()
        with tempfile.TemporaryDirectory() as folder:
            trial = dataclasses.replace(
                experiment_data(config).alone(stage, (_SETTLING + _TIMED + 1) * config.optim.batch_size),
                output=Path(folder) / "trial",
                optim=dataclasses.replace(config.optim, updates=_SETTLING + _TIMED + 1),
                trainer=dataclasses.replace(config.trainer, loggers=(), snapshots=0, checkpoint_seconds=3600.0),
                diagnostics=dataclasses.replace(config.diagnostics, every=0, pictures=0),
            )
            train(trial, callbacks=(times,))
        found.append({"stage": stage, "steps": steps, "seconds_a_step": times.median()})
    return found


class _StepTimes(Callback):
    """When steps begin."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.begun.append(time.perf_counter())

    def median(self) -> float:
        """Seconds a step, of those after the first few."""
        begun = self.begun[_SETTLING:]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(begun))
