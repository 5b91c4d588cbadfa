"""What perfect features would make of a model's draws: where its patches lie, what they show and what that says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ats.datasets.image_dataset import Finding
from ats.experiments.localisation import shows
from ats.models import ATSClassifier, NestedClassifier

_TIE = 1e-9  # of scores that sum to 1 at most


def draw_cells(
    model: ATSClassifier, attention: Tensor, inside: Tensor, draws: int, generator: torch.Generator, masked: bool
) -> tuple[Tensor, Tensor]:
    """What `draws` draws of the model from attention (K,) show: (R, N, F) bool, and the patches' weights (R, N)."""
    logits = attention.log().expand(draws, 1, -1)
    mask = (attention > 0).unsqueeze(0) if masked else None
    cells = model.sampling.sampler.draw(logits, mask=mask, generator=generator)
    seen = inside[cells.readable()] & ~cells.surplus.unsqueeze(-1)
    return seen, cells.weights(model.sampling.estimator)


def draw_nested(
    model: NestedClassifier,
    view: Tensor,
    image: Any,
    mask: Tensor | None,
    findings: Sequence[Finding],
    draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """As `draw_cells`: patches of the last level."""
    images = image.expand(draws, -1, -1, -1) if isinstance(image, Tensor) else list(image) * draws
    masks = None if mask is None else mask.expand(draws, -1, -1)
    _, sample = model(view.expand(draws, -1, -1, -1), images, mask=masks, generator=generator)
    seen = shows(sample.offsets.flatten(0, 1), sample.patch_size, [finding.region for finding in findings])
    seen = seen.view(*sample.offsets.shape[:2], -1) & ~sample.surplus.unsqueeze(-1)
    return seen, sample.weights(model.sampling.estimator)


def oracle_errors(
    seen: Tensor, weights: Tensor, says: Sequence[int | None], label: int, n_classes: int, class_of_nothing: int | None
) -> Tensor:
    """Errors (R,) of perfect features: each patch says 1 for every class of what it shows, and they are pooled.

    The class with the largest sum is said; of equal ones any, so that an error is a share. Where no drawn patch shows
    anything that speaks for a class, it is `class_of_nothing`, or any of all classes.

    Args:
        seen: (R, N, F) bool, which patch of each draw shows which finding.
        weights: (R, N) of the patches in the estimate.
        says: of each finding the class that it speaks for; None: for none.
        label: the true class.
        n_classes: how many there are.
        class_of_nothing: as `ExperimentData` has it.
    """
    speaks = torch.zeros(len(says), n_classes, dtype=torch.float64, device=seen.device)
    for number, one in enumerate(says):
        if one is not None:
            speaks[number, one] = 1.0
    read = (seen.double() @ speaks).clamp(max=1.0)  # (R, N, C)
    scores = (weights.double().unsqueeze(-1) * read).sum(1)  # (R, C)
    tied = scores >= scores.amax(-1, keepdim=True) - _TIE
    errors = 1 - tied[:, label].double() / tied.sum(-1)
    if class_of_nothing is None:
        return errors
    return torch.where(read.flatten(1).any(-1), errors, float(class_of_nothing != label))
