"""`ats reproduce`: run what is missing of the paper's tables and figures, and report."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ats.experiments.config import ExperimentConfig, Precision
from ats.experiments.console import plain_console
from ats.experiments.options import parse
from ats.experiments.registry import EXPERIMENTS, experiment_data, tables
from ats.experiments.reproduce.budget import of_minutes
from ats.experiments.reproduce.costs import costs
from ats.experiments.reproduce.figures import complete_runs, draw_figures, sweep_entropy
from ats.experiments.reproduce.report import row_values, write_report
from ats.experiments.reproduce.runs import Job, check_same_data, result_of, run_jobs
from ats.experiments.tables import Table


def _choices() -> Any:
    """What can be reproduced, as a type whose values the command line lists."""
    return tyro.extras.literal_type_from_choices([*tables(), "figures", "all"])


@dataclass(frozen=True)
class ReproduceOptions:
    """Run what is missing of the paper's tables, and write them as Markdown, CSV and JSON."""

    what: tyro.conf.Positional[Annotated[str, tyro.conf.arg(constructor=_choices())]]
    """table1: colon cancer; table2: speed limits; table2-all: all limits of the German photographs; mnist: Megapixel
    MNIST; figures: of their complete runs, and a sweep of the entropy weight on colon cancer."""
    preset: Literal["paper", "modern", "quick", "view-300"] = "quick"
    """As published, our best, small enough for a few CPU cores or, of Megapixel MNIST, with a larger view."""
    minutes: float = 0.0
    """Train each method for about so many minutes on this machine, in place of the preset's epochs: its steps are
    timed first, and a run of another length is another run; 0: the preset's epochs."""
    precision: Precision = "32-true"
    """Of the trainings; a run of another precision is another run. On CPUs bf16-mixed pays where they have AMX."""
    seeds: int = 3
    """Runs of each method, with the seeds 0, 1, …"""
    methods: tuple[str, ...] = ()
    """Methods to train, named as in the table. Default: all of the table, or with the preset quick those that it can
    train in hours."""
    output: Path = Path("runs/reproduce")
    """Folder for the runs and the tables. Runs that are complete are not run again, one that was stopped goes on."""
    data: Path | None = None
    """Folder that holds mnist/, colon-cancer/ and speed-limits/. Default: $ATS_DATA."""
    train: bool = True
    """Train what is missing; else only report."""
    cost: bool = True
    """Measure what a sample costs, where that was not done on this machine; best while nothing else runs."""
    gpus: tuple[int, ...] = ()
    """GPUs to train on, a run on each at a time. Default: all."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if self.minutes < 0:
            raise ValueError(f"minutes must be at least 0, got {self.minutes}")


def reproduce(options: ReproduceOptions) -> None:
    """Run and report what the options name.

    Raises:
        ValueError: methods without a table that they are of.
    """
    if options.what not in tables() and options.methods:
        raise ValueError(f"methods are those of one table: name {', '.join(tables())} in place of {options.what}")
    if options.what not in tables() and options.minutes:
        raise ValueError(f"minutes are for a table's runs: name {', '.join(tables())} in place of {options.what}")
    for table in tables().values():
        if options.what == table.name or (options.what == "all" and options.preset in table.presets):
            _table(table, options)
    if options.what in ("figures", "all"):
        _figures(options)


def _figures(options: ReproduceOptions) -> None:
    folder, written = options.output / "figures", []
    for table in tables().values():
        if options.preset not in table.presets:
            continue
        runs = complete_runs(_configs(table, options, []))
        written += draw_figures(table, runs, folder)
        if options.train and table.swept is not None:
            written += sweep_entropy(_configs(table, options, [])[table.swept, 0], options.output, folder)
    plain_console().print(f"Written: {', '.join(map(str, written)) or 'nothing'}", soft_wrap=True)


def _data_folder(table: Table, options: ReproduceOptions) -> Path | None:
    if options.data is None:
        return None
    return options.data / EXPERIMENTS[table.experiment].options.subfolder()


def _table(table: Table, options: ReproduceOptions) -> None:
    preset, output = options.preset, options.output
    if preset not in table.presets:
        raise ValueError(f"{table.name} has no preset {preset!r}, expected one of {', '.join(table.presets)}")
    chosen = [row.name for row in table.chosen(preset, options.methods, options.minutes)] if options.train else []
    configs = _configs(table, options, chosen)
    any_config = next(iter(configs.values()))
    source = check_same_data(
        any_config.run_folder.parent, lambda: experiment_data(any_config).source, look=options.train
    )
    if options.train:
        # Seed by seed: a table that was stopped has something of every method.
        jobs = [
            Job(f"{table.name}, {name}, seed {seed}", configs[name, seed], table.tested.get(name, ()))
            for seed in range(options.seeds)
            for name in chosen
        ]
        run_jobs(jobs, options.gpus or range(torch.cuda.device_count()))
    measured = costs(table, output / table.name / "cost.json", measure=options.cost)
    rows = []
    for row in table.rows:
        found = {seed: result_of(configs[row.name, seed]) for seed in range(options.seeds)}
        results = {seed: result for seed, result in found.items() if result is not None}
        seen = dataclasses.replace(row, scale=table.scale(row, preset))
        rows.append(row_values(seen, preset, results, measured, source, options.minutes, options.precision))
    # Described as the preset has it: with --minutes each row has a length of its own.
    described = table.config(table.rows[0], preset, 0, output, _data_folder(table, options), options.precision)
    paths = write_report(table, preset, described, rows, output)
    plain_console().print(paths[-1].read_text(), soft_wrap=True)
    plain_console().print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)


def _configs(table: Table, options: ReproduceOptions, chosen: list[str]) -> dict[tuple[str, int], ExperimentConfig]:
    """The runs of all rows by name and seed: those of a given length where the options say so."""
    configs = {}
    for row in table.rows:
        for seed in range(options.seeds):
            config = table.config(
                row, options.preset, seed, options.output, _data_folder(table, options), options.precision
            )
            if options.minutes:
                kind = config.run_folder.parent
                folder = kind.with_name(f"{kind.name}-{options.minutes:g}-minutes")
                config = dataclasses.replace(config, output=folder / config.run_folder.name)
                tried = folder / f"{row.slug}-steps.json"
                config = of_minutes(config, options.minutes, tried, look=row.name in chosen) or config
            configs[row.name, seed] = config
    return configs


def run_reproduce(arguments: list[str]) -> None:
    """`ats reproduce`."""
    reproduce(parse(ReproduceOptions, "ats reproduce", arguments))
