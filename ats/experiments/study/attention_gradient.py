"""How much of the attention's gradient is signal: over batches of training images, and over draws of each."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats.diagnostics import repeated_gradients
from ats.experiments.experiment import ExperimentData
from ats.experiments.trained import TrainedModel
from ats.models import ATSClassifier, NestedClassifier

_COLUMNS = 1 << 18  # of gradients at a time, in float64


class GradientSignal(NamedTuple):
    """The squared length of the expected gradient over the variance of one step's.

    Attributes:
        ratio: without bias in its numerator: pure noise gives 0 on average, sometimes less.
        by_chance: its standard deviation if there were no signal.
        of_draws: share of the variance that is the draws'; the rest is between batches.
    """

    ratio: float
    by_chance: float
    of_draws: float


def gradient_signal(batches: Iterable[Tensor]) -> GradientSignal | None:
    """Signal and noise of gradients g_br of B independent batches, each drawn R times.

    With h_b the mean over a batch's draws, the squared signal is the mean of ⟨h_b, h_c⟩ over pairs of different
    batches, whose noise is independent: unbiased. The variance is that of one batch drawn once.

    Args:
        batches: B of them, (R, P) each, B and R at least 2.

    Returns:
        None where all gradients are the same, e.g. 0.
    """
    rows, within, copies = [], [], 0
    for gradients in batches:
        copies = len(gradients)
        rows.append(gradients.double().mean(0).float().cpu())
        within.append(float(gradients.double().var(0).sum()))
    if len(rows) < 2 or copies < 2:
        raise ValueError(f"signal and noise need at least 2 batches of 2 draws, got {len(rows)} of {copies}")
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64, device="cpu")
    for part in torch.stack(rows).split(_COLUMNS, dim=1):
        products += part.double() @ part.double().T
    pairs = products[tuple(torch.triu_indices(len(rows), len(rows), 1, device="cpu"))]
    signal = float(pairs.mean())
    of_draws = math.fsum(within) / len(within)
    variance = float(products.diagonal().mean()) - signal + of_draws * (1 - 1 / copies)
    if variance <= 0:
        return None
    by_chance = float(pairs.norm()) / len(pairs) / variance
    return GradientSignal(signal / variance, by_chance, min(1.0, of_draws / variance))  # few batches may give more


def attention_parameters(trained: TrainedModel) -> list[nn.Parameter]:
    """What the attention networks of all levels learn; none of uniform sampling."""
    model, networks = trained.model, []
    if isinstance(model, NestedClassifier):
        networks = [model.sampling.zoom(depth).attention for depth in range(len(model.sampling.levels))]
    elif isinstance(model, ATSClassifier):
        networks = [model.sampling.attention]
    return [value for network in networks for value in network.parameters() if value.requires_grad]


def batch_gradients(
    trained: TrainedModel,
    data: ExperimentData,
    *,
    batches: int,
    copies: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Gradients (copies, P) of the loss of random batches to the attention's parameters, as the last epoch has images.

    The loss is the training's without the entropy bonus, which no draw is needed for; networks are in evaluation mode.
    """
    model, optim, objective = trained.model, trained.config.optim, trained.config.data.objective
    assert isinstance(model, ATSClassifier | NestedClassifier)
    parameters = attention_parameters(trained)
    images = len(data.labels("train"))
    size = min(optim.batch_size, images)
    epoch = -(-optim.updates * size // images) - 1 if optim.updates else optim.epochs - 1
    weights = data.class_weights().to(trained.device, torch.float32) if optim.class_weights else None
    order, draws = torch.Generator("cpu").manual_seed(seed), torch.Generator(trained.device).manual_seed(seed)
    for _ in range(batches):
        chosen = torch.randperm(images, generator=order, device="cpu")[:size].to(trained.device)
        view, image, label = data.load("train", chosen, epoch)
        mask = data.masks("train", chosen, epoch)

        def loss(view=view, image=image, mask=mask, label=label) -> Tensor:  # type: ignore[no-untyped-def]
            logits, _ = model(view, image, mask=mask, generator=draws, draws=optim.draws)
            truth = label.repeat(len(logits) // len(label), *[1] * (label.ndim - 1))
            return objective.losses(logits, truth, weights).mean()

        yield repeated_gradients(loss, parameters, copies)
        advance()
