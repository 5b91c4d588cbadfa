"""What the unordered estimator and the control variate cost beside the ordered one, and of a training step."""

import pytest
import torch
from torch import Tensor

import ats
import ats_kernels
from ats.experiments import cost
from bench.bench_training_step import BATCH, N_PATCHES, published
from bench.measure import Method
from bench.rehearsal import small
from bench.report import Report

SECTION = "estimators"
COPIES = 4  # of the inputs, used in turn
FEATURES = 32
WAYS = {
    "ordered": {"estimator": "ordered"},
    "unordered": {"estimator": "unordered"},
    "unordered, control variate": {"estimator": "unordered", "control_variate": True},
}


def pooling(draws: list[Tensor], features: list[Tensor], options: dict) -> Method:
    """Φ̂ and its gradients, forward and backward."""

    def method(index: int) -> tuple[Tensor, ...]:
        leaves = features[index % COPIES], draws[index % COPIES]
        return torch.autograd.grad(ats.expectation(*leaves, **options).sum(), leaves)

    return method


def inputs(report: Report, batch: int, n: int) -> tuple[list[Tensor], list[Tensor]]:
    logits = torch.randn(COPIES, batch, 32_400, device=report.device)
    draws = [ats_kernels.sample(row, n).log_attention.requires_grad_() for row in logits]
    features = [torch.randn(batch, n, FEATURES, device=report.device, requires_grad=True) for _ in range(COPIES)]
    return draws, features


@pytest.mark.parametrize(("batch", "n"), [(16, 10), (128, 10), (16, 100), (1, 256)])
def bench_estimators(report: Report, batch: int, n: int) -> None:
    draws, features = inputs(report, small(batch, 4), n)
    report.compare(
        f"Estimators, forward and backward: B = {batch}, N = {n}, D = {FEATURES}",
        {name: pooling(draws, features, options) for name, options in WAYS.items()},
    )


def bench_estimators_in_a_training_step(report: Report) -> None:
    draws, features = inputs(report, BATCH, N_PATCHES)
    config = published("megapixel-mnist")
    images = cost.random_images(config, batch=BATCH)
    views = [cost.view_on(report.device, config, images[0])]
    step = cost.training_step(config, report.device, images=images, views=views)
    methods: dict[str, Method] = {name: pooling(draws, features, options) for name, options in WAYS.items()}
    methods["a training step"] = lambda index: step()
    group = report.compare(
        f"Estimators in a training step on Megapixel MNIST: batch {BATCH}, N = {N_PATCHES}", methods, steps=True
    )
    for name in ("unordered", "unordered, control variate"):
        group.at_most(5, group.ratio(name, "a training step") * 100, f"of the step is the estimate, {name}", "%")
