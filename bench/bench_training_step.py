"""A training step on Megapixel MNIST, batch 16, view given: what is spent outside the two networks, and the layout."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

import ats
from bench.measure import synchronise, timing
from bench.networks import TrainingNetworks
from bench.report import Group, Report

BATCH, N_PATCHES, PATCH = 16, 10, 50
ROUNDS = 7
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
PARTS = "attention network", "feature network", "everything else"


class Clock:
    """Adds up the seconds spent in each part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = self._now()

    def spent_on(self, part: str) -> None:
        now = self._now()
        self.seconds[part] += now - self.last
        self.last = now

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()


def training_step(
    networks: TrainingNetworks, optimiser: torch.optim.Optimizer, view: Tensor, image: Tensor, labels: Tensor
) -> dict[str, float]:
    """One step, cut at the networks' outputs so that their backward passes can be timed apart; seconds by part."""
    clock = Clock(view.device)
    logits = networks.attention(view.contiguous(memory_format=networks.memory_format))
    clock.spent_on("attention network")
    logits_leaf = logits.detach().requires_grad_()
    sample = ats.sample_patches(image, logits_leaf, N_PATCHES, PATCH)
    patches = sample.patches.flatten(0, 1).contiguous(memory_format=networks.memory_format)
    clock.spent_on("everything else")
    features = networks.feature(patches)
    clock.spent_on("feature network")
    features_leaf = features.detach().requires_grad_()
    pooled = ats.expectation(features_leaf.unflatten(0, (BATCH, N_PATCHES)), sample.log_attention)
    loss = F.cross_entropy(networks.head(pooled), labels) - 1e-4 * sample.entropy.mean()
    loss.backward()
    clock.spent_on("everything else")
    features.backward(features_leaf.grad)
    clock.spent_on("feature network")
    logits.backward(logits_leaf.grad)
    clock.spent_on("attention network")
    torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    clock.spent_on("everything else")
    return clock.seconds


def bench_training_step(report: Report) -> None:
    device = report.device
    image = torch.randint(256, (BATCH, 1, 1500, 1500), dtype=torch.uint8, device=device)
    view = ats.area_downsample(image, 180)
    labels = torch.randint(10, (BATCH,), device=device)
    models = {}
    for name, layout in LAYOUTS.items():
        networks = TrainingNetworks(layout).to(device)
        models[name] = networks, torch.optim.Adam(networks.parameters(), fused=True)
    for networks, optimiser in models.values():
        training_step(networks, optimiser, view, image, labels)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, (networks, optimiser) in models.items():
            steps[name].append(training_step(networks, optimiser, view, image, labels))

    group = Group(f"Training step on Megapixel MNIST: batch {BATCH}, view given")
    for name, parts in steps.items():
        group.timings[name] = timing([sum(seconds.values()) for seconds in parts])
        for part in PARTS:
            group.timings[f"{name}: {part}"] = timing([seconds[part] for seconds in parts])
    report.groups.append(group)
    if device.type == "cpu":
        share = group.ratio("channels-last: everything else", "channels-last") * 100
        group.at_most(3, share, "of the step is outside the two networks", "%")
        group.at_least(1.6, group.ratio("contiguous", "channels-last"), "faster channels-last than contiguous")
