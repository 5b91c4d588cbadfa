"""How a study writes what it found: whole files, and nothing overwritten but its own earlier result."""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ats._files import read_object, write_whole
from ats.experiments.markdown import wrap

# Okabe and Ito's colours, apart for every kind of colour vision; markers tell them apart in grey as well.
STYLES: dict[str, dict[str, Any]] = {
    "replace": {"color": "#999999", "marker": "o"},
    "ordered": {"color": "#0072b2", "marker": "s"},
    "unordered": {"color": "#009e73", "marker": "^"},
    "unordered-centred": {"color": "#000000", "marker": "v"},
    "score": {"color": "#e69f00", "marker": "D"},
    "released": {"color": "#cc79a7", "marker": "X"},
}


def study_files(folder: Path, study: str) -> tuple[Path, Path, Path]:
    """Its JSON, Markdown and, where it has one, picture."""
    return folder / "results" / f"{study}.json", folder / "results" / f"{study}.md", folder / f"{study}.png"


def plain(options: Any) -> dict[str, Any]:
    """Options as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def earlier_rows(folder: Path, study: str, options: Any) -> list[dict[str, Any]]:
    """Raise unless the study's files are not there, or are what the same study wrote with the same options.

    Returns:
        The rows that it wrote.
    """
    record, *others = study_files(folder, study)
    existing = [path for path in (record, *others) if path.exists()]
    if not existing:
        return []
    mend = "name another folder with --output, or remove it"
    if not record.exists():
        raise ValueError(f"{existing[0]} is there, but not {record}, which `ats study {study}` writes with it; {mend}")
    try:
        found = read_object(record)
        rows = list(found["rows"])
        same = found["command"] == f"ats study {study}" and found["options"] == plain(options)
    except (ValueError, KeyError, TypeError):  # JSON's errors and those of decoding are ValueErrors
        same = False
    if not same:
        raise ValueError(f"{record} is not what `ats study {study}` wrote with these options; {mend}")
    return rows


def write_study(
    folder: Path, study: str, options: Any, rows: Sequence[dict[str, Any]], text: str, picture: bytes | None = None
) -> None:
    """Write its files."""
    record, tables, plot = study_files(folder, study)
    values = {"command": f"ats study {study}", "options": plain(options), "rows": rows}
    write_whole(tables, wrap(text).encode())
    if picture is not None:
        write_whole(plot, picture)
    write_whole(record, (json.dumps(values, indent=1) + "\n").encode())


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A heading and its rows, aligned to the right."""
    rule = ["---:"] * len(rows[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def png(figure: Figure) -> bytes:
    """The figure, which is closed."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png")
    plt.close(figure)
    return data.getvalue()
