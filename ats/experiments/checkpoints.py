"""Checkpoints: written whole, read without running anything in them, and checked before a training goes on."""

import io
import math
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from ats._files import write_whole
from ats.experiments.records import MetricsRecord
from ats.models.classifier import SoftBound

_PARTS = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
"""What Lightning's checkpoints hold, that a training needs to go on."""


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint beside its target and rename it: the one before is there until the new one is whole.

    It is a ZIP file, as `torch.save` makes them, with a checksum (CRC-32) of each part.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        buffer = io.BytesIO()
        torch.save(content, buffer)
    finally:
        torch.serialization.set_crc32_options(checksums)
    write_whole(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU: tensors and plain values alone, whose checksums are right.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or something else; the message names the file.
    """
    try:
        _check_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # whatever a file that somebody made may cause; torch's advice is to trust it
        raise ValueError(f"{path} holds more than numbers and texts, or is damaged, and was not read") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint that `ats train` wrote")
    return content


def _check_whole(path: Path) -> None:
    """Raise ValueError, saying what is wrong, unless all of a file's parts have the checksums that it states."""
    size = path.stat().st_size
    if not size:
        raise ValueError("is empty")
    if not zipfile.is_zipfile(path):
        raise ValueError("is cut short, or no checkpoint")
    try:
        with zipfile.ZipFile(path) as parts:
            # torch compresses nothing: what does may unpack to more than there is memory.
            foreign = any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist())
            damaged = None if foreign else parts.testzip()
    except Exception as error:  # the list of parts itself is damaged
        raise ValueError("is damaged") from error
    if foreign:
        raise ValueError("is no checkpoint that `ats train` wrote")
    if damaged is not None:
        raise ValueError(f"is damaged: the checksum of {damaged} is wrong")


def fingerprint(path: Path) -> int:
    """A number that tells a checkpoint's content from another's, of the checksums that it states."""
    with zipfile.ZipFile(path) as parts:
        return hash(tuple((part.CRC, part.file_size) for part in parts.infolist()))


def check_resumable(path: Path, content: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError unless a checkpoint has all that a training of `model` needs to go on."""
    for name, kind in _PARTS.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path} is no checkpoint that `ats train` wrote: it has no {name!r}")
    if min(content["epoch"], content["global_step"]) < 0 or not isinstance(content.get("ran_on", {}), Mapping):
        raise ValueError(f"{path} is damaged: its epoch, step or what it ran on cannot be")
    check_weights(path, content["state_dict"], model)


def check_weights(path: Path, state: Any, model: nn.Module) -> None:
    """Raise ValueError unless a checkpoint's weights are those of a model, of the same kind of numbers."""
    expected = model.state_dict()
    bounds = (name for name, layer in model.named_modules() if isinstance(layer, SoftBound))
    since = {f"{name}.limit".lstrip(".") for name in bounds}  # which runs from before it was kept with the weights lack
    for name in [*expected, *state] if isinstance(state, Mapping) else [None]:
        if name in since and name not in state:
            continue
        found, wanted = None if name is None else state.get(name), expected.get(str(name))
        if wanted is None or not _fits(found, wanted):
            raise ValueError(f"{path} is of another model, or of another version of ats: {name!r} does not fit")


def _fits(found: Any, wanted: torch.Tensor) -> bool:
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return (found.is_floating_point(), found.is_complex()) == (wanted.is_floating_point(), wanted.is_complex())


class WholeCheckpoints(CheckpointIO):
    """How Lightning writes and reads checkpoints here. Its own way goes through $TMPDIR, maybe on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not supported")
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class EpochCheckpoint(Checkpoint):
    """last.ckpt, written after an epoch if the one before is old enough and after the last epoch; and snapshots.

    With it goes what was logged so far: a run that goes on from here has its records, too.
    """

    def __init__(self, folder: Path, record: MetricsRecord, seconds: float, snapshots: int = 0) -> None:
        self.folder, self.record = folder, record
        self.seconds, self.snapshots = seconds, snapshots
        self._written = -math.inf

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning logs the epoch's means only once checkpoints are written, so that a kill would lose them. Logging
        # them twice changes nothing. On every rank, for the ranks compute the means together.
        means = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.record.log_metrics(means | {"epoch": trainer.current_epoch}, trainer.global_step - 1)
        # One for each share of 1 / snapshots of the steps that this epoch has completed. Before last.ckpt: a run that
        # goes on from that does not come by here again.
        total = trainer.estimated_stepping_batches
        done = [step * self.snapshots // total for step in (trainer.global_step, self._first_step(trainer))]
        if done[0] > done[1]:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:07d}.ckpt")
        due = is_last_epoch(trainer) or time.monotonic() - self._written >= self.seconds
        if trainer.strategy.broadcast(due):  # clocks differ, and all ranks have a part in it
            self.record.save()
            trainer.save_checkpoint(self.folder / "last.ckpt")
            self._written = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return self.record.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.record.load_state_dict(state_dict)

    @staticmethod
    def _first_step(trainer: L.Trainer) -> int:
        """The step at which this epoch began."""
        return trainer.global_step - trainer.fit_loop.epoch_loop.batch_progress.current.completed


def is_last_epoch(trainer: L.Trainer) -> bool:
    """Whether the training ends with the current epoch."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    return trainer.should_stop or 0 < epochs <= trainer.current_epoch + 1 or 0 < steps <= trainer.global_step
