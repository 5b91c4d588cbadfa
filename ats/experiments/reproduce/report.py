"""A table's results as rows, and the rows as JSON, CSV and Markdown."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ats._files import write_whole
from ats.experiments.config import ExperimentConfig, differences, to_dict
from ats.experiments.environment import describe
from ats.experiments.markdown import wrap
from ats.experiments.reproduce.runs import DRAWS, REPEATS, Result
from ats.experiments.tables import SHORT, Published, Row, Table

NOT_RUN, NOT_MEASURED = "not run", "not measured"
_ATTENTION = ("mass", "uniform_mass", "times_uniform", "hit_rate", "draws_on_target", "average_precision")
_TESTED = {"sample": "one draw", "topk": "the most probable"}
_MEASURED = ("train_loss", "test_error", "seconds_per_sample", "bytes_per_sample")


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and its standard error; None where there are too few values."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def row_values(
    row: Row,
    preset: str,
    results: Mapping[int, Result],
    costs: Mapping[str, Any],
    source: str,
    minutes: float = 0.0,
    precision: str = "32-true",
) -> dict[str, Any]:
    """One row of a table as plain values; None, and an entry in `not_run`, for what was not run.

    Args:
        row: which.
        preset: of the runs.
        results: of its complete runs, by seed.
        costs: of the table, as `reproduce.costs` gives them.
        source: of the data.
        minutes: that each training was given; 0: the preset's epochs.
        precision: of the trainings.
    """
    runs, cost = [results[seed] for seed in sorted(results)], costs["rows"].get(row.name)
    loss, loss_sem = mean_and_error([run.training["metrics"]["train/loss"] for run in runs])
    error, error_sem = mean_and_error([run.evaluation["error"] for run in runs])
    seconds, _ = mean_and_error([run.training["seconds"] for run in runs])
    values: dict[str, Any] = {
        "method": row.name,
        "scale": row.scale,
        "train_loss": loss,
        "train_loss_sem": loss_sem,
        "test_error": error,
        "test_error_sem": error_sem,
        "seconds_per_sample": cost["seconds"]["median"] if cost else None,
        "seconds_per_sample_quartiles": [cost["seconds"]["lower"], cost["seconds"]["upper"]] if cost else None,
        "bytes_per_sample": cost["bytes"] if cost else None,
        "attention": _attention([run.localisation for run in runs if run.localisation]),
        "training_seconds": seconds,
        "runs": len(runs),
        "seeds": sorted(results),
        "images_seen": runs[0].training["steps"] * runs[0].training["ran_on"]["images_a_step"] if runs else None,
        "tested": _tested([run.tested for run in runs if run.tested]),
        "images_tested": sum(run.evaluation["images"] for run in runs),
        "preset": preset,
        "minutes": minutes or None,
        "precision": precision,
        "data": source,
        "paper": None if row.published is None else dataclasses.asdict(row.published),
        "hardware": costs["hardware"],
        "versions": costs["versions"],
        "trained_on": runs[0].training["hardware"] if runs else None,
    }
    return values | {"not_run": [name for name in _MEASURED if values[name] is None]}


def _tested(found: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]] | None:
    """Means and standard errors over runs, by method and by the number of patches that they were tested with."""
    if not found:
        return None
    errors = {
        method: {n: mean_and_error([run[method][n]["error"] for run in found]) for n in found[0][method]}
        for method in _TESTED
    }
    return {
        method: {n: {"test_error": mean, "test_error_sem": error} for n, (mean, error) in by_number.items()}
        for method, by_number in errors.items()
    }


def _attention(found: list[dict[str, Any]]) -> dict[str, float] | None:
    if not found:
        return None
    return {name: math.fsum(run[name] for run in found) / len(found) for name in _ATTENTION}


def write_report(
    table: Table, preset: str, config: ExperimentConfig, rows: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[Path, ...]:
    """Write TABLE.json, TABLE.csv and TABLE.md; each whole or not at all."""
    contents = {
        "json": json.dumps(list(rows), indent=2) + "\n",
        "csv": _csv(rows),
        "md": wrap(markdown(table, preset, config, rows)),
    }
    paths = tuple(folder / f"{table.name}.{ending}" for ending in contents)
    for path, text in zip(paths, contents.values(), strict=True):
        write_whole(path, text.encode())
    return paths


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """All of the rows' values but versions, a column each: of what is nested, e.g. paper_test_error."""
    nested = {
        "seconds_per_sample_quartiles": ("lower", "upper"),
        "attention": _ATTENTION,
        "paper": tuple(field.name for field in dataclasses.fields(Published)),
        "hardware": ("cpu", "threads"),
    }
    plain = [name for name in rows[0] if name not in (*nested, "versions", "trained_on", "not_run", "tested")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*plain, *(f"{name}_{part}" for name, parts in nested.items() for part in parts)])
    for row in rows:
        cells = [_cell(row, name) for name in plain]
        for name, parts in nested.items():
            values = row[name] or {}
            if isinstance(values, list):
                values = dict(zip(parts, values, strict=True))
            cells += [values.get(part) for part in parts]
        writer.writerow(cells)
    return file.getvalue()


def _cell(row: Mapping[str, Any], name: str) -> Any:
    if name in row["not_run"]:
        return NOT_RUN if name in ("train_loss", "test_error") else NOT_MEASURED
    return " ".join(map(str, row[name])) if isinstance(row[name], list) else row[name]


def markdown(table: Table, preset: str, config: ExperimentConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people, with the published figures beside ours and what must be known to read it below."""
    header = ["method", "scale", "train loss", "test error", "time/sample", "memory/sample", "runs"]
    header += ["published: train loss", "error", "time", "memory"]
    with_attention = any(row["attention"] for row in rows)
    if with_attention:
        header += ["attention on target", "× uniform", "draws that hit", "average precision"]
    lines = [f"## {table.title}", "", _line(header), _line(["---"] * len(header))]
    for row in rows:
        cells = [
            row["method"],
            row["scale"],
            _plus_minus(row["train_loss"], row["train_loss_sem"]),
            _plus_minus(row["test_error"], row["test_error_sem"]),
            _milliseconds(row["seconds_per_sample"]),
            _megabytes(row["bytes_per_sample"]),
            str(row["runs"]),
        ]
        paper = row["paper"]
        cells += (
            [
                _plus_minus(paper["train_loss"], paper["train_loss_sem"]),
                _plus_minus(paper["test_error"], paper["test_error_sem"]),
                _milliseconds(paper["seconds_per_sample"]),
                _megabytes(paper["bytes_per_sample"]),
            ]
            if paper
            else [""] * 4
        )
        if with_attention:
            cells += _attention_cells(row["attention"])
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_by_patches(rows), *_notes(table, preset, config, rows)]) + "\n"


def _by_patches(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of runs that were tested with other numbers of patches than their own."""
    lines: list[str] = []
    for row in rows:
        if tested := row["tested"]:
            lines += [
                _line([f"{row['method']}, tested with", *(f"{n} patches" for n in tested["sample"])]),
                _line(["---"] * (1 + len(tested["sample"]))),
                *(
                    _line([said, *(_plus_minus(*values.values()) for values in tested[method].values())])
                    for method, said in _TESTED.items()
                ),
                "",
            ]
    return lines


def _notes(table: Table, preset: str, config: ExperimentConfig, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = rows[0]
    software = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    notes = [
        f"- Data: {first['data']}. Preset `{preset}`; seeds {', '.join(map(str, seeds)) or 'none'}.",
        "- Mean ± standard error over runs. Train loss: mean over the last epoch, augmentation included. Test error: "
        f"of the last epoch's model, averaged over {REPEATS} draws of patches where it draws any: no epoch was chosen.",
        "- Time (median) and memory (peak) of one sample, forward and backward, batch size 1, reading the patches from "
        "main memory included, always at the published sizes and with the published networks.",
    ]
    for precision in sorted({row["precision"] for row in rows if row["runs"]} - {"32-true"}):
        names = [row["method"] for row in rows if row["runs"] and row["precision"] == precision]
        who = "" if len(names) == sum(row["runs"] > 0 for row in rows) else f": {', '.join(names)}"
        notes.append(f"- Trained and tested in `{precision}` precision{who}.")
    if first["minutes"]:
        seen = "; ".join(f"{row['method']}: {row['images_seen']:,}" for row in rows if row["runs"])
        notes.append(
            f"- Each method was trained for about {first['minutes']:g} minutes. Images seen: {seen or 'none'}."
        )
    if any(row["seconds_per_sample"] is not None for row in rows):
        measured = f"{describe(first['hardware'])}; {software}"
        notes.append(f"- Costs were measured on {measured}. Published figures are from the authors' GPU.")
    if table.note is not None:
        notes.append(f"- {table.note(config, max(row['images_tested'] for row in rows))}")
    if any(row["attention"] for row in rows):
        notes.append(
            "- Attention on target: the share on cells whose patch shows the centre of a target (nucleus, sign), over "
            f"test images that have one; draws that hit: the share of images in which one of {DRAWS} draws does."
        )
    if preset != "paper":
        own = {"preset", "seed", *(f"model.{name}" for row in table.rows for name in row.model)}  # the rows' affair
        own |= {name for row in table.rows for name in row.quick if preset in SHORT}  # said below
        shrunk = [line for line in differences(table.presets["paper"], config) if line.split(":")[0] not in own]
        notes.append(f"- What `{preset}` trains otherwise than published: {'; '.join(shrunk)}.")
    own_length = preset in SHORT and not first["minutes"]
    return notes + ([_by_method(table, preset, rows)] if own_length else [])


def _by_method(table: Table, preset: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What of a preset differs from method to method, of those that were run."""
    names = sorted({name for row in table.rows for name in row.quick})
    described = []
    for row, values in zip(table.rows, rows, strict=True):
        if values["runs"]:
            config = to_dict(table.config(row, preset, 0, Path(), None))
            options = [f"{name} {config[section][key]}" for name in names for section, key in [name.split(".")]]
            runs = f"{values['runs']} run{'s' if values['runs'] > 1 else ''}"
            described.append(f"{row.name}: {', '.join([*options, runs])}")
    return f"- By method: {'; '.join(described) or 'none was run'}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plus_minus(mean: float | None, error: float | None) -> str:
    if mean is None:
        return NOT_RUN
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def _milliseconds(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{seconds * 1000:,.1f} ms"


def _megabytes(size: float | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 1e6:,.0f} MB"


def _attention_cells(attention: Mapping[str, float] | None) -> list[str]:
    if attention is None:
        return [""] * 4
    names = ("mass", "times_uniform", "hit_rate", "average_precision")
    return [f"{attention[name]:.1f}" if name == "times_uniform" else f"{attention[name]:.2f}" for name in names]
