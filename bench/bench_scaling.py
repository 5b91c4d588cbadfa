"""Time and memory against the size of the image, the number of cells, and the number of patches."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import ats_kernels
from ats.experiments import cost
from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.experiments.presets import PRESETS
from bench.bench_tables import peaks, unaffordable
from bench.measure import Method, available_bytes, seconds_a_call
from bench.report import Group, Report

SECTION = "scaling"
COPIES = 4
GRID = 180  # cells along an axis, and pixels of the view
SIDES = (500, 1000, 2000, 4000, 8000, 16_000, 32_768, 40_000)
MEGAPIXEL, GIGAPIXEL = 1000, 32_768
STEP_SECONDS = 6.0  # the longest step that a run has time for, on a CPU
LARGEST_SHARE = 0.3  # of the free memory, that an image may take
WITHIN = 10  # percent


def config_at(side: int, method: str) -> ExperimentConfig:
    """Megapixel MNIST's networks, 10 patches from 180×180 cells or as the method has it, on images of another size."""
    config = cost.published("megapixel-mnist", ModelConfig(method=method, n_patches=10))  # type: ignore[arg-type]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, view_scale=min(1.0, GRID / side)))


def label(line: str, side: int) -> str:
    return f"{line}, {side:,} pixels a side"


ATS, WITH_VIEW, CNN, MIL = "ATS-10, view given", "ATS-10, view made", "CNN 1", "Deep MIL"
LINES = {ATS: "ats", WITH_VIEW: "ats", CNN: "cnn", MIL: "mil"}


def bench_image_size(report: Report) -> None:
    """At fixed N and a fixed grid: reading patches costs the same at every size, reading the image grows with it."""
    device = report.device
    sides = [side for side in SIDES if side**2 < LARGEST_SHARE * available_bytes(torch.device("cpu"))]
    images = {side: cost.random_images(config_at(side, "ats"), (side, side)) for side in sides}
    if device.type == "cuda":
        images = {side: [batch.pin_memory() for batch in batches] for side, batches in images.items()}
    group = Group("to find out what fits")
    points: dict[str, tuple[str, float]] = {}
    methods: dict[str, Method] = {}
    measures = {}
    for line, method in LINES.items():
        for side in sides:
            name, config = label(line, side), config_at(side, method)
            points[name] = line, side
            if line in (CNN, MIL):
                reason = too_large(group, points, line, side, device)
                if reason:
                    group.not_run[name] = reason
                    continue
            step = cost.training_step(config, device, images=images[side], view_given=line == ATS)
            if line in (CNN, MIL):
                peaks(device, {name: bytes_beyond_image(config, side, line, device)}, group)
                if name in group.not_run:
                    continue
                methods[name] = lambda index, step=step: step()
                group.rounds[name] = [seconds_a_call(methods[name], device)]
            elif line == ATS:
                measures[name] = bytes_beyond_image(config, side, line, device)
            methods[name] = lambda index, step=step: step()
    peaks(device, measures, group)
    timed = report.compare(
        f"A training step by the image's size: N = 10, {GRID}×{GRID} cells, batch 1",
        methods,
        seconds=24.0,
        per="sample",
        steps=True,
    )
    timed.memory = {name: group.memory[name] for name in methods if name in group.memory}
    timed.points, timed.not_run = points, group.not_run
    timed.notes.append("Memory is what a step takes beyond the image itself.")
    for side in SIDES:
        if side not in sides:
            timed.not_run[label("all", side)] = "the image alone would take too much of the free memory"
    if GIGAPIXEL in sides:
        add_targets(timed)


def bytes_beyond_image(config: ExperimentConfig, side: int, line: str, device: torch.device) -> Callable[[], int]:
    """A function that measures the memory of a step."""
    return lambda: cost.measure_bytes(
        config, device, image_size=(side, side), view_given=line == ATS, with_images=False
    )


def too_large(
    group: Group, points: dict[str, tuple[str, float]], line: str, side: int, device: torch.device
) -> str | None:
    """Why a method that reads the whole image is not run at this size: time and memory grow as the pixels do."""
    smaller = [(name, x) for name, (other, x) in points.items() if other == line and name in group.rounds]
    if not smaller:
        return None
    name, largest = smaller[-1]
    growth = (side / largest) ** 2
    return unaffordable(growth * group.rounds[name][0], growth * group.memory[name], STEP_SECONDS, device)


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


def bench_number_of_cells(report: Report) -> None:
    report.section = "sampling-space"
    n, methods, points = 10, {}, {}
    ways = {
        "ats_kernels.sample": lambda logits: ats_kernels.sample(logits, n),
        "torch.multinomial(logits.softmax(-1))": lambda logits: torch.multinomial(logits.softmax(-1), n),
        "Gumbel top-k": lambda logits: gumbel_top_k(logits, n),
        "one read: logits.amax()": lambda logits: logits.amax(-1),
    }
    for way, draw in ways.items():
        for power in range(8, 25, 2):
            name = f"{way}, K = 2^{power}"
            logits = [torch.randn(1, 2**power, device=report.device) for _ in range(COPIES)]
            methods[name] = lambda index, draw=draw, logits=logits: draw(logits[index % COPIES])
            points[name] = way, 2**power
    group = report.compare("A draw by the number of cells: B = 1, N = 10", methods, copies=COPIES, seconds=12.0)
    group.points = points


def bench_number_of_patches(report: Report) -> None:
    report.section = "patches"
    images = cost.random_images(PRESETS["colon-cancer"]["paper"], copies=COPIES)
    methods, points = {}, {}
    for method, line in (("ats", "ATS-N"), ("uniform", "U-N")):
        for n in (1, 2, 5, 10, 25, 50, 100, 250):
            name = line.replace("N", str(n))
            config = cost.published("colon-cancer", ModelConfig(method=method, n_patches=n))  # type: ignore[arg-type]
            step = cost.training_step(config, report.device, images=images)
            methods[name] = lambda index, step=step: step()
            points[name] = line, n
    group = report.compare(
        "A training step by the number of patches: colon cancer, batch 1",
        methods,
        seconds=16.0,
        per="sample",
        steps=True,
    )
    group.points = points
