"""Time and memory against the size of the image, the number of cells, and the number of patches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

import ats_kernels
from ats.experiments import cost
from ats.experiments.config import ExperimentConfig, ModelConfig
from bench import rehearsal
from bench.bench_tables import peak_bytes, peaks, repeated, unaffordable
from bench.measure import available_bytes, rotation, seconds_a_call
from bench.rehearsal import few, pinned
from bench.report import Group, Report

SECTION = "scaling"
COPIES = 4
GRID = 180  # cells along an axis, and pixels of the view
SIDES = (500, 1000, 2000, 4000, 8000, 16_000, 32_768, 40_000)
MEGAPIXEL, GIGAPIXEL = 1000, 32_768
REHEARSED = (200, 300)
WITH_MEMORY = (500, MEGAPIXEL, 8000, GIGAPIXEL)
STEP_SECONDS = 6.0  # the longest step that a run has time for, on a CPU
LARGEST_SHARE = 0.3  # of the free memory, that an image may take
WITHIN = 10  # percent


def config_at(side: int, method: str, grid: int = GRID) -> ExperimentConfig:
    """Megapixel MNIST's networks on images of another size, with 10 patches from grid×grid cells."""
    config = cost.published("megapixel-mnist", ModelConfig(method=method, n_patches=10))  # type: ignore[arg-type]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, view_scale=min(1.0, grid / side)))


def label(line: str, side: int) -> str:
    return f"{line}, {side:,} pixels a side"


ATS, WITH_VIEW, CNN, MIL = "ATS-10, view given", "ATS-10, view made", "CNN 1", "Deep MIL"
LINES = {ATS: "ats", WITH_VIEW: "ats", CNN: "cnn", MIL: "mil"}
READ_ALL = CNN, MIL


def bench_image_size(report: Report) -> None:
    """At fixed N and a fixed grid: reading patches costs the same at every size, reading the image grows with it."""
    device = report.device
    wanted = REHEARSED if rehearsal.active else SIDES
    sides = [side for side in wanted if side**2 < LARGEST_SHARE * available_bytes(torch.device("cpu"))]
    images = {side: cost.random_images(config_at(side, "ats"), (side, side)) for side in sides}
    images = {side: [pinned(batch, device) for batch in batches] for side, batches in images.items()}
    group = Group("to find out what fits")
    points = {label(line, side): (line, side) for line in LINES for side in sides}

    def step(line: str, side: int) -> cost.Step:
        config = config_at(side, LINES[line])
        views = [cost.view_on(device, config, image) for image in images[side]] if line == ATS else None
        return cost.training_step(config, device, images=images[side], views=views)

    measure_memory(group, [(line, sides[0]) for line in READ_ALL], device)
    for line in READ_ALL:
        first = label(line, sides[0])
        if first in group.memory:
            group.rounds[first] = [seconds_a_call(repeated(step(line, sides[0])), device)]
        for side in sides[1:]:
            reason = too_large(group, line, sides[0], side, device)
            if reason:
                group.not_run[label(line, side)] = reason
    larger = [(line, side) for line in READ_ALL for side in sides[1:] if label(line, side) not in group.not_run]
    measure_memory(group, [*larger, *((ATS, side) for side in sides if side in (*WITH_MEMORY, *REHEARSED))], device)
    timed = report.compare(
        f"A training step by the image's size: N = 10, {GRID}×{GRID} cells, batch 1",
        {name: repeated(step(*point)) for name, point in points.items() if name not in group.not_run},
        seconds=7.0,
        per="sample",
        steps=True,
    )
    timed.axis, timed.points = "side of the image, pixels", dict(points)
    timed.memory, timed.not_run = group.memory, group.not_run
    timed.notes.append("Memory is what a step takes beyond the image itself.")
    left_out = [f"{side:,}" for side in wanted if side not in sides]
    if left_out:
        timed.notes.append(f"Left out, as the free memory is too small: sides of {', '.join(left_out)} pixels.")
    if GIGAPIXEL in sides:
        add_targets(timed)


def measure_memory(group: Group, chosen: Sequence[tuple[str, int]], device: torch.device) -> None:
    """Fill in what steps take beyond the image, and which of them fail."""

    def measure(line: str, side: int) -> Callable[[], int]:
        return lambda: peak_bytes(config_at(side, LINES[line]), device, (side, side), given=True)

    peaks(device, {label(line, side): measure(line, side) for line, side in chosen}, group)


def too_large(group: Group, line: str, smallest: int, side: int, device: torch.device) -> str | None:
    """Why a method that reads the whole image is not run at this size: time and memory grow as the pixels do."""
    known, growth = label(line, smallest), (side / smallest) ** 2
    if known in group.not_run:
        return group.not_run[known]
    return unaffordable(growth * group.rounds[known][0], growth * group.memory[known], STEP_SECONDS, device)


def add_targets(group: Group) -> None:
    """Flat from a megapixel to a gigapixel."""
    small, large = label(ATS, MEGAPIXEL), label(ATS, GIGAPIXEL)
    group.at_most(1 + WITHIN / 100, group.ratio(large, small), "time, 1 gigapixel over 1 megapixel", headline=True)
    if {small, large} <= group.memory.keys():
        memory = group.memory[large] / group.memory[small]
        group.at_most(1 + WITHIN / 100, memory, "memory, 1 gigapixel over 1 megapixel", headline=True)


def gumbel_top_k(logits: Tensor, n: int) -> Tensor:
    """Without replacement, by a random number a cell."""
    return (logits - torch.empty_like(logits).exponential_().log_()).topk(n).indices


@pytest.mark.section("sampling-space")
def bench_number_of_cells(report: Report) -> None:
    n, methods, points = 10, {}, {}
    ways = {
        "ats_kernels.sample": lambda logits: ats_kernels.sample(logits, n),
        "torch.multinomial(logits.softmax(-1))": lambda logits: torch.multinomial(logits.softmax(-1), n),
        "Gumbel top-k": lambda logits: gumbel_top_k(logits, n),
        "one read: logits.amax()": lambda logits: logits.amax(-1),
    }
    most = 0
    for power in few((8, 12, 16, 20, 22, 24), 3):
        copies = rotation(report.device, 4 * 2**power, COPIES)
        most = max(most, copies)
        logits = [torch.randn(1, 2**power, device=report.device) for _ in range(copies)]
        for way, draw in ways.items():
            name = f"{way}, K = 2^{power}"
            methods[name] = lambda index, draw=draw, logits=logits: draw(logits[index % len(logits)])
            points[name] = way, 2**power
    group = report.compare("A draw by the number of cells: B = 1, N = 10", methods, copies=most, seconds=4.0)
    group.axis, group.points = "cells K", points


def compare_sizes(
    report: Report, name: str, axis: str, configs: Mapping[tuple[str, int], ExperimentConfig], batch: int = 1
) -> None:
    """Training steps of configurations that are named by a line and a size."""
    configs = dict(few(list(configs.items())))
    images = cost.random_images(next(iter(configs.values())), batch=batch, copies=COPIES)
    methods = {
        f"{line}, {size}": repeated(cost.training_step(config, report.device, images=images))
        for (line, size), config in configs.items()
    }
    group = report.compare(name, methods, seconds=0.8 * len(methods), per="sample", samples=batch, steps=True)
    group.axis, group.points = axis, dict(zip(methods, configs, strict=True))


@pytest.mark.section("sampling-space")
def bench_view_size(report: Report) -> None:
    configs = {("ATS-10", side): config_at(1500, "ats", grid=side) for side in (45, 90, 180, 360)}
    compare_sizes(report, "A training step by the view's size: Megapixel MNIST, batch 1", "side of the view", configs)


@pytest.mark.section("patches")
def bench_number_of_patches(report: Report) -> None:
    configs = {
        (line, n): cost.published("colon-cancer", ModelConfig(method=method, n_patches=n))  # type: ignore[arg-type]
        for line, method in (("ATS-N", "ats"), ("U-N", "uniform"))
        for n in (1, 5, 10, 25, 50, 100, 250)
    }
    compare_sizes(report, "A training step by the number of patches: colon cancer, batch 1", "patches N", configs)


@pytest.mark.section("patches")
def bench_patch_size(report: Report) -> None:
    config = cost.published("megapixel-mnist", ModelConfig(n_patches=10))
    configs = {
        ("ATS-10", side): dataclasses.replace(config, model=dataclasses.replace(config.model, patch_size=side))
        for side in (25, 50, 100, 200)
    }
    compare_sizes(report, "A training step by the patches' size: Megapixel MNIST, batch 1", "side of a patch", configs)
