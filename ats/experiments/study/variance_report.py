"""`ats study variance`: the figures as JSON, as Markdown tables and as a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.progress import Progress

from ats.experiments.console import plain_console
from ats.experiments.markdown import wrap
from ats.experiments.study.methods import METHODS
from ats.experiments.study.variance import Row, VarianceOptions, measure, settings
from ats.experiments.study.writing import STYLES, earlier_rows, markdown_table, png, write_study

_OWN_POOLING = "replace", "ordered", "unordered"  # the others pool as one of these does


def study_variance(options: VarianceOptions, folder: Path | None) -> list[Row]:
    """Measure, print the table and, given a folder, write results/variance.json and .md and variance.png there."""
    if folder is not None:
        earlier_rows(folder, "variance", options)
    console = plain_console()
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(settings(options)))
        for group in measure(options):
            rows += group
            progress.advance(task)
    text = markdown(rows)
    console.print(wrap(text), soft_wrap=True)
    if folder is not None:
        picture = plot([row for row in rows if row.how == "sampled"])
        write_study(folder, "variance", options, [row.to_dict() for row in rows], text, picture)
        console.print(f"Written to {folder}", soft_wrap=True)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Tables of noise, and of the gradient's bias, as shares of the exact length."""
    sampled = [row for row in rows if row.how == "sampled"]
    enumerated = [row for row in rows if row.how == "enumerated"]
    cells, few = sampled[0].cells, enumerated[0].cells
    parts = [
        "# Variance and bias of one draw",
        "Written by `ats study variance`. The noise is the standard deviation of one image's draw over all "
        "coordinates, the bias the length of the error of its expectation, both as shares of the length of what is "
        "estimated. The column `cells` is exp(entropy) of the attention.",
        f"## Noise of the gradient to the logits, {cells} cells",
        _table(sampled, METHODS, lambda row: _number(row.gradient["noise"])),
        f"## Noise of Φ̂, {cells} cells",
        _table(sampled, _OWN_POOLING, lambda row: _number(row.pooled["noise"])),
        f"## The released code's expected gradient, {cells} cells",
        "Its bias, with the standard error of Monte Carlo; the share of the exact gradient that is left along it; and "
        "the cosine of the angle between the two.",
        _released(sampled),
        f"## Bias of the gradient, {few} cells, over every ordered draw",
        _table(enumerated, METHODS, lambda row: _number(row.gradient["bias"], least=1e-9)),
        f"## Noise of the gradient, {few} cells, over every ordered draw",
        _table(enumerated, METHODS, lambda row: _number(row.gradient["noise"])),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], methods: Sequence[str] | dict[str, Any], cell: Callable[[Row], str]) -> str:
    lines = [["N", "sharpness", "cells", *(METHODS[name].label for name in methods)]]
    for n, sharpness in dict.fromkeys((row.n_patches, row.sharpness) for row in rows):
        group = {row.method: row for row in rows if (row.n_patches, row.sharpness) == (n, sharpness)}
        effective = group["ordered"].effective_cells
        lines.append([f"{n}", f"{sharpness:g}", f"{effective:.1f}", *(cell(group[name]) for name in methods)])
    return markdown_table(lines)


def _released(rows: Sequence[Row]) -> str:
    lines = [["N", "sharpness", "cells", "bias", "±", "along", "cosine"]]
    for row in rows:
        if row.method == "released":
            gradient = row.gradient
            values = (gradient[name] for name in ("bias", "bias_noise", "along", "cosine"))
            numbers = [f"{value:.2f}" for value in values]
            lines.append([f"{row.n_patches}", f"{row.sharpness:g}", f"{row.effective_cells:.1f}", *numbers])
    return markdown_table(lines)


def _number(value: float, least: float = 0.0) -> str:
    return "0" if value <= least else f"{value:.2g}" if value < 100 else f"{value:.0f}"


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: noise of Φ̂, noise and bias of the gradient, against sharpness; one column for each number of draws."""
    numbers = sorted({row.n_patches for row in rows})
    kinds: list[tuple[str, str, Callable[[Row], float]]] = [
        ("noise of Φ̂", "pooled", lambda row: row.pooled["noise"]),
        ("noise of the gradient", "noise", lambda row: row.gradient["noise"]),
        ("bias of the gradient", "bias", lambda row: row.gradient["bias"]),
    ]
    width, height = 2.6 * len(numbers) + 0.6, 7.6
    figure, axes = plt.subplots(3, len(numbers), figsize=(width, height), sharex=True, sharey="row", squeeze=False)
    for column, n in enumerate(numbers):
        for line, (title, kind, value) in enumerate(kinds):
            _curves(axes[line, column], [row for row in rows if row.n_patches == n], kind, value)
            if column == 0:
                axes[line, column].set_ylabel(title)
        axes[0, column].set_title(f"N = {n}", fontsize=11)
        axes[2, column].set_xlabel("sharpness of the attention")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.set_layout_engine("constrained")
    return png(figure)


def _curves(axes: Axes, rows: Sequence[Row], kind: str, value: Callable[[Row], float]) -> None:
    for name in METHODS:
        curve = sorted((row.sharpness, value(row), row.gradient["bias_noise"]) for row in rows if row.method == name)
        # Where a bias is within three standard errors it may be none, so only those that are not are drawn.
        if kind == "bias":
            curve = [point for point in curve if point[1] > 3 * point[2]]
        elif kind == "pooled" and name not in _OWN_POOLING:
            continue
        axes.plot(
            [point[0] for point in curve],
            [point[1] for point in curve],
            label=METHODS[name].label,
            markersize=4.5,
            linewidth=1.4,
            **STYLES[name],
        )
    if kind == "bias":
        axes.set_ylim(-0.05, 1.15)
    else:
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 1 if kind == "pooled" else 50)
    axes.grid(alpha=0.3)
