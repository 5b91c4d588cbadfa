"""All processes of a training begin from the same: rank 0 decides from what, the others compare."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class RunCompleteError(Exception):
    """Rank 0 found nothing to train."""


class Agreement(Callback):
    """Before training, have every rank compare what it sees of the run with what rank 0 sees.

    A rank on another disk would begin anew where rank 0 goes on, and their gradients would be averaged.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        """What must be the same on every rank, by its name for people; any plain values."""
        self.complete = False
        """Whether there is nothing to train; rank 0's counts."""
        self.agreed = False
        """Whether all ranks see the same."""
        self.trains = False
        """Whether everything was restored, and training began."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.strategy.broadcast(self.complete):
            raise RunCompleteError
        if trainer.world_size == 1:
            self.agreed = True
            return
        first = trainer.strategy.broadcast(self.seen)
        other = [name for name, value in first.items() if self.seen[name] != value]
        found: list[list[str]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(found, other)
        for rank, names in enumerate(found):  # the same error everywhere: none waits for one that has left
            if names:
                raise ValueError(
                    f"rank {rank} sees another run than rank 0: {' and '.join(names)} differ. Share one disk, or copy "
                    "the run's folder and the data from rank 0's machine to the same place on the others"
                )
        self.agreed = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trains = True
