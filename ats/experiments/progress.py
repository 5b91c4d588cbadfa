"""Progress of a training, told in lines."""

import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from ats.experiments.checkpoints import is_last_epoch


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
        due = time.monotonic() - self._last_epoch >= self.epochs_apart or is_last_epoch(trainer)
        if trainer.is_global_zero and due:
            self._last_epoch = time.monotonic()
            metrics = trainer.callback_metrics
            numbers = "  ".join(f"{name} {float(metrics[name]):.3f}" for name in sorted(metrics) if "/" in name)
            steps = f", step {trainer.global_step}/{trainer.max_steps}"
            of = steps if trainer.max_epochs == -1 else f"/{trainer.max_epochs}"
            print(f"epoch {trainer.current_epoch + 1}{of}  {numbers}", flush=True)
