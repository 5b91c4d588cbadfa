"""What a sample costs by each method of a table, measured once on a machine."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ats._files import write_json
from ats.experiments.config import ExperimentConfig
from ats.experiments.console import plain_console
from ats.experiments.cost import measure_bytes, measure_seconds, published
from ats.experiments.environment import hardware, versions
from ats.experiments.reproduce.runs import read_json
from ats.experiments.tables import Table


def costs(table: Table, path: Path, *, measure: bool) -> dict[str, Any]:
    """Seconds and bytes a sample by row, with the hardware and versions that they were measured with.

    They are measured again where those have changed. Sizes and networks are always the published ones.

    Args:
        table: whose rows.
        path: JSON file that keeps them.
        measure: whether to measure what is not there; else what is there is returned, if anything.
    """
    here = {"hardware": hardware(), "versions": versions()}
    recorded = read_json(path) or here | {"rows": {}}
    configs: dict[str, ExperimentConfig] = {
        row.name: published(table.experiment, table.model(row, "paper")) for row in table.rows
    }
    up_to_date = all(recorded[name] == here[name] for name in here) and configs.keys() <= recorded["rows"].keys()
    if up_to_date or not measure:
        return recorded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain_console().print(f"Measuring on {device} what a sample costs: {', '.join(configs)}")
    peaks = {name: measure_bytes(config, device) for name, config in configs.items()}
    timings = measure_seconds(configs, device)
    rows = {name: {"bytes": peaks[name], "seconds": dataclasses.asdict(timings[name])} for name in configs}
    measured = here | {"device": device, "rows": rows}
    write_json(path, measured)
    return measured
