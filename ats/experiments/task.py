"""The classifier as a LightningModule: loss, metrics, optimiser, and draws that a seed repeats."""

from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassHammingDistance

from ats.datasets.megapixel_mnist import N_CLASSES
from ats.experiments.config import ExperimentConfig, entropy_weight, from_dict, learning_rate_factor, to_dict
from ats.experiments.data import Batch
from ats.models import ATSClassifier, UniformAttention, attention_network, feature_network
from ats.models.megapixel_mnist import ATTENTION_STRIDE, N_FEATURES
from ats.nn import AttentionSampling


def build_model(config: ExperimentConfig) -> ATSClassifier:
    """The networks that a configuration names, with fresh weights from torch's random numbers."""
    model = config.model
    attention: nn.Module = UniformAttention(ATTENTION_STRIDE[model.networks])
    if model.attention == "learned":
        attention = attention_network(model.networks)
    sampling = AttentionSampling(
        attention,
        feature_network(model.networks),
        model.n_patches,
        model.patch_size,
        replace=model.replace,
        receptive_field="auto" if model.attention == "learned" else 0,
    )
    return ATSClassifier(sampling, N_FEATURES[model.networks], N_CLASSES, model.feature_scale)


class ClassificationTask(L.LightningModule):
    """Cross-entropy less λ times the attention's entropy (paper, eq. 21), with Adam."""

    def __init__(self, config: ExperimentConfig | dict[str, Any]) -> None:
        super().__init__()
        self.config = config if isinstance(config, ExperimentConfig) else from_dict(config)
        self.save_hyperparameters({"config": to_dict(self.config)})
        self.model = build_model(self.config)
        self.train_loss, self.validation_loss = MeanMetric(), MeanMetric()
        self.train_error = MulticlassHammingDistance(N_CLASSES, average="micro")
        self.validation_error = MulticlassHammingDistance(N_CLASSES, average="micro")

    def draw_generator(self, *where: int) -> torch.Generator:
        """Random numbers for the draws of one step, a function of the seed, the rank and `where` alone.

        So a resumed run draws what it would have drawn, and data-parallel ranks draw apart.
        """
        words = np.random.SeedSequence([self.config.seed, self.global_rank, *where]).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(words[0]) >> 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view, image, label = batch
        logits, sample = self.model(view, image, generator=self.draw_generator(0, self.global_step))
        loss = F.cross_entropy(logits, label)
        entropy = sample.entropy.mean()
        self.train_loss.update(loss.detach())
        self.train_error.update(logits.detach(), label)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/error", self.train_error, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/entropy", entropy.detach(), on_step=False, on_epoch=True, sync_dist=True)
        return loss - entropy_weight(self.global_step, self.total_steps(), self.config.optim) * entropy

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        view, image, label = batch
        logits, _ = self.model(view, image, generator=self.draw_generator(1, batch_idx))
        self.validation_loss.update(F.cross_entropy(logits, label), weight=len(label))
        self.validation_error.update(logits, label)
        self.log("validation/loss", self.validation_loss, prog_bar=True)
        self.log("validation/error", self.validation_error, prog_bar=True)

    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optim = self.config.optim
        optimizer = torch.optim.AdamW(self.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay)
        total = self.total_steps()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
