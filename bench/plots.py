"""Plots of a run: the tables' ratios, and time and memory against sizes, on logarithmic axes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from ats.experiments.plotting.overlay import save
from ats.experiments.plotting.plots import look

Groups = Sequence[Mapping[str, Any]]

LINES = "scaling", "nested", "sampling-space", "patches"
TABLES = "table1", "table2", "mnist"


def draw(groups: Groups, stem: Path) -> dict[str, Path]:
    """Draw each section that has something to draw as <stem>-<section>.png; the files by section."""
    drawn = {}
    for section in (*TABLES, *LINES):
        chosen = [group for group in groups if group["section"] == section]
        path = stem.with_name(f"{stem.name}-{section}.png")
        if section in LINES and any(group["points"] for group in chosen):
            _draw_lines([group for group in chosen if group["points"]], path)
            drawn[section] = path
        elif section in TABLES and chosen and chosen[0]["memory"]:
            _draw_ratios(chosen[0], path)
            drawn[section] = path
    return drawn


def _draw_lines(groups: Groups, path: Path) -> None:
    """Time, and memory where it was measured, against a size: a line for each name in `points`."""
    panels = [(group, "median") for group in groups] + [(group, "memory") for group in groups if group["memory"]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.9), layout="constrained", squeeze=False)
    for place, (group, what) in zip(axes[0], panels, strict=True):
        lines: dict[str, dict[float, float]] = {}
        for method, (line, value) in group["points"].items():
            if what == "memory" and method in group["memory"]:
                lines.setdefault(line, {})[value] = group["memory"][method] / 1e6
            elif what == "median" and method in group["timings"]:
                lines.setdefault(line, {})[value] = group["timings"][method]["median"]
        names = list(dict.fromkeys(line for line, _ in group["points"].values()))
        for line, values in lines.items():
            style = look(names.index(line))
            place.plot(list(values), list(values.values()), label=line, **style)
            _draw_foretold(place, group, line, values, what == "memory", style)
        unit = "ms" if group["per"] == "call" else f"ms a {group['per']}"
        place.set(
            xlabel=group["axis"], ylabel="MB beyond the image" if what == "memory" else unit, xscale="log", yscale="log"
        )
        for axis, more in ((place.xaxis, (3,)), (place.yaxis, (2, 5))):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, *more) if high < 1000 * low else (1,)))
            axis.set_major_formatter(lambda value, _: _number(value))  # its own are markup, of which pictures have none
            axis.set_minor_formatter(lambda value, _: "")
        mark_misfits(place, group, names)
        if len(groups) > 1:
            place.set_title(group["name"], fontsize=10, wrap=True)
        place.grid(alpha=0.3)
    if len(groups) > 1:
        for place in axes[0]:
            place.legend(fontsize=9)
    else:
        figure.suptitle(groups[0]["name"], fontsize=11)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        columns = len(labels) if sum(map(len, labels)) < 75 else 2
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)
    save(figure, path)


def _number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def mark_misfits(place: Any, group: Mapping[str, Any], names: Sequence[str]) -> None:
    """A cross at the top, in a line's colour, at the first size that does not fit into memory, but if it was foretold.

    Args:
        place: axes.
        group: as a report's JSON has it; `not_run` says what does not fit.
        names: of the lines, in the order of their looks.
    """
    cross: dict[str, Any] = {"linestyle": "", "marker": "x", "markersize": 8, "markeredgewidth": 2}
    marked: list[str] = []
    for number, line in enumerate(names):
        sizes = [
            size
            for method, (name, size) in group["points"].items()
            if name == line and group["not_run"].get(method, "").startswith("does not fit")
        ]
        if sizes and not any(group["points"][method][0] == line for method in group.get("foretold", {})):
            height = 0.95 - 0.07 * len(marked)  # two lines may end at one size
            place.plot([min(sizes)], [height], transform=place.get_xaxis_transform(), **look(number) | cross)
            marked.append(line)
    if marked:
        place.plot([], [], color="black", label="does not fit", **cross)


def _draw_foretold(
    place: Any, group: Mapping[str, Any], line: str, values: Mapping[float, float], memory: bool, style: dict[str, Any]
) -> None:
    """What was foretold of a line, dotted on from the last that was measured."""
    coming = {
        size: group["foretold"][method][1] / 1e6 if memory else group["foretold"][method][0]
        for method, (name, size) in group["points"].items()
        if name == line and method in group.get("foretold", {}) and size not in values
    }
    if coming:
        last = max(values)
        joined = {last: values[last], **coming}
        place.plot(list(joined), list(joined.values()), **style | {"linestyle": ":", "markerfacecolor": "white"})


def _draw_ratios(group: Mapping[str, Any], path: Path) -> None:
    """Time and memory of each method, as multiples of the first's: measured, and as published."""
    names = list(dict.fromkeys([*group["timings"], *group["memory"]]))[::-1]
    figure, panels = plt.subplots(1, 2, figsize=(11, 0.42 * len(names) + 1.8), layout="constrained", sharey=True)
    figure.suptitle(group["name"], fontsize=12)
    ours = next(iter(group["timings"]))
    measured = (
        {name: time["median"] for name, time in group["timings"].items()},
        group["memory"],
    )
    for number, (axes, values, label) in enumerate(zip(panels, measured, ("time", "memory"), strict=True)):
        published = {name: value[number] for name, value in group["published"].items()}
        for place, (source, kind) in enumerate(((values, "measured"), (published, "published"))):
            known = [name for name in names if name in source and ours in source]
            if known:
                style = look(place) | {"linestyle": "", "markersize": 8}
                axes.plot(
                    [source[name] / source[ours] for name in known],
                    [names.index(name) for name in known],
                    label=kind,
                    **style,
                )
        axes.set(xscale="log", xlabel=f"{label} a sample, × {ours}'s", yticks=range(len(names)), yticklabels=names)
        axes.grid(alpha=0.3)
        axes.axvline(1, color="black", linewidth=0.8)
    panels[0].legend(fontsize=9)
    save(figure, path)
