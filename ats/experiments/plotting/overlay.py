"""Pictures of attention on whole images: an overlay for one model, and models beside the ground truth."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from ats._files import write_whole
from ats.datasets.image_dataset import Region
from ats.experiments.console import printable

MARK = "#e69f00"  # orange of Okabe and Ito's palette, apart from grey for every kind of colour vision
TRUTH = "#56b4e9"  # its sky blue


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
) -> None:
    """The image, with the patches that were drawn, beside its attention, cell by cell.

    Args:
        image: (C, H, W) uint8.
        attention: of a model on it.
        path: of the PNG that is written.
        title: above the image.
        drawn: top-left pixels of patches to frame, in order.
    """
    height, width = image.shape[-2:]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 6.2 * min(1.4, height / width) + 0.8), layout="constrained", sharex=True, sharey=True
    )
    show_image(left, image)
    left.set_title(title, fontsize=11)
    for number, corner in enumerate(drawn, 1):
        frame(left, corner, attention.patch_size, str(number))
    show_image(right, image.float().mean(0, keepdim=True).to(torch.uint8))
    rows, columns = _grid(attention.offsets)
    shown = right.imshow(
        attention.weights.view(rows, columns).float().cpu().numpy(),
        extent=_extent(attention, rows, columns),
        cmap="viridis",
        alpha=0.65,
        vmin=0,
    )
    right.set(xlim=(0, width), ylim=(height, 0))
    entropy = float(-(attention.weights.double() * attention.weights.double().clamp(min=1e-300).log()).sum())
    right.set_title(f"attention on {rows}×{columns} cells, entropy {entropy:.1f} nats", fontsize=11)
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
    """One row an image: the ground truth, then for each method the image's patches weighted with attention.

    A row has one scale: the brightest pixel of the method that concentrates most.

    Args:
        images: (C, H, W) uint8 each.
        truths: the regions that attention should be on, of each image.
        attention: by method, of each image.
        path: of the PNG that is written.
        labels: what each image shows.
        source: of the images, above all.
    """
    columns = 1 + len(attention)
    ratio = images[0].shape[1] / images[0].shape[2]
    figure, grid = plt.subplots(
        len(images),
        columns,
        figsize=(4 * columns, (4 * ratio + 0.4) * len(images)),
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(source, fontsize=11)
    for row, (image, truth, label) in enumerate(zip(images, truths, labels, strict=True)):
        show_image(grid[row][0], image)
        grid[row][0].set_title(f"{label}; ground truth", fontsize=10)
        for region in truth:
            mark(grid[row][0], region)
        size = (image.shape[1], image.shape[2])
        maps = {name: weight_map(all_of_it[row], size) for name, all_of_it in attention.items()}
        brightest = max(float(pixels.max()) for pixels in maps.values())
        for column, (name, pixels) in enumerate(maps.items(), 1):
            weighted = image.double().cpu() * (pixels / brightest).clamp(max=1)
            show_image(grid[row][column], weighted.round().to(torch.uint8))
            grid[row][column].set_title(name, fontsize=10)
    save(figure, path)


def show_image(axes: Axes, image: Tensor) -> None:
    """An image (C, H, W) uint8 in pixels, without ticks."""
    height, width = image.shape[-2:]
    pixels = image.cpu().movedim(0, -1).squeeze(-1).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    axes.set(xticks=[], yticks=[])


def frame(axes: Axes, corner: tuple[int, int], size: tuple[int, int], text: str) -> None:
    """A patch's frame, with a number."""
    top, left = corner
    axes.add_patch(Rectangle((left, top), size[1], size[0], fill=False, edgecolor=MARK, linewidth=1.4))
    axes.text(left + 2, top + 2, text, color=MARK, fontsize=8, va="top", ha="left", clip_on=True)


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


def _grid(offsets: Tensor) -> tuple[int, int]:
    columns = int((offsets[:, 0] == offsets[0, 0]).sum())
    return len(offsets) // columns, columns


def _extent(attention: Attention, rows: int, columns: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the grid's cells in the image's pixels."""
    first, last = attention.offsets[0].tolist(), attention.offsets[-1].tolist()
    edges = []
    for axis, cells in enumerate((rows, columns)):
        centre, patch = first[axis] + attention.patch_size[axis] / 2, attention.patch_size[axis]
        step = (last[axis] - first[axis]) / (cells - 1) if cells > 1 else patch
        edges.append((centre - step / 2, centre + (cells - 0.5) * step))
    (top, bottom), (left, right) = edges
    return left, right, bottom, top
