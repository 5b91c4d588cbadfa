"""Plots of trainings: curves and sweeps, legible at a page's width and for every kind of colour vision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from torch import Tensor

from ats.datasets.image_dataset import Region
from ats.experiments.plotting.overlay import Seen, mark, save, scale_of, show_attention, show_best, show_image

# Okabe and Ito's colours; line styles and markers tell the lines apart without them.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osv^DPX*"

Points = Sequence[Mapping[str, Any]]


def draw_curves(runs: Mapping[str, Sequence[Points]], path: Path, *, title: str) -> None:
    """Training loss and test error against minutes of training: a line a method, the mean over its runs.

    Args:
        runs: by method, the points of each run, as `reproduce.curves` has them.
        path: of the PNG that is written.
        title: above both panels.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    names = (("train_loss", "training loss"), ("test_error", "test error"))
    for axes, (name, label) in zip(panels, names, strict=True):
        for number, (method, curves) in enumerate(runs.items()):
            count = min(len(curve) for curve in curves)
            minutes = [_mean([curve[k]["seconds"] / 60 for curve in curves]) for k in range(count)]
            values = [_mean([curve[k][name] for curve in curves]) for k in range(count)]
            axes.plot(minutes, values, label=f"{method} ({len(curves)})", **look(number))
        axes.set(xlabel="minutes of training", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=9, title="method (runs)", title_fontsize=9)
    save(figure, path)


def draw_lines(
    lines: Mapping[str, Mapping[float, float]], path: Path, *, x: str, y: str, title: str, legend: str
) -> None:
    """Values over steps or the like: a line each."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, (name, values) in enumerate(lines.items()):
        style = look(number) | ({"marker": ""} if len(values) > 30 else {})
        axes.plot(list(values), list(values.values()), label=name, **style)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, title=legend, title_fontsize=9)
    save(figure, path)


@dataclass(frozen=True)
class Panel:
    """A map of attention (gh, gw), what it is of, and the patches of most attention, in pixels of the region shown."""

    title: str
    attention: Tensor
    best: Sequence[Seen] = ()


def draw_maps(
    image: Tensor, panels: Sequence[Panel], path: Path, *, title: str, source: str, targets: Sequence[Region] = ()
) -> None:
    """A region of an image, and maps of attention on it, all on one scale, with the patches of most attention.

    Args:
        image: (C, H, W) uint8, the region.
        panels: the maps, each of the region's cells.
        path: of the PNG that is written.
        title: above the image.
        source: of the data, above all.
        targets: what attention should be on, marked in the image and in every map.
    """
    columns = min(6, 1 + len(panels))
    rows = -(-(1 + len(panels)) // columns)
    ratio, below = image.shape[1] / image.shape[2], 0.4 if any(panel.best for panel in panels) else 0.0
    size = (2.6 * columns + 0.8, (2.6 * (ratio + below) + 0.5) * rows + 0.5)
    figure = plt.figure(figsize=size, layout="constrained")
    figure.suptitle(source, fontsize=11)
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[*[2.6] * columns, 0.12])
    heights = [ratio, below or 1e-3]
    cells = [grid[divmod(number, columns)] for number in range(1 + len(panels))]
    places = [cell.subgridspec(2, 1, height_ratios=heights) for cell in cells]
    axes = [figure.add_subplot(place[0]) for place in places]
    show_image(axes[0], image)
    axes[0].set_title(title, fontsize=10)
    scale = scale_of(*(panel.attention for panel in panels))
    for panel, place, one in zip(panels, places[1:], axes[1:], strict=False):
        shown = show_attention(one, image, panel.attention, scale)
        one.set_title(panel.title, fontsize=10)
        show_best(figure, place[1], one, panel.best, across=True)
    for one in axes:
        for region in targets:
            mark(one, region)
    figure.colorbar(shown, cax=figure.add_subplot(grid[:, -1]), format="%.2g", label="attention of a cell")
    save(figure, path)


def look(number: int) -> dict[str, Any]:
    """How the line of this number is drawn: no two of eight alike, in colour or without."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": _STYLES[number % len(_STYLES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
