"""The classifier as a LightningModule: loss, metrics, optimiser, and draws that a seed repeats."""

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from ats.batches import Images, Maps, Views
from ats.experiments.build import build_model, patch_features
from ats.experiments.config import ExperimentConfig, to_dict
from ats.experiments.experiment import Batch
from ats.experiments.registry import from_dict
from ats.experiments.schedule import bound_factor, entropy_weight, learning_rate_factor
from ats.functional import PatchSample, mean_entropy
from ats.models import ATSClassifier, EvidenceClassifier, NestedClassifier
from ats.models.classifier import SoftBound
from ats.nested_sample import NestedSample
from ats.overlap import told_of_overlap


class ClassificationTask(L.LightningModule):
    """The objective's loss, e.g. cross-entropy, less λ times the attention's entropy (paper, eq. 21), with Adam.

    The loss of an evidence head, where the model has one, is added.
    """

    def __init__(self, config: ExperimentConfig | dict[str, Any]) -> None:
        super().__init__()
        self.config = config if isinstance(config, ExperimentConfig) else from_dict(config)
        self.save_hyperparameters({"config": to_dict(self.config)})
        self.model = build_model(self.config)
        self.bounds = [layer for layer in self.model.modules() if isinstance(layer, SoftBound)]
        if self.config.optim.widening != 1 and self.config.model.method == "ats" and not self.bounds:
            raise ValueError(
                f"optim.widening={self.config.optim.widening} widens the bound of the attention's logits, and this "
                "model has none; leave it at 1"
            )
        self.has_dropout = any(isinstance(layer, nn.Dropout) for layer in self.model.modules())
        self.class_weights: Tensor | None = None
        self.classes = tuple(map(str, range(self.config.data.n_classes)))
        """The classes' names, as the data that it was trained on has them."""
        self.objective = self.config.data.objective
        self.train_loss, self.validation_loss, self.test_loss = MeanMetric(), MeanMetric(), MeanMetric()
        self.train_error, self.validation_error, self.test_error = MeanMetric(), MeanMetric(), MeanMetric()

    @property
    def taught_features(self) -> nn.Module | None:
        """The feature network where it is taught beforehand, and the training leaves it as it is."""
        return patch_features(self.model) if self.config.data.taught_patches else None

    def setup(self, stage: str) -> None:
        if self.taught_features is not None:
            self.taught_features.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ClassificationTask":
        super().train(mode)
        if self.taught_features is not None:
            self.taught_features.eval()
        return self

    def draw_generator(self, *where: int) -> torch.Generator:
        """Random numbers for the draws of one step, a function of the seed, the rank and `where` alone.

        So a resumed run draws what it would have drawn, and data-parallel ranks draw apart.
        """
        words = np.random.SeedSequence([self.config.seed, self.global_rank, *where]).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(words[0]) >> 1)

    def on_fit_start(self) -> None:
        self.classes = self.trainer.datamodule.classes  # type: ignore[attr-defined]
        if self.trainer.datamodule.tells_of_overlap and isinstance(self.model, ATSClassifier):  # type: ignore[attr-defined]
            told_of_overlap(self.model.sampling)
        if self.config.optim.class_weights:
            weights: Tensor = self.trainer.datamodule.class_weights()  # type: ignore[attr-defined]
            self.class_weights = weights.to(self.device, torch.float32)

    def on_train_start(self) -> None:
        # What was restored is the rate of the schedule that the checkpoint knew, which may have been a shorter one.
        for optimizer, scheduler in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            factor = learning_rate_factor(self.global_step, self.total_steps(), self.config.optim)
            for group, rate in zip(optimizer.param_groups, scheduler.scheduler.base_lrs, strict=True):
                group["lr"] = rate * factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = list(self.classes)
        checkpoint["ran_on"] = ran_on(self.trainer, self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.classes = tuple(checkpoint["classes"])

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        view, image, label, mask = batch
        generator = self.draw_generator(0, self.global_step)
        if self.config.optim.widening != 1:
            for bound in self.bounds:
                bound.widen(bound_factor(self.global_step, self.total_steps(), self.config.optim))
        if self.has_dropout:  # it draws from the global stream only
            torch.manual_seed(self.draw_generator(2, self.global_step).initial_seed())
        logits, sample, evidence = self._several_draws(view, image, label, mask, generator)
        label = label.repeat(len(logits) // len(label), *[1] * (label.ndim - 1))
        loss = self.loss(logits, label)
        self.train_loss.update(loss.detach())
        self.train_error.update(self.objective.errors(logits.detach(), label))
        mean: dict[str, Any] = {"on_step": False, "on_epoch": True}
        self.log("train/loss", self.train_loss, batch_size=len(batch.label), **mean, prog_bar=True)
        self.log("train/error", self.train_error, batch_size=len(batch.label), **mean, prog_bar=True)
        if sample is None:  # nothing was drawn
            return {"loss": loss}
        entropy = sample.entropy.mean() if isinstance(sample, NestedSample) else mean_entropy(sample)
        self.log("train/entropy", entropy.detach(), batch_size=len(batch.label), **mean, sync_dist=True)
        bonus = entropy_weight(self.global_step, self.total_steps(), self.config.optim) * entropy
        taught = loss - bonus
        if evidence is not None:
            self.log("train/evidence", evidence.detach(), batch_size=len(batch.label), **mean, sync_dist=True)
            taught = taught + evidence
        return {"loss": taught, "task_loss": loss.detach()}

    def _several_draws(
        self, view: Views, image: Images, label: Tensor, mask: Maps | None, generator: torch.Generator
    ) -> tuple[Tensor, PatchSample | NestedSample | None, Tensor | None]:
        """Logits, the sample, and the loss of an evidence head, where the model has one."""
        if not isinstance(self.model, ATSClassifier | NestedClassifier):
            return *self.model(view, image, generator=generator), None
        how: dict[str, Any] = {"mask": mask, "generator": generator, "draws": self.config.optim.draws}
        if isinstance(self.model, EvidenceClassifier):
            return self.model.teach(view, image, label, **how)
        return *self.model(view, image, **how), None

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """The mean loss, weighted by class if so configured: the mean weight is 1 over the training images."""
        # Not divided by the batch's own weights: a batch without a rare class must not count its others for more.
        return self.objective.losses(logits, label, self.class_weights).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("validation", batch, batch_idx, self.validation_loss, self.validation_error)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch, batch_idx, self.test_loss, self.test_error)

    def _evaluate(self, name: str, batch: Batch, batch_idx: int, loss: MeanMetric, error: MeanMetric) -> None:
        """Count the images of a batch that no other process counts; the metrics sum up over processes in the end."""
        view, image, label, mask = batch
        masked = {} if mask is None else {"mask": mask}
        logits, _ = self.model(view, image, generator=self.draw_generator(1, batch_idx), **masked)
        counted = self.objective.counts(label)
        if bool(counted.any()):
            logits, label = logits[counted], label[counted]
            loss.update(self.objective.losses(logits, label))
            error.update(self.objective.errors(logits, label))
        self.log(f"{name}/loss", loss, batch_size=len(batch.label), prog_bar=True)
        self.log(f"{name}/error", error, batch_size=len(batch.label), prog_bar=True)

    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optim = self.config.optim
        optimizer = torch.optim.AdamW(self.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay)
        total = self.total_steps()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def ran_on(trainer: L.Trainer, config: ExperimentConfig) -> dict[str, Any]:
    """What of a training's surroundings is part of its result, under the names of `TrainerConfig`."""
    return {
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "sync_batchnorm": config.trainer.sync_batchnorm,
    }
