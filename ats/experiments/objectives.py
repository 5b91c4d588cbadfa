"""What is learned of an image: one class, any number of labels, or a number; and how right an output is.

A model's outputs (M, C) are class logits, label logits, or the numbers themselves.
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.experiments.samplers import NOT_COUNTED
from ats.models.classifier import ScaledLinear

Task = Literal["classes", "labels", "value"]


class Objective(ABC):
    """How outputs (M, C) compare with what is true of M images."""

    error_name: str = "error"
    """What `errors` are, for reports."""

    def head(self, linear: nn.Linear) -> nn.Linear:
        """A model's last layer, from a fresh one."""
        return linear

    @abstractmethod
    def losses(self, outputs: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss (M,) of each image, weighted by `class_weights` where these are given."""

    @abstractmethod
    def errors(self, outputs: Tensor, truth: Tensor) -> Tensor:
        """How wrong each image's output is, (M,) float."""

    @abstractmethod
    def averaged(self, outputs: Tensor) -> Tensor:
        """Outputs (R, M, C) of R draws -> (M, C), those of the mean prediction."""

    @abstractmethod
    def uncounted(self, truth: Tensor, counted: Tensor) -> Tensor:
        """The truth marked where `counted` (M,) is False, so that `counts` tells."""

    @abstractmethod
    def counts(self, truth: Tensor) -> Tensor:
        """Which images (M,) are counted."""

    def class_weights(self, truth: Tensor, n_outputs: int, counts: Tensor) -> Tensor:
        """What makes rare classes count for as much as common ones, for the training images' truth.

        Args:
            truth: of the training images.
            n_outputs: C.
            counts: (C,) images of each class, as many as an epoch is expected to have.

        Raises:
            ValueError: a class without an image, or a task without classes.
        """
        if bool((counts == 0).any()):
            raise ValueError(f"training images by class are {counts.tolist()}: a class without any cannot be learned")
        return counts.sum() / (counts * len(counts))

    def chance(self, n_outputs: int) -> float:
        """The loss of guessing where classes are equal."""
        return math.log(n_outputs)


class Classes(Objective):
    """One class of several: cross-entropy; an error is another class than the true one (M,) int64."""

    def losses(self, outputs: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        losses = F.cross_entropy(outputs, truth, reduction="none")
        return losses if weights is None else weights[truth] * losses

    def errors(self, outputs: Tensor, truth: Tensor) -> Tensor:
        return (outputs.argmax(-1) != truth).float()

    def averaged(self, outputs: Tensor) -> Tensor:
        return outputs.log_softmax(-1).logsumexp(0) - math.log(len(outputs))

    def uncounted(self, truth: Tensor, counted: Tensor) -> Tensor:
        return truth.masked_fill(~counted, NOT_COUNTED)

    def counts(self, truth: Tensor) -> Tensor:
        return truth != NOT_COUNTED


class _Floats(Objective):
    """Truths (M, C) that are floats: NaN where an image is not counted."""

    def uncounted(self, truth: Tensor, counted: Tensor) -> Tensor:
        return truth.masked_fill(~counted.unsqueeze(-1), torch.nan)

    def counts(self, truth: Tensor) -> Tensor:
        return ~truth.isnan().any(-1)


class Labels(_Floats):
    """Any number of labels, (M, C) of 0 and 1: the mean binary cross-entropy; an error is the share that is wrong."""

    error_name = "share of labels wrong"

    def losses(self, outputs: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(outputs, truth.to(outputs.dtype), reduction="none")
        if weights is not None:  # (2, C): of a label's absence and presence
            losses = losses * torch.where(truth > 0.5, weights[1], weights[0])
        return losses.mean(-1)

    def errors(self, outputs: Tensor, truth: Tensor) -> Tensor:
        return ((outputs > 0) != (truth > 0.5)).float().mean(-1)

    def averaged(self, outputs: Tensor) -> Tensor:
        yes, no = (F.logsigmoid(signed).logsumexp(0) for signed in (outputs, -outputs))
        return yes - no

    def class_weights(self, truth: Tensor, n_outputs: int, counts: Tensor) -> Tensor:
        present = truth.double().sum(0)
        sides = torch.stack([len(truth) - present, present])  # (2, C)
        if bool((sides == 0).any()):
            raise ValueError(
                f"of {len(truth)} training images as many as {present.long().tolist()} have each label: one that none "
                "or all have cannot be learned"
            )
        return len(truth) / (2 * sides)

    def chance(self, n_outputs: int) -> float:
        return math.log(2)


class Value(_Floats):
    """A number, (M, 1): the squared error in units of the training images' spread; an error is how far off it is.

    Args:
        centre, spread: mean and standard deviation of the training images' numbers.
    """

    error_name = "mean absolute error"

    def __init__(self, centre: float, spread: float) -> None:
        self.centre, self.spread = centre, spread

    def head(self, linear: nn.Linear) -> nn.Linear:
        return ScaledLinear(linear, self.centre, self.spread)

    def losses(self, outputs: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        return (((outputs - truth.to(outputs.dtype)) / self.spread) ** 2).mean(-1)

    def errors(self, outputs: Tensor, truth: Tensor) -> Tensor:
        return (outputs - truth.to(outputs.dtype)).abs().mean(-1)

    def averaged(self, outputs: Tensor) -> Tensor:
        return outputs.mean(0)

    def class_weights(self, truth: Tensor, n_outputs: int, counts: Tensor) -> Tensor:
        raise ValueError("optim.class_weights is for classes, and the task is a number; leave it out")

    def chance(self, n_outputs: int) -> float:
        return 1.0
