"""A run's JSON as Markdown and, where matplotlib is installed, plots: `python -m bench.render bench/results/X.json`."""

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ats._files import write_whole
from ats.experiments.markdown import wrap
from bench.render_parts import parts_lines

Record = dict[str, Any]

SECTIONS = {
    "table1": "Colon cancer: a training step by each method (the paper's table 1)",
    "table2": "Speed limits: a training step by each method (the paper's table 2)",
    "mnist": "Megapixel MNIST: a training step by each method",
    "scaling": "The size of the image",
    "nested": "Nested attention, by the size of the image",
    "files": "Images on disk",
    "sampling-space": "The number of cells, and the size of the view",
    "patches": "The number of patches, and their size",
    "parts": "Where a training step's time goes",
    "estimators": "Estimators",
    "ops": "Ops",
}
_PUBLISHED = "Published times and memory are the paper's, on its authors' GPU: only their ratios compare with ours."


def write(path: Path) -> list[Path]:
    """Write the Markdown file and the plots beside a JSON file; what was written."""
    groups = json.loads(path.read_text())["groups"]
    try:  # only now: a machine that measures need not have it
        from bench.plots import draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        return [write_page(path)]
    plots = draw(groups, path.with_suffix(""))
    return [write_page(path, {section: plot.name for section, plot in plots.items()}), *plots.values()]


def write_page(path: Path, plots: dict[str, str] | None = None) -> Path:
    """Write the Markdown file beside a JSON file, with plots of these names by section; which file it is."""
    page = path.with_suffix(".md")
    write_whole(page, wrap(markdown(json.loads(path.read_text()), plots)).encode())
    return page


def markdown(record: Record, plots: dict[str, str] | None = None) -> str:
    """The page: the machine, the headlines, then a table for each group.

    Args:
        record: of the JSON file.
        plots: file names by section.
    """
    groups = record["groups"]
    targets = [(group["name"], target) for group in groups for target in group["targets"]]
    said = ": no figure here is a GPU's" if record.get("rehearsal") else ""
    lines = [f"# {record['title']}{said}", "", *table(("", ""), list(record["machine"].items())), ""]
    lines += parts_lines(record)
    headlines = [(name, target) for name, target in targets if target["headline"]]
    if headlines:
        rows = [(name, *_target(target)) for name, target in headlines]
        lines += [*table(("headline", "", "wanted", "measured", "met", "by the best rounds"), rows), ""]
    if record.get("rehearsal"):
        lines += [f"{len(targets)} targets are of a GPU; this is none, so whether they were met says nothing.", ""]
    elif targets or not record.get("parts"):
        lines += [f"{sum(target['met'] for _, target in targets)} of {len(targets)} targets met.", ""]
    known = [section for section in SECTIONS if any(group["section"] == section for group in groups)]
    for section in known:
        lines += [f"## {SECTIONS[section]}", ""]
        if plots and section in plots:
            lines += [f"![{SECTIONS[section]}]({plots[section]})", ""]
        for group in groups:
            if group["section"] == section:
                lines += _group(group, record.get("bytes_per_second"))
    return "\n".join(lines)


def headlines(record: Record, width: int = 80) -> list[str]:
    """What a terminal shows at the end: the headlines, and how many targets were met, in lines of `width` columns."""
    lines: list[str] = []
    targets = [target for group in record["groups"] for target in group["targets"]]
    for group in record["groups"]:
        shown = [target for target in group["targets"] if target["headline"]]
        lines += textwrap.wrap(group["name"], width) if shown else []
        for target in shown:
            unit = f" {target['unit']}"
            wanted = f"{'≥' if target['at_least'] else '≤'} {target['limit']:g}{unit}"
            figures = (
                f"{target['measured']:.3g}{unit}".rjust(9) + f"{wanted:>10}  {'met' if target['met'] else 'MISSED'}"
            )
            *before, last = textwrap.wrap(target["what"], width - 30, initial_indent="  ", subsequent_indent="    ")
            lines += [*before, f"{last:<{width - 28}}{figures}"]
    if targets and not record.get("rehearsal"):
        lines.append(f"{sum(target['met'] for target in targets)} of {len(targets)} targets met.")
    return lines


def _group(group: Record, bytes_per_second: float | None) -> list[str]:
    lines = [f"### {group['name']}", ""]
    names = [*group["timings"], *(name for name in group["not_run"] if name not in group["timings"])]
    if group["points"]:
        lines += [*_by_size(group), ""]
    elif names:
        columns = [*_times(group), *_bandwidth(group, bytes_per_second), *_memory(group), *_published(group)]
        rows = [(name, *(column[1].get(name, "") for column in columns)) for name in names]
        lines += [*table(("method", *(column[0] for column in columns)), rows), ""]
    if group["targets"]:
        rows = [_target(target) for target in group["targets"]]
        lines += [*table(("target", "wanted", "measured", "met", "by the best rounds"), rows), ""]
    notes = [*group["notes"], *([_PUBLISHED] if group["published"] else [])]
    return lines + [line for note in notes for line in (note, "")]


def _by_size(group: Record) -> list[str]:
    """A row a size, a column a line: median, quartiles, and how many times the first line's median that is."""
    timings, memory = group["timings"], group["memory"]
    at = {(line, x): name for name, (line, x) in group["points"].items()}
    lines = list(dict.fromkeys(line for line, _ in at))
    with_memory = [line for line in lines if any(at[key] in memory for key in at if key[0] == line)]
    foretold = group.get("foretold", {})  # earlier runs have none
    rows = []
    for size in sorted({x for _, x in at}):
        first = timings.get(at.get((lines[0], size)))
        row = [f"{size:,.0f}"]
        for line in lines:
            name = at.get((line, size))
            time = timings.get(name)
            if time is None and name in foretold:
                row.append(_foretold(foretold[name][0]))
                continue
            if time is None:
                row.append(f"not run: {group['not_run'][name]}" if name in group["not_run"] else "")
                continue
            ratio = f", {_times_sign(time['median'] / first['median'])}" if first and line != lines[0] else ""
            row.append(f"{time['median']:.4g} ({time['low']:.4g} – {time['high']:.4g}){ratio}")
        for line in with_memory:
            name = at.get((line, size))
            if name in foretold and name not in memory:
                row.append(_foretold(foretold[name][1] / 1e6))
            else:
                row.append(f"{memory[name] / 1e6:,.1f}" if name in memory else "")
        rows.append(tuple(row))
    unit = "ms" if group["per"] == "call" else f"ms/{group['per']}"
    header = (group["axis"], *(f"{line}: {unit}" for line in lines), *(f"{line}: MB" for line in with_memory))
    return table(header, rows)


def _foretold(value: float) -> str:
    """A number that was not measured, with as many digits as it has."""
    return f"*about {float(f'{value:.2g}'):,.0f}, foretold*"


Column = tuple[str, dict[str, str]]  # its header, and what stands in it by method


def _times(group: Record) -> list[Column]:
    timings = group["timings"]
    unit = "ms" if group["per"] == "call" else f"ms/{group['per']}"
    columns: list[Column] = [
        (f"median {unit}", {name: f"{time['median']:.4g}" for name, time in timings.items()}),
        ("quartiles", {name: f"{time['low']:.4g} – {time['high']:.4g}" for name, time in timings.items()}),
        ("best", {name: f"{time['best']:.4g}" for name, time in timings.items()}),
        ("rounds", {name: f"{time['rounds']}" for name, time in timings.items()}),
    ]
    for name, reason in group["not_run"].items():
        columns[0][1].setdefault(name, f"not run: {reason}")
    if len(timings) > 1:
        ours = next(iter(timings.values()))["median"]
        columns.append(("× first", {name: _times_sign(time["median"] / ours) for name, time in timings.items()}))
    return columns


def _bandwidth(group: Record, bytes_per_second: float | None) -> list[Column]:
    if group["floor_bytes"] is None or not bytes_per_second:
        return []
    rates = {name: group["floor_bytes"] / time["median"] * 1e3 for name, time in group["timings"].items()}
    return [
        ("GB/s of the floor's bytes", {name: f"{rate / 1e9:.3g}" for name, rate in rates.items()}),
        ("of a large copy's", {name: f"{100 * rate / bytes_per_second:.3g}%" for name, rate in rates.items()}),
    ]


def _memory(group: Record) -> list[Column]:
    memory = group["memory"]
    if not memory:
        return []
    ours = next(iter(memory.values()))
    return [
        ("MB", {name: f"{value / 1e6:,.0f}" for name, value in memory.items()}),
        ("× first", {name: _times_sign(value / ours) for name, value in memory.items()}),
    ]


def _published(group: Record) -> list[Column]:
    published = group["published"]
    if not published:
        return []
    columns: list[Column] = []
    for place, unit, scale in ((0, "ms", 1e3), (1, "MB", 1e-6)):
        values = {name: value[place] for name, value in published.items()}
        ours = values.get(next(iter(group["timings"] or published)))
        columns.append((f"published {unit}", {name: f"{value * scale:,.4g}" for name, value in values.items()}))
        if ours:
            columns.append(("× first", {name: _times_sign(value / ours) for name, value in values.items()}))
    return columns


def _target(target: Record) -> tuple[str, ...]:
    unit = target["unit"]
    return (
        target["what"],
        f"{'≥' if target['at_least'] else '≤'} {target['limit']:g} {unit}",
        f"{target['measured']:.3g} {unit}",
        "yes" if target["met"] else "**no**",
        "" if target["best"] is None else f"{target['best']:.3g} {unit}",
    )


def _times_sign(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.3g}×"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A Markdown table's lines."""
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    for written in write(Path(sys.argv[1])):
        print(written)
