"""Run a training: a folder of its own, logs, checkpoints, and going on where a run stopped."""

import dataclasses
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, RichProgressBar, Timer, WeightAveraging
from torch import Tensor

from ats._files import write_json
from ats.experiments.agreement import Agreement, RunCompleteError
from ats.experiments.attention_pictures import AttentionPictures
from ats.experiments.backbones import begin_pretrained, resolved
from ats.experiments.best_checkpoint import BestCheckpoint
from ats.experiments.callbacks import AttentionDiagnostics
from ats.experiments.checkpoints import EpochCheckpoint, WholeCheckpoints, check_resumable, fingerprint, read_checkpoint
from ats.experiments.config import PLACES, ExperimentConfig, differences, to_dict
from ats.experiments.console import say
from ats.experiments.environment import hardware
from ats.experiments.experiment import Batch, ExperimentData
from ats.experiments.lightning_module import ClassificationTask, ran_on
from ats.experiments.loggers import make_loggers
from ats.experiments.pretrain_features import teach_features
from ats.experiments.progress import ProgressLines
from ats.experiments.records import MetricsRecord
from ats.experiments.registry import experiment_data, from_dict
from ats.experiments.run_folder import RunFolder, described, is_longer

_MEND = "put a whole one of this run in its place, remove it to begin anew, or name another folder with --output"


class InterruptedRunError(Exception):
    """The user stopped a run; the same command goes on with it."""


class LostRankError(Exception):
    """Another process of the training ended."""


def train(config: ExperimentConfig, *, callbacks: tuple[Callback, ...] = ()) -> Path:
    """Train, or go on training, the run of `config`, and return its last checkpoint.

    The folder gets config.json, checkpoints/last.ckpt (after an epoch), csv/ and tensorboard/ logs, and
    training.json once the run is complete. A run continued from a checkpoint ends with the same weights and records
    as one that was never stopped; a complete run is left as it is, unless `config.trainer.extend` trains it on.

    Raises:
        ValueError: the folder is in use, or holds a run with other options, on other data, of another number of
            devices or precision, or a damaged one; ranks that do not see the same run.
        OSError: files that cannot be read or written.
        InterruptedRunError: by the user.
    """
    config = dataclasses.replace(config, data=config.data.resolved(config.seed), model=resolved(config.model))
    folder = RunFolder(config.run_folder)
    resumes = folder.last.exists()
    record = MetricsRecord(folder.path, resumes=resumes)
    timer, start = Timer(), Agreement()
    trainer = _trainer(config, record, [start, timer, *_diagnostics(config), *callbacks])
    # Where others see other disks, or are started by somebody else, they wait to be told.
    told = trainer.world_size > 1 and (trainer.num_nodes > 1 or _from_outside(trainer))
    if config.trainer.sync_batchnorm and trainer.strategy.root_device.type == "cpu":
        raise ValueError("trainer.sync_batchnorm is for GPUs, and this runs on the CPU; leave it out")
    first = trainer.is_global_zero
    complete = first and folder.check(config)
    data = experiment_data(config)
    same = complete and _places(config) == _places(folder.recorded())  # then they need not be there any more
    if not same and first:
        data.prepare_data()
        data.check()  # data that are not there, or impossible, leave no folder behind
        if _validates(config) and not len(data.labels("validation")):
            raise ValueError(
                "optim.keep best and optim.patience need images for validation, and there are none; the data's options "
                "say how to keep some (--data.validation …)"
            )
    data_description = None if same else described(data)
    L.seed_everything(config.seed, workers=True, verbose=False)
    task = ClassificationTask(config)  # nor does a model that cannot be built
    if not resumes and not complete:
        begin_pretrained(task.model, config.model)
    with folder.held() if first else nullcontext():
        if first:
            complete = folder.check(config)  # another command may have been quicker
            folder.claim(config, data_description)
        if complete:
            say(f"{folder.path} is complete: nothing to train.")
            if not told:
                return folder.evaluated
        checkpoint = folder.last if folder.last.exists() else None
        if checkpoint is not None and not complete:
            _check_checkpoint(checkpoint, config, task, trainer)
        start.seen = {
            "its options": _without_place(config),
            "its data": data_description,
            "checkpoints/last.ckpt": None if checkpoint is None else fingerprint(checkpoint),
        }
        start.complete = complete
        if first and not complete:
            say(_beginning(folder, data, config, checkpoint))
        try:
            if checkpoint is None:
                teach_features(task.model.to(trainer.strategy.root_device), data, folder.taught)
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except RunCompleteError:
            return folder.evaluated
        except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns Ctrl-C into an exit
            how = "goes on from its last checkpoint" if folder.started() else "begins anew: it had no checkpoint yet"
            raise InterruptedRunError(f"stopped in {folder.path}; the same command {how}") from stop
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            if checkpoint is not None and start.agreed and not start.trains:
                raise ValueError(
                    f"{checkpoint} is damaged, or was written by another version of ats ({error!r}); {_MEND}"
                ) from error
            if _is_lost(error):
                raise LostRankError(
                    f"a process of the training in {folder.path} ended, which its own message above may explain; "
                    "the same command goes on from the last checkpoint"
                ) from error
            raise
        if first:
            write_json(folder.summary, _summary(config, trainer, data, record, timer))
    return folder.evaluated


def _beginning(folder: RunFolder, data: ExperimentData, config: ExperimentConfig, checkpoint: Path | None) -> str:
    """What is about to be trained."""
    images = f"{len(data.labels('train')):,} images to train on, {len(data.labels('test')):,} to test on"
    updates, epochs = config.optim.updates, config.optim.epochs
    length = f"{updates:,} updates" if updates else f"{epochs} epochs"
    if checkpoint is not None:
        done = read_checkpoint(checkpoint)
        length += (
            f", going on after update {done['global_step']:,}" if updates else f", going on after {done['epoch'] + 1}"
        )
    return f"{folder.path}: {images}; {length}"


def _places(config: ExperimentConfig | None) -> list[Any] | None:
    """Where the data of a run are."""
    return None if config is None else [getattr(config.data, name, None) for name in PLACES]


def _from_outside(trainer: L.Trainer) -> bool:
    """Whether torchrun, Slurm or the like starts the processes, not Lightning."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and environment.creates_processes_externally


def _check_checkpoint(path: Path, config: ExperimentConfig, task: ClassificationTask, trainer: L.Trainer) -> None:
    """Raise ValueError unless the run of `config` can go on from a checkpoint, on what it runs on now."""
    try:
        content = read_checkpoint(path)
        check_resumable(path, content, task)
        try:
            found = from_dict(content["hyper_parameters"]["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} was written by another version of ats ({error})") from error
    except ValueError as error:
        raise ValueError(f"{error}; {_MEND}") from error
    other = differences(found, config)
    if other and not (
        config.trainer.extend and all(text.startswith("optim.") for text in other) and is_longer(found, config)
    ):
        raise ValueError(f"{path} is of a run with other options ({'; '.join(other)}); {_MEND}")
    before = {"precision": found.trainer.precision} | dict(content.get("ran_on", {}))
    now = ran_on(trainer, config)
    for name, value in before.items():
        if name in now and now[name] != value:
            raise ValueError(
                f"{path} was trained with {name}={value}, and going on with {now[name]} would be another training "
                f"(batches are per device); set --trainer.{name} {value}, or name another folder with --output"
            )


def _without_place(config: ExperimentConfig) -> dict[str, Any]:
    """The options that decide a run's result, without where it runs and where its files are."""
    values = to_dict(config)
    for name in PLACES:
        values["data"].pop(name, None)
    return {name: value for name, value in values.items() if name not in ("output", "trainer", "diagnostics")}


def _is_lost(error: Exception) -> bool:
    """Whether a rank's error is that it cannot reach another."""
    known = isinstance(error, getattr(torch.distributed, "DistError", ()))
    return known or any(word in str(error) for word in ("gloo/transport", "Connection closed by peer", "NCCL"))


def _summary(
    config: ExperimentConfig, trainer: L.Trainer, data: ExperimentData, record: MetricsRecord, timer: Timer
) -> dict[str, Any]:
    """What training.json holds."""
    return {
        "seconds": timer.time_elapsed("train"),
        "steps": trainer.global_step,
        "metrics": record.latest(),
        "hardware": hardware(),
        "ran_on": ran_on(trainer, config) | {"images_a_step": trainer.world_size * config.optim.batch_size},
        "data": data.source,
        "train_images": len(data.labels("train")),
        "test_images": len(data.labels("test")),
    }


def _validates(config: ExperimentConfig) -> bool:
    """Whether the loss on images for validation decides anything."""
    return config.optim.keep == "best" or config.optim.patience > 0


def _diagnostics(config: ExperimentConfig) -> list[Callback]:
    options = config.diagnostics
    pictures: list[Callback] = [AttentionPictures(options.pictures)] if options.pictures else []
    if not options.every:
        return pictures
    # What guessing costs where classes are equal, by number or by weight; elsewhere it costs less.
    chance = config.data.objective.chance(config.data.n_classes)
    loss = _drawn_loss if options.gradient_draws else None
    draws = options.gradient_draws or 2
    looks = AttentionDiagnostics(options.every, chance=chance, loss=loss, gradient_draws=draws, labels=_labels_of)
    return [looks, *pictures]


def _labels_of(batch: Batch) -> Tensor:
    return batch[2]


def _drawn_loss(task: L.LightningModule, batch: Batch, generator: torch.Generator) -> Tensor:
    assert isinstance(task, ClassificationTask)
    view, image, label, mask = batch
    masked = {} if mask is None else {"mask": mask}
    return task.loss(task.model(view, image, generator=generator, **masked)[0], label)


def _trainer(config: ExperimentConfig, record: MetricsRecord, callbacks: Sequence[Callback]) -> L.Trainer:
    folder = config.run_folder
    _quiet()
    options = config.trainer
    best = folder / "checkpoints" / "best.ckpt" if config.optim.keep == "best" else None
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
        sync_batchnorm=options.sync_batchnorm,
        plugins=[WholeCheckpoints()],
        logger=[record, *make_loggers(options.loggers, folder)],
        callbacks=[
            *callbacks,
            *([AveragedWeights(config.optim.average)] if config.optim.average else []),
            *([BestCheckpoint(best, config.optim.patience)] if _validates(config) else []),
            EpochCheckpoint(folder / "checkpoints", record, options.checkpoint_seconds, options.snapshots),
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
        ".*callbacks used to create the checkpoint need to be provided.*",  # of an earlier version
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
