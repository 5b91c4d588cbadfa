"""One training step, a sample, of every method of the paper's tables: at the published sizes, batch 1 and 16.

From images in main memory: making the view and reading the patches are part of a step. Networks, weights and images are
the same for all methods. Memory is measured first: on a CPU in fresh processes, where one that runs out of it ends.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ats.experiments import cost
from ats.experiments.config import ExperimentConfig
from ats.experiments.registry import tables
from ats.experiments.tables import Row, Table
from bench import rehearsal
from bench.measure import ONCE, SLOW_ROUNDS, Method, available_bytes, scratch_bytes
from bench.rehearsal import few, on_gpu, pinned, small
from bench.report import Group, Report

SECTION = "table1"
COPIES = 4  # of the images, used in turn
FIRST = {"table1": "ATS-10", "table2": "ATS-5", "mnist": "ATS-10"}  # what the others are compared with
LARGE_BATCH = 16
FITS = 0.7  # of the free memory
STEP_SECONDS = 2.5  # the longest step of a large batch that a run has time for, on a CPU

Configs = Mapping[str, ExperimentConfig]


def rows_of(table: Table) -> list[Row]:
    """The paper's methods, the one that the others are compared with first."""
    rows = [row for row in table.rows if row.name != "Gated Deep MIL"]
    return list(few(sorted(rows, key=lambda row: row.name != FIRST[table.name])))


def peaks(device: torch.device, measures: Mapping[str, Callable[[], int]], group: Group) -> None:
    """Fill in `group.memory`: two processes at a time on a CPU. What cannot be measured does not run."""
    with ThreadPoolExecutor(1 if on_gpu(device) else 2) as threads:
        futures = {name: threads.submit(measure) for name, measure in measures.items()}
    for name, future in futures.items():
        try:
            group.memory[name] = future.result()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            group.not_run[name] = f"a step failed: {str(error).splitlines()[-1]}"


def peak_bytes(
    config: ExperimentConfig, device: torch.device, image_size: tuple[int, int] | None = None, *, given: bool = False
) -> int:
    """`cost.measure_bytes`; in a rehearsal without the processes that it starts on a CPU, and no GPU's way has."""
    if not rehearsal.active:
        return cost.measure_bytes(config, device, image_size=image_size, given=given)
    return scratch_bytes(repeated(cost.training_step(config, device, image_size)), device)[0]


def unaffordable(seconds: float, peak: float, limit: float, device: torch.device) -> str | None:
    """Why a step that is expected to take so many seconds and bytes is not run, or None."""
    free = available_bytes(device)
    if peak > FITS * free:  # the rest is for what else a machine does
        share = f"more than {FITS:.0%} of the {free / 1e9:.0f} free"
        return f"does not fit: a step would take about {peak / 1e9:,.0f} GB, {share}"
    if not on_gpu(device) and seconds > limit:
        return f"a step would take about {seconds:.0f} s, and a run has {limit:g} s for it"
    return None


def repeated(step: cost.Step) -> Method:
    """A step as a method: it rotates its inputs by itself."""
    return lambda index: step()


def compare_steps(
    report: Report,
    name: str,
    configs: Configs,
    batch: int,
    expected: Group | None = None,
    *,
    seconds: float = 3.0,
    slow_rounds: int = SLOW_ROUNDS,
) -> Group:
    """Time a sample of every configuration, and memory at batch size 1; `expected` is the group of that."""
    group, device = Group(name), report.device
    chosen = dict(configs)
    for label in configs if expected else ():
        if label in expected.not_run:
            reason: str | None = expected.not_run[label]
        else:
            single = expected.time(label).median / 1e3
            # The first is what the others are compared with.
            limit = STEP_SECONDS if label != next(iter(configs)) else ONCE
            reason = unaffordable(batch * single, batch * expected.memory[label], limit, device)
        if reason:
            group.not_run[label] = reason
            del chosen[label]
    if expected is None:
        measures = {label: lambda config=config: peak_bytes(config, device) for label, config in chosen.items()}
        peaks(device, measures, group)
        chosen = {label: config for label, config in chosen.items() if label in group.memory}
        for label in [label for label in chosen if group.memory[label] > FITS * available_bytes(device)]:
            group.not_run[label] = f"does not fit: a step took {group.memory[label] / 1e9:.1f} GB"
            del chosen[label]
    images = cost.random_images(next(iter(configs.values())), batch=batch, copies=COPIES)
    images = [pinned(image, device) for image in images]
    steps = {label: cost.training_step(config, device, images=images) for label, config in chosen.items()}
    timed = report.compare(
        name,
        {label: repeated(step) for label, step in steps.items()},
        seconds=seconds,
        per="sample",
        samples=batch,
        steps=True,
        slow_rounds=slow_rounds,
    )
    timed.memory = group.memory
    timed.not_run = group.not_run
    return timed


_TABLES = [pytest.param(table, id=name, marks=pytest.mark.section(name)) for name, table in tables().items()]


@pytest.mark.parametrize("table", _TABLES)
def bench_table(report: Report, table: Table) -> None:
    rows = rows_of(table)
    configs = {row.name: cost.published(table.experiment, table.model(row, "paper")) for row in rows}
    published = {
        row.name: (row.published.seconds_per_sample, row.published.bytes_per_sample) for row in rows if row.published
    }
    # Deep MIL's second a step allows more rounds in table 1 than elsewhere; two headlines depend on them.
    seconds, slow_rounds = (12.0, 9) if table.name == "table1" else (6.0, SLOW_ROUNDS)
    single = compare_steps(report, f"{table.title}, batch 1", configs, 1, seconds=seconds, slow_rounds=slow_rounds)
    single.published = published
    if table.name == "table1":
        single.notes.append(f"A method whose first call takes more than {ONCE:g} s is not called again.")
    if not report.on_gpu and {"Deep MIL", FIRST[table.name]} <= single.rounds.keys():
        add_targets(single, table)
    batch = small(LARGE_BATCH, 2)
    compare_steps(report, f"{table.title}, batch {batch}", configs, batch, single)


def add_targets(group: Group, table: Table) -> None:
    """What attention sampling is claimed to cost beside Deep MIL."""
    ours = FIRST[table.name]
    memory = group.memory["Deep MIL"] / group.memory[ours]
    faster = group.ratio("Deep MIL", ours)
    if table.name == "table1":
        group.at_least(60, faster, f"faster than Deep MIL is {ours}", headline=True)
        group.at_least(20, memory, f"less memory than Deep MIL takes {ours}", headline=True)
    elif table.name == "table2":
        group.at_least(10, faster, f"faster than Deep MIL is {ours}", headline=True)
