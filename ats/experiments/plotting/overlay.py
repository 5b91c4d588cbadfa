"""Pictures of attention on whole images: an overlay for one model, and models beside the ground truth.

All show attention in one way: `show_attention` on the dimmed image, `show_best` beside it.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.gridspec import SubplotSpec
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from ats._files import write_whole
from ats.datasets.image_dataset import Region
from ats.experiments.console import printable
from ats_kernels import extract_patches

MARK = "#e69f00"  # orange of Okabe and Ito's palette, apart from grey for every kind of colour vision
TRUTH = "#56b4e9"  # its sky blue
COLOURS = "inferno"  # black where there is no attention, so that the frame is dimmed there
OPAQUE = 0.6
BEST = 3
"""Patches that are shown beside a map."""


@dataclass(frozen=True)
class Attention:
    """A model's attention on one image.

    Args:
        weights: (K,) of the cells.
        offsets: (K, 2) top-left pixels (y, x) of their patches.
        patch_size: pixels (ph, pw).
    """

    weights: Tensor
    offsets: Tensor
    patch_size: tuple[int, int]


class Seen(NamedTuple):
    """A patch that is shown enlarged: its box in the picture's pixels, its own pixels (C, h, w) uint8, its attention.

    It may have more pixels than its box, where the picture is of less than full resolution.
    """

    corner: tuple[int, int]
    size: tuple[int, int]
    pixels: Tensor
    weight: float


def weight_map(attention: Attention, image_size: tuple[int, int]) -> Tensor:
    """How much attention there is on each pixel, (H, W) float64: the sum over all patches that show it."""
    height, width = image_size
    (patch_height, patch_width), weights = attention.patch_size, attention.weights.double().cpu()
    offsets = attention.offsets.cpu()
    top, left = offsets[:, 0].clamp(0, height), offsets[:, 1].clamp(0, width)
    bottom = (offsets[:, 0] + patch_height).clamp(0, height)
    right = (offsets[:, 1] + patch_width).clamp(0, width)
    # A patch is four corners of a function whose sum over all that is above and to the left is 1 inside of it.
    corners = torch.zeros(height + 1, width + 1, dtype=torch.float64, device="cpu")
    for rows, columns, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        corners.index_put_((rows, columns), sign * weights, accumulate=True)
    return corners.cumsum(0).cumsum(1)[:height, :width].clamp(min=0)


def draw_overlay(
    image: Tensor,
    attention: Attention,
    path: Path,
    *,
    title: str,
    drawn: Sequence[tuple[int, int]] = (),
    best: Sequence[Seen] | None = None,
) -> None:
    """The image, with the patches that were drawn, beside its attention, cell by cell, and the patches of most of it.

    Args:
        image: (C, H, W) uint8.
        attention: of a model on it.
        path: of the PNG that is written.
        title: above the image.
        drawn: top-left pixels of patches to frame, in order: numbered from 0, as in tables of them.
        best: the patches to show beside it; None: those of most attention, cut from the image.
    """
    height, width = image.shape[-2:]
    figure = plt.figure(figsize=(14.5, 6.2 * min(1.4, height / width) + 0.8), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=[1, 1, 0.26])
    left = figure.add_subplot(grid[0])
    right = figure.add_subplot(grid[1], sharex=left, sharey=left)
    show_image(left, image)
    left.set_title(title, fontsize=11)
    for number, corner in enumerate(drawn):
        frame(left, corner, attention.patch_size, str(number))
    rows, columns = grid_of(attention.offsets)
    values = attention.weights.view(rows, columns)
    shown = show_attention(right, image, values, scale_of(values), extent_of(attention, rows, columns))
    right.set(xlim=(0, width), ylim=(height, 0))
    entropy = float(-(attention.weights.double() * attention.weights.double().clamp(min=1e-300).log()).sum())
    right.set_title(f"attention on {rows}×{columns} cells, entropy {entropy:.1f} nats", fontsize=11)
    show_best(figure, grid[2], right, best_patches(image, attention) if best is None else best)
    figure.colorbar(shown, ax=right, shrink=0.8, format="%.2g", label="attention of a cell")
    save(figure, path)


def draw_comparison(
    images: Sequence[Tensor],
    truths: Sequence[Sequence[Region]],
    attention: Mapping[str, Sequence[Attention]],
    path: Path,
    *,
    labels: Sequence[str],
    source: str,
) -> None:
    """One row an image: the ground truth, then for each method its attention, and the patches of most of it.

    All panels have one scale, up to the pixel with most attention of them all.

    Args:
        images: (C, H, W) uint8 each.
        truths: the regions that attention should be on, of each image.
        attention: by method, of each image.
        path: of the PNG that is written.
        labels: what each image shows.
        source: of the images, above all.
    """
    methods = len(attention)
    ratio = images[0].shape[1] / images[0].shape[2]
    size = (4 + 5.2 * methods + 0.8, (4 * ratio + 0.4) * len(images) + 0.4)
    figure = plt.figure(figsize=size, layout="constrained")
    figure.suptitle(source, fontsize=11)
    grid = figure.add_gridspec(len(images), 2 + 2 * methods, width_ratios=[4, *[4, 1.2] * methods, 0.15])
    maps = {
        name: [weight_map(one, (image.shape[1], image.shape[2])) for one, image in zip(row, images, strict=True)]
        for name, row in attention.items()
    }
    scale = scale_of(*(pixels for row in maps.values() for pixels in row))
    for row, (image, truth, label) in enumerate(zip(images, truths, labels, strict=True)):
        axes = figure.add_subplot(grid[row, 0])
        show_image(axes, image)
        axes.set_title(f"{label}; ground truth", fontsize=10)
        for region in truth:
            mark(axes, region)
        for number, name in enumerate(attention):
            axes = figure.add_subplot(grid[row, 1 + 2 * number])
            shown = show_attention(axes, image, maps[name][row], scale)
            axes.set_title(name, fontsize=10)
            show_best(figure, grid[row, 2 + 2 * number], axes, best_patches(image, attention[name][row]))
    bar = figure.add_subplot(grid[:, -1])
    figure.colorbar(shown, cax=bar, format="%.2g", label="attention on the patches that show a pixel")
    save(figure, path)


def scale_of(*maps: Tensor) -> PowerNorm:
    """One scale for all maps, from 0 to the most there is, by the root: what is spread stays visible beside a peak."""
    return PowerNorm(0.5, vmin=0, vmax=max(float(each.max()) for each in maps) or 1.0)


def show_attention(
    axes: Axes,
    image: Tensor,
    attention: Tensor,
    scale: PowerNorm,
    extent: tuple[float, float, float, float] | None = None,
) -> AxesImage:
    """An image (C, H, W) uint8 in grey, dimmed where there is no attention, and in colours where there is.

    Args:
        axes: to draw on.
        image: what was looked at.
        attention: (h, w), of pixels or cells.
        scale: of all panels, from `scale_of`.
        extent: left, right, bottom and top of the map in the image's pixels; None: all of the image.

    Returns:
        What a colour bar is made of.
    """
    height, width = image.shape[-2:]
    show_image(axes, image.float().mean(0, keepdim=True).round().to(torch.uint8))
    return axes.imshow(
        attention.float().cpu().numpy(),
        extent=(0, width, height, 0) if extent is None else extent,
        cmap=COLOURS,
        norm=scale,
        alpha=OPAQUE,
        interpolation="nearest",
    )


def heaviest(attention: Attention, count: int = BEST) -> list[int]:
    """The cells of most attention, at most `count`, none of whose patches shows the middle of another's."""
    left, offsets = attention.weights.double().cpu().clone(), attention.offsets.cpu()
    reach = torch.tensor(attention.patch_size, device="cpu") / 2
    cells: list[int] = []
    while len(cells) < count and float(left.max()) > 0:
        cells.append(int(left.argmax()))
        left[((offsets - offsets[cells[-1]]).abs() <= reach).all(-1)] = 0
    return cells


def best_patches(image: Tensor, attention: Attention) -> list[Seen]:
    """The patches of the `heaviest` cells, cut from the image (C, H, W) uint8, black beyond it."""
    cells = heaviest(attention)
    if not cells:
        return []
    corners = attention.offsets[cells].cpu()
    pixels = extract_patches(image[None].cpu(), corners[None], attention.patch_size)[0]
    weights = attention.weights[cells].tolist()
    return [
        Seen((top, left), attention.patch_size, (255 * patch).round().to(torch.uint8), weight)
        for (top, left), patch, weight in zip(corners.tolist(), pixels, weights, strict=True)
    ]


def show_best(
    figure: FigureBase, place: SubplotSpec, panel: Axes, best: Sequence[Seen], *, across: bool = False
) -> None:
    """Patches below or, `across`, beside each other, enlarged, each with its attention; their frames in the panel."""
    count = max(BEST, len(best))
    places = place.subgridspec(1, count) if across else place.subgridspec(count, 1)
    for number, seen in enumerate(best):
        letter = chr(ord("a") + number)  # numbers are those of draws
        frame(panel, seen.corner, seen.size, letter, "white")  # on orange, orange would not show
        axes = figure.add_subplot(places[number])
        show_image(axes, seen.pixels)
        axes.set_title(f"{letter}: {seen.weight:.2g}", fontsize=8)


def show_image(axes: Axes, image: Tensor) -> None:
    """An image (C, H, W) uint8 in pixels, without ticks."""
    height, width = image.shape[-2:]
    pixels = image.cpu().movedim(0, -1).squeeze(-1).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    axes.set(xticks=[], yticks=[])


def frame(axes: Axes, corner: tuple[int, int], size: tuple[int, int], text: str, colour: str = MARK) -> None:
    """A patch's frame, with a number."""
    top, left = corner
    axes.add_patch(Rectangle((left, top), size[1], size[0], fill=False, edgecolor=colour, linewidth=1.4))
    axes.text(left + 2, top + 2, text, color=colour, fontsize=8, va="top", ha="left", clip_on=True)


def mark(axes: Axes, region: Region) -> None:
    """A region of the ground truth: a box, or a point."""
    if region.area:
        size = (region.right - region.left, region.bottom - region.top)
        axes.add_patch(Rectangle((region.left, region.top), *size, fill=False, edgecolor=TRUTH, linewidth=1.6))
    else:
        y, x = region.centre
        axes.plot(x, y, marker="o", markersize=3, color=TRUTH, markeredgecolor="white", markeredgewidth=0.4)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Nothing in its texts is markup: an image may be called $x.png."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(printable(text.get_text()))
    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    plt.close(figure)
    write_whole(path, png.getvalue())


def grid_of(offsets: Tensor) -> tuple[int, int]:
    """Rows and columns of the cells whose patches' top-left pixels (K, 2) these are."""
    columns = int((offsets[:, 0] == offsets[0, 0]).sum())
    return len(offsets) // columns, columns


def extent_of(attention: Attention, rows: int, columns: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the grid's cells in the image's pixels."""
    first, last = attention.offsets[0].tolist(), attention.offsets[-1].tolist()
    edges = []
    for axis, cells in enumerate((rows, columns)):
        centre, patch = first[axis] + attention.patch_size[axis] / 2, attention.patch_size[axis]
        step = (last[axis] - first[axis]) / (cells - 1) if cells > 1 else patch
        edges.append((centre - step / 2, centre + (cells - 0.5) * step))
    (top, bottom), (left, right) = edges
    return left, right, bottom, top
