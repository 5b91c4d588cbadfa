"""A training step on Megapixel MNIST, batch 16, view given: what is spent outside the two networks, and the layout.

The networks' maps take hundreds of megabytes a step, which glibc returns to the system and fetches again, page by page.
So on a CPU a process of its own measures the same with an allocator that keeps them; docs/kernels.md has more.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ats
from ats.models import megapixel_mnist
from ats.models.classifier import ChannelsLast
from bench.measure import synchronise, timing
from bench.report import Group, Report

BATCH, N_PATCHES, PATCH = 16, 10, 50
CHUNK = 20  # patches at a time, whose maps stay in cache
ROUNDS = 7
PARTS = "attention network", "feature network", "everything else"
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}  # bytes

Steps = dict[str, list[dict[str, float]]]  # of each variant and round, seconds by part


@dataclass(frozen=True)
class Variant:
    """How the networks' maps lie in memory, and how many patches go through the feature network at a time."""

    channels_last: bool = True  # as the library's networks have it by themselves
    chunk: int = BATCH * N_PATCHES


VARIANTS = {
    "channels-last": Variant(),
    "contiguous": Variant(channels_last=False),
    f"channels-last, {CHUNK} patches at a time": Variant(chunk=CHUNK),
}


def contiguous(network: nn.Sequential) -> nn.Sequential:
    """The same network without what makes it channels-last."""
    network = nn.Sequential(*(layer for layer in network if not isinstance(layer, ChannelsLast)))
    for parameter in network.parameters():
        parameter.data = torch.empty(parameter.shape).copy_(parameter.data)
    return network


class Networks(nn.Module):
    """The paper's two networks and the linear layer."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.attention = megapixel_mnist.attention_network("paper")
        self.feature = megapixel_mnist.feature_network("paper")
        if not variant.channels_last:
            self.attention, self.feature = contiguous(self.attention), contiguous(self.feature)
        self.head = nn.Linear(megapixel_mnist.N_FEATURES["paper"], 10)
        self.chunk = variant.chunk

    def features(self, patches: Tensor) -> Tensor:
        """Patches (M, 1, ph, pw) -> features (M, D)."""
        return torch.cat([self.feature(part) for part in patches.split(self.chunk)])


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
    networks: Networks, optimiser: torch.optim.Optimizer, view: Tensor, image: Tensor, labels: Tensor
) -> dict[str, float]:
    """One step, cut at the networks' outputs so that their backward passes can be timed apart; seconds by part."""
    clock = Clock(view.device)
    logits = networks.attention(view)
    clock.spent_on("attention network")
    logits_leaf = logits.detach().requires_grad_()
    sample = ats.sample_patches(image, logits_leaf, N_PATCHES, PATCH)
    patches = sample.patches.flatten(0, 1)
    clock.spent_on("everything else")
    features = networks.features(patches)
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


def measure_steps(device: torch.device, rounds: int = ROUNDS) -> Steps:
    """Steps of all variants in turn, after one of each that is not counted."""
    image = torch.randint(256, (BATCH, 1, 1500, 1500), dtype=torch.uint8, device=device)
    view = ats.area_downsample(image, 180)
    labels = torch.randint(10, (BATCH,), device=device)
    models = {}
    for name, variant in VARIANTS.items():
        networks = Networks(variant).to(device)
        models[name] = networks, torch.optim.Adam(networks.parameters(), fused=True)
    steps: Steps = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, (networks, optimiser) in models.items():
            steps[name].append(training_step(networks, optimiser, view, image, labels))
    return {name: parts[1:] for name, parts in steps.items()}


def add_group(report: Report, name: str, steps: Steps) -> Group:
    """Put the times of whole steps and of their parts into the report."""
    group = Group(name)
    for variant, parts in steps.items():
        group.timings[variant] = timing([sum(seconds.values()) for seconds in parts])
        for part in PARTS:
            group.timings[f"{variant}: {part}"] = timing([seconds[part] for seconds in parts])
    report.groups.append(group)
    return group


def bench_training_step(report: Report) -> None:
    name = f"Training step on Megapixel MNIST: batch {BATCH}, view given"
    group = add_group(report, name, measure_steps(report.device))
    if report.device.type == "cpu":
        share = group.ratio("channels-last: everything else", "channels-last") * 100
        group.at_most(3, share, "of the step is outside the two networks", "%")
        group.at_least(1.6, group.ratio("contiguous", "channels-last"), "faster channels-last than contiguous")


def bench_training_step_with_memory_kept(report: Report) -> None:
    if report.device.type != "cpu":
        return
    command = [sys.executable, "-m", "bench.bench_training_step", str(torch.get_num_threads())]
    output = subprocess.run(command, env=os.environ | KEEPING, check=True, capture_output=True, text=True).stdout
    group = add_group(report, f"The same step, {' '.join(KEEPING)} set", json.loads(output))
    group.notes.append(f"{' '.join(f'{name}={value}' for name, value in KEEPING.items())}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    print(json.dumps(measure_steps(torch.device("cpu"))))
