"""What a look at the attention costs, as `ats train --diagnostics.every` takes it, beside a training step."""

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed, whose callback looks at the attention")

from ats.experiments import cost
from ats.experiments.callbacks import measure_attention
from bench.bench_training_step import BATCH, N_PATCHES, channels_last_model, published
from bench.report import Report

SECTION = "ops"
EVERY = 50  # steps between looks, as in docs/diagnostics.md


def bench_diagnostics_in_a_training_step(report: Report) -> None:
    config = published("megapixel-mnist")
    images = cost.random_images(config, batch=BATCH)
    views = [cost.view_on(report.device, config, images[0])]
    step = cost.training_step(config, report.device, images=images, views=views)
    sampling = channels_last_model(config).to(report.device).sampling
    with torch.no_grad():
        output = sampling(views[0], images[0].to(report.device))
        features = sampling.feature(output[2].patches.flatten(0, 1))
    group = report.compare(
        f"Diagnostics in a training step on Megapixel MNIST: batch {BATCH}, N = {N_PATCHES}",
        {
            "a look": lambda index: measure_attention(sampling, output, features),
            "a training step": lambda index: step(),
        },
        steps=True,
    )
    share = group.ratio("a look", "a training step") * (100 / EVERY)
    group.at_most(0.1, share, f"of a training is a look every {EVERY} steps", "%")
