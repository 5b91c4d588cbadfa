"""What a look at the attention costs, as `ats train --diagnostics.every` takes it, beside a training step."""

import torch

import ats
from ats.experiments.callbacks import measure_attention
from bench.bench_training_step import BATCH, N_PATCHES, PATCH, Networks, Variant, training_step
from bench.report import Report

EVERY = 50  # steps between looks, as in docs/diagnostics.md


def bench_diagnostics_in_a_training_step(report: Report) -> None:
    device = report.device
    image = torch.randint(256, (BATCH, 1, 1500, 1500), dtype=torch.uint8, device=device)
    view, labels = ats.area_downsample(image, 180), torch.randint(10, (BATCH,), device=device)
    networks = Networks(Variant()).to(device)
    optimiser = torch.optim.Adam(networks.parameters(), fused=True)
    sampling = ats.nn.AttentionSampling(networks.attention, networks.feature, N_PATCHES, PATCH)
    with torch.no_grad():
        output = sampling(view, image)
        features = networks.features(output[2].patches.flatten(0, 1))
    group = report.compare(
        f"Diagnostics in a training step on Megapixel MNIST: batch {BATCH}, N = {N_PATCHES}",
        {
            "a look": lambda index: measure_attention(sampling, output, features),
            "a training step": lambda index: training_step(networks, optimiser, view, image, labels),
        },
    )
    share = group.ratio("a look", "a training step") * (100 / EVERY)
    group.at_most(0.1, share, f"of a training is a look every {EVERY} steps", "%")
