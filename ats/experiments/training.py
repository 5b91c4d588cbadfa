"""Run a training: a folder of its own, logs, checkpoints, and going on where a run stopped."""

import json
import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import Tensor

from ats._files import write_whole
from ats.experiments.callbacks import AttentionDiagnostics
from ats.experiments.config import ExperimentConfig, differences, to_dict
from ats.experiments.environment import hardware
from ats.experiments.experiment import Batch, ExperimentData
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.pretrain_features import teach_features
from ats.experiments.registry import experiment_data, from_dict


class InterruptedRunError(Exception):
    """The user stopped a run; the same command goes on with it."""


def train(config: ExperimentConfig, *, callbacks: tuple[Callback, ...] = ()) -> Path:
    """Train, or go on training, the run of `config`, and return its last checkpoint.

    The folder gets config.json, checkpoints/last.ckpt (after an epoch), csv/ and tensorboard/ logs, and
    training.json once the run is complete. A run continued from a checkpoint ends with the same weights as one
    that was never stopped; a complete run is left as it is.

    Raises:
        ValueError: the folder holds a run with other options, or on other data.
        InterruptedRunError: by the user.
    """
    folder = config.run_folder
    last = folder / "checkpoints" / "last.ckpt"
    data = experiment_data(config)
    _claim(folder, config)
    _claim_data(folder, data)
    if (folder / "training.json").exists():
        Console().print(f"{folder} is complete: nothing to train.")
        return last
    L.seed_everything(config.seed, workers=True, verbose=False)
    timer = Timer()
    trainer = _trainer(config, [timer, *_diagnostics(config), *callbacks])
    task = ClassificationTask(config)
    try:
        if not last.exists():
            teach_features(task.model.to(trainer.strategy.root_device), data, folder / "checkpoints" / "taught.ckpt")
        trainer.fit(task, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns Ctrl-C into an exit
        raise InterruptedRunError(f"stopped in {folder}; the same command goes on from its last checkpoint") from stop
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        summary = {
            "seconds": timer.time_elapsed("train"),
            "steps": trainer.global_step,
            "metrics": metrics,
            "hardware": hardware(),
            "data": data.source,
            "train_images": len(data.labels("train")),
            "test_images": len(data.labels("test")),
        }
        write_json(folder / "training.json", summary)
    return last


def _diagnostics(config: ExperimentConfig) -> list[Callback]:
    options = config.diagnostics
    if not options.every:
        return []
    # What guessing costs where classes are equal, by number or by weight; elsewhere it costs less.
    chance = math.log(config.data.n_classes)
    loss = _drawn_loss if options.gradient_draws else None
    return [AttentionDiagnostics(options.every, chance=chance, loss=loss, gradient_draws=options.gradient_draws or 2)]


def _drawn_loss(task: L.LightningModule, batch: Batch, generator: torch.Generator) -> Tensor:
    assert isinstance(task, ClassificationTask)
    view, image, label = batch
    return task.loss(task.model(view, image, generator=generator)[0], label)


def _trainer(config: ExperimentConfig, callbacks: list[Callback]) -> L.Trainer:
    folder = config.run_folder
    _quiet()
    options = config.trainer
    return L.Trainer(
        accelerator=options.accelerator,
        devices=int(options.devices) if options.devices.isdigit() else options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision=options.precision,
        max_epochs=-1 if config.optim.updates else config.optim.epochs,
        max_steps=config.optim.updates or -1,
        gradient_clip_val=config.optim.gradient_clip,
        use_distributed_sampler=False,  # the loaders bring theirs
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        default_root_dir=folder,
        logger=[CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")],
        callbacks=[
            *callbacks,
            *([AveragedWeights(config.optim.average)] if config.optim.average else []),
            EpochCheckpoint(folder / "checkpoints", options.checkpoint_seconds, options.snapshots),
            LearningRateMonitor(),
            RichProgressBar() if sys.stdout.isatty() else ProgressLines(),
        ],
    )


def _quiet() -> None:
    """Silence advice of Lightning's that does not apply here, and advertisements."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # the loaders hand out indices
        ".*number of training batches.*smaller than the logging interval.*",  # the log is by epoch
        ".*Total length of `list` across ranks is zero.*",  # no validation was asked for
        ".*Checkpoint directory .* exists and is not empty.*",  # it goes on from there
        ".*module.s. in eval mode at the start of training.*",  # features that were taught beforehand
        ".*`isinstance.treespec, LeafSpec.` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)


class AveragedWeights(WeightAveraging):
    """An exponential average of weights and batch norm's statistics, which is what checkpoints hold to evaluate.

    Early on it forgets faster, so that it does not hang on to the initial weights.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: Tensor, current: Tensor, n_averaged: Tensor | int) -> Tensor:
            if not averaged.is_floating_point():  # a count
                return current
            steps = torch.as_tensor(n_averaged, dtype=averaged.dtype, device=averaged.device)
            return averaged.lerp(current, 1 - ((steps + 1) / (steps + 10)).clamp(max=decay))

        super().__init__(avg_fn=average)


class EpochCheckpoint(ModelCheckpoint):
    """last.ckpt, written after an epoch if the one before is old enough and after the last epoch; and snapshots."""

    def __init__(self, folder: Path, seconds: float, snapshots: int = 0) -> None:
        super().__init__(folder, filename="last", enable_version_counter=False)
        self.folder = folder
        self.seconds = seconds
        self.snapshots = snapshots
        self._written = -math.inf

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _is_last_epoch(trainer) or time.monotonic() - self._written >= self.seconds:
            super().on_train_epoch_end(trainer, pl_module)
            self._written = time.monotonic()
        # One for each share of 1 / snapshots of the steps that this epoch has completed.
        total = trainer.estimated_stepping_batches
        done = [step * self.snapshots // total for step in (trainer.global_step, self._first_step(trainer))]
        if done[0] > done[1]:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:07d}.ckpt")

    @staticmethod
    def _first_step(trainer: L.Trainer) -> int:
        """The step at which this epoch began."""
        return trainer.global_step - trainer.fit_loop.epoch_loop.batch_progress.current.completed


def _is_last_epoch(trainer: L.Trainer) -> bool:
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    return 0 < epochs <= trainer.current_epoch + 1 or 0 < steps <= trainer.global_step


class ProgressLines(Callback):
    """A line an epoch, of short ones some, and one every half minute: progress where a bar would be noise."""

    def __init__(self, every: float = 30.0, epochs_apart: float = 3.0) -> None:
        self.every = every  # seconds
        self.epochs_apart = epochs_apart  # seconds
        self._last = time.monotonic()
        self._last_epoch = -math.inf

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            done = f"step {trainer.global_step}/{trainer.estimated_stepping_batches}"
            print(f"  {done}  loss of this batch {float(outputs['loss']):.3f}", flush=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        due = time.monotonic() - self._last_epoch >= self.epochs_apart or _is_last_epoch(trainer)
        if trainer.is_global_zero and due:
            self._last_epoch = time.monotonic()
            metrics = trainer.callback_metrics
            numbers = "  ".join(f"{name} {float(metrics[name]):.3f}" for name in sorted(metrics) if "/" in name)
            steps = f", step {trainer.global_step}/{trainer.max_steps}"
            of = steps if trainer.max_epochs == -1 else f"/{trainer.max_epochs}"
            print(f"epoch {trainer.current_epoch + 1}{of}  {numbers}", flush=True)


def _claim(folder: Path, config: ExperimentConfig) -> None:
    """Make the run's folder, or check that what lies there is the same run."""
    recorded = folder / "config.json"
    if recorded.exists() and _started(folder):
        try:
            found = differences(from_dict(json.loads(recorded.read_text())), config)
        except ValueError as error:  # JSON's errors are some, too
            raise ValueError(f"{recorded} cannot be read ({error}); name another folder with --output") from error
        if found:
            raise ValueError(
                f"{folder} holds a run with other options ({'; '.join(found)}); name another folder with --output, "
                "or remove that one"
            )
    elif folder.exists() and not recorded.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; name another folder with --output")
    else:
        write_json(recorded, to_dict(config))


def _started(folder: Path) -> bool:
    """Whether a run's folder holds anything that was learned."""
    return any(
        (folder / name).exists() for name in ("checkpoints/last.ckpt", "checkpoints/taught.ckpt", "training.json")
    )


def _claim_data(folder: Path, data: ExperimentData) -> None:
    """Note which images a run is of, or check that they are the same, where options alone do not say which."""
    if not data.on_disk:
        return
    recorded = folder / "data.json"
    complete = (folder / "training.json").exists()
    if complete and data.config.data.folder == _recorded_folder(folder):
        return  # asked for in the same words: nothing is read, so that the data need not be there any more
    found = {"source": data.source} | {f"{name}_images": len(data.labels(name)) for name in ("train", "test")}
    if recorded.exists() and _started(folder):
        known = json.loads(recorded.read_text())
    else:
        write_json(recorded, found)
        return
    if known != found:
        raise ValueError(
            f"{folder} holds a run on {_described(known)}, not on {_described(found)}; name another folder with "
            "--output, or remove that one"
        )


def _recorded_folder(folder: Path) -> Path | None:
    return from_dict(json.loads((folder / "config.json").read_text())).data.folder


def _described(data: dict[str, Any]) -> str:
    return f"{data['source']} ({data['train_images']} training and {data['test_images']} test images)"


def write_json(path: Path, values: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write `values` so that the file is either old or new, never half."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())
