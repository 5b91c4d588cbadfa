"""Where a training step of attention sampling goes: the parts of one step, cut at the networks' outputs.

On Megapixel MNIST also by layout, and by how many patches go through the feature network at a time. The networks' maps
take hundreds of megabytes a step, which glibc returns to the system and fetches again, page by page. So on a CPU a
process of its own measures the same with an allocator that keeps them; docs/performance.md has more.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ats
from ats.experiments import cost
from ats.experiments.build import build_model
from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.models.classifier import ATSClassifier, ChannelsLast
from bench.measure import Rounds, synchronise
from bench.rehearsal import pinned, small
from bench.report import Group, Report

SECTION = "parts"
BATCH, N_PATCHES = 16, 10
CHUNK = 20  # patches at a time, whose maps stay in cache
ROUNDS, LEAST_SECONDS = 3, 3.0
VIEW, ATTENTION, FEATURES = "the view", "attention network", "feature network"
SAMPLING, REST = "sampling, gathering and pooling", "head, loss and optimiser"
PARTS = VIEW, ATTENTION, FEATURES, SAMPLING, REST
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}  # bytes
PUBLISHED_N = {"megapixel-mnist": 10, "colon-cancer": 10, "speed-limits": 5}


def published(experiment: str) -> ExperimentConfig:
    """Attention sampling as published."""
    return cost.published(experiment, ModelConfig(n_patches=PUBLISHED_N[experiment]))


class Chunked(nn.Module):
    """A feature network that takes some patches at a time."""

    def __init__(self, feature: nn.Module, chunk: int) -> None:
        super().__init__()
        self.feature = feature
        self.chunk = chunk

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (M, C, ph, pw) -> features (M, D)."""
        return torch.cat([self.feature(part) for part in patches.split(self.chunk)])


def contiguous(network: nn.Sequential) -> nn.Sequential:
    """The same network without what makes it channels-last."""
    network = nn.Sequential(*(layer for layer in network if not isinstance(layer, ChannelsLast)))
    for parameter in network.parameters():
        parameter.data = torch.empty(parameter.shape).copy_(parameter.data)
    return network


def channels_last_model(config: ExperimentConfig) -> ATSClassifier:
    """As the library has it by itself."""
    model = build_model(config)
    assert isinstance(model, ATSClassifier)
    return model


def contiguous_model(config: ExperimentConfig) -> ATSClassifier:
    model = channels_last_model(config)
    model.sampling.attention = contiguous(model.sampling.attention)
    model.sampling.feature = contiguous(model.sampling.feature)
    return model


def chunked_model(config: ExperimentConfig) -> ATSClassifier:
    model = channels_last_model(config)
    model.sampling.feature = Chunked(model.sampling.feature, CHUNK)
    return model


VARIANTS = {
    "channels-last": channels_last_model,
    "contiguous": contiguous_model,
    f"channels-last, {CHUNK} patches at a time": chunked_model,
}


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


@dataclass(frozen=True)
class SplitStep:
    """A training step in parts; the backward passes of the networks are timed with them.

    Args:
        model: of attention sampling.
        config: of the experiment.
        image: (B, C, H, W) in main memory, pinned where the model is on a GPU.
        view: where it is given; else it is made in every step.
        draws: of each image, whose loss is the mean over them.
    """

    model: ATSClassifier
    config: ExperimentConfig
    image: Tensor
    view: Tensor | None = None
    draws: int = 1

    def __call__(self, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        """Seconds by part."""
        sampling, device = self.model.sampling, self.model.head.weight.device
        batch = len(self.image)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        clock = Clock(device)
        view = self.make_view() if self.view is None else self.view
        clock.spent_on(VIEW)
        logits = sampling.attention_logits(view, self.image)
        clock.spent_on(ATTENTION)
        logits_leaf = logits.detach().requires_grad_()
        for number in range(self.draws):
            sample = sampling.sampler(self.image, logits_leaf, view_size=tuple(view.shape[-2:]))
            clock.spent_on(SAMPLING)
            features = sampling.feature(sample.patches.flatten(0, 1)).unflatten(0, (batch, -1))
            clock.spent_on(FEATURES)
            features_leaf = features.detach().requires_grad_()
            pooled = ats.pool(
                features_leaf, sample, estimator=sampling.estimator, control_variate=sampling.control_variate
            )
            clock.spent_on(SAMPLING)
            pooled_leaf = pooled.detach().requires_grad_()
            (F.cross_entropy(self.model.classify(pooled_leaf), labels) / self.draws).backward()
            clock.spent_on(REST)
            weight = self.config.optim.entropy_weight if number == 0 else 0.0  # of the logits, whatever is drawn
            bonus = -weight * sample.entropy.mean()
            torch.autograd.backward([pooled, bonus], [pooled_leaf.grad, torch.ones_like(bonus)])
            clock.spent_on(SAMPLING)
            if features.requires_grad:  # not where they were taught beforehand
                features.backward(features_leaf.grad)
            clock.spent_on(FEATURES)
        logits.backward(logits_leaf.grad)
        clock.spent_on(ATTENTION)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        clock.spent_on(REST)
        return clock.seconds

    def make_view(self) -> Tensor:
        """(B, C, h, w) on the model's device."""
        return cost.view_on(self.model.head.weight.device, self.config, self.image)


def split_steps(steps: dict[str, SplitStep], rounds: int) -> dict[str, Rounds]:
    """By step, seconds of each part by round: all in turn, after one of each that is not counted."""
    optimisers = {name: torch.optim.Adam(step.model.parameters(), fused=True) for name, step in steps.items()}
    taken: dict[str, Rounds] = {name: {part: [] for part in PARTS} for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            for part, seconds in step(optimisers[name]).items():
                if round_:
                    taken[name][part].append(seconds)
    return taken


def measure_variants(device: torch.device, rounds: int = ROUNDS) -> dict[str, Rounds]:
    """Steps of all variants on Megapixel MNIST, view given."""
    config = published("megapixel-mnist")
    image = cost.random_images(config, batch=small(BATCH, 2))[0].to(device)
    steps = {}
    for name, build in VARIANTS.items():
        step = SplitStep(build(config).to(device), config, image)
        steps[name] = replace(step, view=step.make_view())
    return split_steps(steps, rounds)


def add_group(report: Report, name: str, steps: dict[str, Rounds]) -> Group:
    """Put the times of whole steps and of their parts into the report."""
    group = Group(name, section=report.section)
    for label, parts in steps.items():
        group.rounds[label] = [sum(seconds) for seconds in zip(*parts.values(), strict=True)]
        for part, seconds in parts.items():
            if max(seconds) > 1e-4:  # a view that was given is no part
                group.rounds[f"{label}: {part}"] = seconds
    report.groups.append(group)
    return group


@pytest.mark.parametrize("experiment", PUBLISHED_N)
def bench_parts(report: Report, experiment: str) -> None:
    """A step at batch size 1 from an image in main memory, as published."""
    config = published(experiment)
    image = cost.random_images(config)[0]
    image = pinned(image, report.device)
    label = f"ATS-{PUBLISHED_N[experiment]}"
    step = {label: SplitStep(channels_last_model(config).to(report.device), config, image)}
    quick = split_steps(step, 2)[label]
    seconds = sum(parts[-1] for parts in quick.values())
    parts = split_steps(step, small(max(ROUNDS, min(100, round(LEAST_SECONDS / seconds))), ROUNDS))
    group = add_group(report, f"Parts of a training step: {experiment}, batch 1", parts)
    share = group.ratio(f"{label}: {SAMPLING}", label) * 100
    if experiment == "speed-limits":
        group.at_most(5, share, "of the step is sampling, gathering and pooling", "%", headline=True)


def bench_training_step(report: Report) -> None:
    name = f"Training step on Megapixel MNIST: batch {BATCH}, view given"
    group = add_group(report, name, measure_variants(report.device))
    if not report.on_gpu:
        outside = sum(group.time(f"channels-last: {part}").median for part in (SAMPLING, REST))
        share = 100 * outside / group.time("channels-last").median
        group.at_most(3, share, "of the step is outside the two networks", "%")
        group.at_least(1.6, group.ratio("contiguous", "channels-last"), "faster channels-last than contiguous")


def bench_training_step_with_memory_kept(report: Report) -> None:
    if report.on_gpu:
        pytest.skip("about the CPU's allocator")
    command = [sys.executable, "-m", "bench.bench_training_step", str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | KEEPING, check=True, stdout=subprocess.PIPE, text=True)
    group = add_group(report, f"The same step, {' '.join(KEEPING)} set", json.loads(done.stdout))
    group.notes.append(f"{' '.join(f'{name}={value}' for name, value in KEEPING.items())}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    print(json.dumps(measure_variants(torch.device("cpu"))))
