"""`ats reproduce`: run what is missing of the paper's tables and figures, and report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ats.experiments.console import plain_console
from ats.experiments.options import parse
from ats.experiments.registry import EXPERIMENTS, experiment_data, tables
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
    """table1: colon cancer; table2: speed limits; mnist: Megapixel MNIST; figures: of their complete runs, and a
    sweep of the entropy weight on colon cancer."""
    preset: Literal["paper", "modern", "quick"] = "quick"
    """As published, our best, or small enough for a few CPU cores."""
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


def reproduce(options: ReproduceOptions) -> None:
    """Run and report what the options name.

    Raises:
        ValueError: methods without a table that they are of.
    """
    if options.what not in tables() and options.methods:
        raise ValueError(f"methods are those of one table: name {', '.join(tables())} in place of {options.what}")
    for table in tables().values():
        if options.what in (table.name, "all"):
            _table(table, options)
    if options.what in ("figures", "all"):
        _figures(options)


def _figures(options: ReproduceOptions) -> None:
    folder, written = options.output / "figures", []
    for table in tables().values():
        runs = complete_runs(table, options.preset, options.seeds, options.output, _data_folder(table, options))
        written += draw_figures(table, runs, folder)
        if options.train and table.swept is not None:
            written += sweep_entropy(table, options.preset, options.output, _data_folder(table, options), folder)
    plain_console().print(f"Written: {', '.join(map(str, written)) or 'nothing'}", soft_wrap=True)


def _data_folder(table: Table, options: ReproduceOptions) -> Path | None:
    if options.data is None:
        return None
    return options.data / EXPERIMENTS[table.experiment].options.subfolder()


def _table(table: Table, options: ReproduceOptions) -> None:
    preset, output, folder = options.preset, options.output, _data_folder(table, options)
    configs = {
        (row.name, seed): table.config(row, preset, seed, output, folder)
        for row in table.rows
        for seed in range(options.seeds)
    }
    any_config = next(iter(configs.values()))
    source = check_same_data(
        output / table.name / preset, lambda: experiment_data(any_config).source, look=options.train
    )
    if options.train:
        chosen = [row.name for row in table.chosen(preset, options.methods)]
        # Seed by seed: a table that was stopped has something of every method.
        jobs = [
            Job(f"{table.name}, {name}, seed {seed}", configs[name, seed])
            for seed in range(options.seeds)
            for name in chosen
        ]
        run_jobs(jobs, options.gpus or range(torch.cuda.device_count()))
    measured = costs(table, output / table.name / "cost.json", measure=options.cost)
    rows = []
    for row in table.rows:
        found = {seed: result_of(configs[row.name, seed]) for seed in range(options.seeds)}
        results = {seed: result for seed, result in found.items() if result is not None}
        rows.append(row_values(row, preset, results, measured, source))
    paths = write_report(table, preset, any_config, rows, output)
    plain_console().print(paths[-1].read_text(), soft_wrap=True)
    plain_console().print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)


def run_reproduce(arguments: list[str]) -> None:
    """`ats reproduce`."""
    reproduce(parse(ReproduceOptions, "ats reproduce", arguments))
