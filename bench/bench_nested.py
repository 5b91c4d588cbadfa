"""Nested attention against the image's size, from one megapixel to 17 gigapixels, beside what reads or views it whole.

What no machine or no run has room for is foretold from the largest size that was measured, and marked so.
"""

from collections.abc import Callable, Sequence

import torch

from ats.experiments import cost
from bench import rehearsal
from bench.bench_tables import peaks, repeated, unaffordable
from bench.measure import scratch_bytes, seconds_a_call
from bench.nested_steps import BEST, DEEP, FLAT, MIL, SAME, prepare, scales_of
from bench.rehearsal import few
from bench.report import Group, Measured, Report

SECTION = "nested"
SIDES = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
NESTED = SAME, DEEP
READ_ALL = FLAT, MIL, BEST
STEP_SECONDS = 6.0  # the longest step that a run has time for, on a CPU
WITHIN = 10  # percent


def sides() -> Sequence[int]:
    """The images' sides; in a rehearsal the first."""
    return few(SIDES, 1)


def label(line: str, side: int) -> str:
    return f"{line}, {side:,} pixels a side"


def bench_nested(report: Report) -> None:
    """A step of nested attention costs the same at every size, or a level more where it must see as much."""
    device = report.device
    group = Group("to find out what fits")
    points = {label(line, side): (line, side) for line in (*NESTED, *READ_ALL) for side in sides()}
    measure_memory(group, [(line, SIDES[0]) for line in READ_ALL], device)
    for line in READ_ALL:
        first = label(line, SIDES[0])
        if first in group.memory:
            step = repeated(prepare(line, SIDES[0], device)())
            seconds_a_call(step, device)
            group.rounds[first] = [seconds_a_call(step, device)]
        for side in sides()[1:]:
            reason = too_large(group, line, side, device)
            if reason:
                group.not_run[label(line, side)] = reason
    larger = [(line, side) for line in READ_ALL for side in sides()[1:] if label(line, side) not in group.not_run]
    measure_memory(group, [*larger, *((line, side) for line in NESTED for side in sides())], device)
    steps = {name: repeated(prepare(*point, device)()) for name, point in points.items() if name not in group.not_run}
    timed = report.compare(
        "A training step by the image's size, nested and not: 32 patches of 64×64, batch 1, views given",
        steps,
        seconds=90.0,
        per="sample",
        steps=True,
    )
    timed.axis, timed.points = "side of the image, pixels", dict(points)
    timed.memory, timed.not_run = group.memory, group.not_run
    foretell(timed)
    timed.notes += notes()
    add_targets(timed)


def measure_memory(group: Group, chosen: Sequence[tuple[str, int]], device: torch.device) -> None:
    """Fill in what steps take beyond the view, and which of them fail."""

    def measure(line: str, side: int) -> Callable[[], int]:
        if rehearsal.active:
            return lambda: scratch_bytes(repeated(prepare(line, side, device)()), device)[0]
        return lambda: cost.measure_rise(
            prepare, (line, side, device), device, warm=(line, SIDES[0], device), what=label(line, side)
        )

    peaks(device, {label(*point): measure(*point) for point in chosen}, group)


def growth(line: str, side: int, known: int) -> tuple[float, float]:
    """How many times the time and the memory at one size those at another are: what is read or viewed grows so."""
    pixels = (side / known) ** 2
    return pixels, 1.0 if line == BEST else pixels


def too_large(group: Group, line: str, side: int, device: torch.device) -> str | None:
    """Why what looks at the whole image is not run at this size."""
    first = label(line, SIDES[0])
    if first in group.not_run:
        return group.not_run[first]
    longer, more = growth(line, side, SIDES[0])
    return unaffordable(longer * group.rounds[first][0], more * group.memory[first], STEP_SECONDS, device)


def foretell(group: Group) -> None:
    """Fill in what was not run, from the largest size of its line that was."""
    for line in READ_ALL:
        run = [side for side in sides() if label(line, side) in group.rounds and label(line, side) in group.memory]
        for side in sides() if run else ():
            if label(line, side) in group.not_run:
                longer, more = growth(line, side, run[-1])
                known = label(line, run[-1])
                group.foretold[label(line, side)] = longer * group.time(known).median, more * group.memory[known]


def notes() -> list[str]:
    """What the lines are."""
    scales = "; ".join(f"{side:,}: {', '.join(map(str, scales_of(DEEP, side)))}" for side in sides())
    return [
        "Memory is what a step takes beyond its view, and with its model. Images are generated as they are read.",
        "'The same views': two levels see the image as 256², and 8 regions as 64² with a context of 8, whatever its "
        "size: pixels of the last view are a 1,024th of its side. 'Last view at 1/8': scales of the levels by the "
        f"image's side: {scales}.",
        "Foretold: from the largest size that was run, times the pixels' ratio; the memory of what keeps 32 patches "
        "stays.",
    ]


def add_targets(group: Group) -> None:
    """Flat from a megapixel to ten gigapixels and more."""
    small, large = label(SAME, SIDES[0]), label(SAME, sides()[-1])
    most = 1 + WITHIN / 100
    group.at_most(most, group.ratio(large, small), "nested: time, 17 gigapixels over 1 megapixel", headline=True)
    times = [group.time(label(SAME, side)) for side in sides()]
    spread = Measured(*(max(of) / min(of) for of in ([t.median for t in times], [t.best for t in times])))
    group.at_most(most, spread, "nested: time, the slowest size over the quickest")
    if {small, large} <= group.memory.keys():
        memory = group.memory[large] / group.memory[small]
        group.at_most(most, memory, "nested: memory, 17 gigapixels over 1 megapixel", headline=True)
