"""Does the estimator change a training? Small Megapixel MNIST, everything but the estimator the same."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import ats
from ats.datasets.megapixel_mnist import N_CLASSES, MegapixelMNIST
from ats.datasets.mnist import load_digits
from ats.experiments.study.methods import released_coefficients
from ats.models.megapixel_mnist import NETWORKS
from ats.samples import Estimator

FORMULAS = ("ordered", "released", "unordered", "unordered-centred")
_NETWORKS = NETWORKS["modern"]
_PATCH = 32
_FEATURE_SCALE = 8.0
CURVE_STEPS = 25  # steps that a point of the learning curve is the mean of


@dataclass(frozen=True)
class TrainingOptions:
    """What is trained: each formula with each number of patches, once a seed."""

    formulas: tuple[str, ...] = FORMULAS
    """Formulas of the gradient: ordered, released, unordered, unordered-centred (with the control variate)."""
    n_patches: tuple[int, ...] = (5, 25)
    """Patches drawn from an image."""
    seeds: int = 3
    """Trainings of each."""
    steps: int = 500
    """Batches, all of new images."""
    batch_size: int = 16
    """Images a step."""
    image_size: int = 200
    """Pixels a side."""
    n_noise: int = 5
    """Patches of noise an image."""
    view_size: int = 24
    """Pixels a side of the low-resolution view; the attention has a third as many cells a side."""
    entropy_weight: float = 1e-3
    """λ of the entropy bonus."""
    learning_rate: float = 5e-3
    """AdamW's, at its highest."""
    test_images: int = 500
    """Images to test on."""


@dataclass(frozen=True)
class Run:
    """One training."""

    formula: str
    n_patches: int
    seed: int
    curve: list[float]  # mean training loss of every 25 steps
    test_error: float
    test_loss: float
    effective_cells: float  # exp(entropy) of the test images' attention
    mass_drawn: float  # of their attention, that the draws hold

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _Released(torch.autograd.Function):
    """The ordered estimate with the gradient of the code that was released with the paper."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, log_attention: Tensor) -> Tensor:  # (B, N, D), (B, N)
        weights = ats.estimator_weights(log_attention)
        ctx.save_for_backward(features, log_attention, weights)
        return torch.einsum("bn,bnd->bd", weights, features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        features, log_attention, weights = ctx.saved_tensors
        inner = torch.einsum("bnd,bd->bn", features, grad)
        coefficients = released_coefficients(log_attention.double(), inner.double())
        return weights.unsqueeze(-1) * grad.unsqueeze(1), coefficients.to(log_attention.dtype)


def pool(formula: str, features: Tensor, log_attention: Tensor) -> Tensor:
    """Φ̂ (B, D) from features (B, N, D), with the gradient that the formula gives."""
    if formula == "released":
        return _Released.apply(features, log_attention)
    estimator, _, centred = formula.partition("-")
    return ats.expectation(
        features, log_attention, estimator=cast("Estimator", estimator), control_variate=bool(centred)
    )


class _Model(nn.Module):
    def __init__(self, options: TrainingOptions, formula: str, n_patches: int) -> None:
        super().__init__()
        self.attention = _NETWORKS.attention()
        self.feature = _NETWORKS.feature()
        self.head = nn.Linear(_NETWORKS.n_features, N_CLASSES)
        self.options, self.formula, self.n_patches = options, formula, n_patches

    def forward(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, ats.PatchSample]:
        logits = self.attention(ats.area_downsample(image, self.options.view_size))
        sample = ats.sample_patches(image, logits, self.n_patches, _PATCH, generator=generator)
        features = self.feature(sample.patches.flatten(0, 1)).unflatten(0, sample.indices.shape)
        return self.head(_FEATURE_SCALE * pool(self.formula, features, sample.log_attention)), sample


def check(options: TrainingOptions) -> None:
    """Raise unless the options can be trained with."""
    for formula in options.formulas:
        if formula not in FORMULAS:
            raise ValueError(f"unknown formula {formula!r}, expected some of {', '.join(FORMULAS)}")
    if options.seeds < 1 or options.steps < CURVE_STEPS:
        raise ValueError(
            f"seeds must be at least 1 and steps at least {CURVE_STEPS}, got {options.seeds} and {options.steps}"
        )
    cells = (options.view_size // _NETWORKS.stride) ** 2
    if max(options.n_patches) > cells:
        raise ValueError(f"n_patches {max(options.n_patches)} is more than the attention's {cells} cells")


def train(
    options: TrainingOptions, formula: str, n_patches: int, seed: int, advance: Callable[[], None] = lambda: None
) -> Run:
    """Train once and test. The seed decides images, weights, order and draws, whatever the formula."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Model(options, formula, n_patches)
    images = _images(options, options.steps * options.batch_size, seed, "train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options.learning_rate, total_steps=options.steps, pct_start=0.05
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(options.steps):  # every image is new
        indices = torch.arange(step * options.batch_size, (step + 1) * options.batch_size, device="cpu")
        scores, sample = model(images.render(indices), generator)
        loss = F.cross_entropy(scores, images.labels[indices])
        optimiser.zero_grad()
        (loss - options.entropy_weight * sample.entropy.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        advance()
    whole = losses[: options.steps // CURVE_STEPS * CURVE_STEPS]
    curve = torch.tensor(whole, device="cpu").view(-1, CURVE_STEPS).mean(1)
    return Run(formula, n_patches, seed, curve.tolist(), **_test(model.eval(), options, seed))


def _images(options: TrainingOptions, count: int, seed: int, split: str) -> MegapixelMNIST:
    return MegapixelMNIST(
        load_digits(split), count, image_size=options.image_size, n_noise=options.n_noise, seed=seed, split=split
    )


@torch.no_grad()
def _test(model: _Model, options: TrainingOptions, seed: int) -> dict[str, float]:
    images = _images(options, options.test_images, seed, "test")
    generator = torch.Generator().manual_seed(seed)
    scores, entropies, masses = [], [], []
    for indices in torch.arange(options.test_images, device="cpu").split(100):
        score, sample = model(images.render(indices), generator)
        scores.append(score)
        entropies.append(sample.entropy)
        masses.append(sample.log_attention.exp().sum(1))
    together = torch.cat(scores)
    return {
        "test_error": float((together.argmax(1) != images.labels).float().mean()),
        "test_loss": float(F.cross_entropy(together, images.labels)),
        "effective_cells": float(torch.cat(entropies).mean().exp()),
        "mass_drawn": float(torch.cat(masses).mean()),
    }
