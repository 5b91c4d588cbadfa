"""Keep the weights of the epoch with the least loss on images for validation, and stop once none comes any more."""

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class BestCheckpoint(Callback):
    """Write a checkpoint after each epoch whose validation loss is the least so far, and end the training in time.

    What it has seen is part of checkpoints, so that a run that goes on chooses and stops as one that never stopped.

    Args:
        path: of the checkpoint; None: write none.
        patience: epochs without a better one before the training ends; 0: it never does.
    """

    def __init__(self, path: Path | None, patience: int) -> None:
        self.path, self.patience = path, patience
        self._least, self._waited = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        return {"least": self._least, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._least, self._waited = float(state_dict["least"]), int(state_dict["waited"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_due(trainer)  # a run that goes on from its end

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["validation/loss"])  # the mean over all ranks
        better = loss < self._least
        self._waited = 0 if better else self._waited + 1
        if better:
            self._least = loss
            if self.path is not None:
                trainer.save_checkpoint(self.path)
        self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: L.Trainer) -> None:
        if self.patience and self._waited >= self.patience:
            trainer.should_stop = True
