"""How nested attention came to its patches: the slide, the regions drawn in it, and the patches drawn in these."""

import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from ats.experiments.plotting.overlay import frame, save, show_image
from ats.nested_sample import NestedSample
from ats.regions import Reading, host_tensor, read_regions
from ats.samples import Estimator
from ats.sources import ImageSource, from_arrays, read_view

_WHOLE = 1000  # pixels of the longer side of the whole image, at most
_PANEL = 240  # pixels of a region, about


def draw_zoom(
    image: Tensor | ImageSource,
    sample: NestedSample,
    path: Path,
    *,
    title: str,
    attention: Tensor | None = None,
    estimator: Estimator = "unordered",
    columns: int = 4,
) -> None:
    """Write a picture: above the whole image with the regions drawn, below a column for each of the heaviest.

    A column has the region with what was drawn in it framed; with three levels the heaviest of these in the same way;
    and at the foot the patches of the last one, the heaviest four at full resolution. Frames are numbered in draw
    order from 0, as in tables, and numbers in brackets are weights in the estimate, which sum to 1 over the image.

    Args:
        image: (C, H, W), or a source.
        sample: of this image alone.
        path: of the PNG that is written.
        title: above all.
        attention: (h, w) of the whole image, e.g. of `ats.nested_maps.zoomed_heatmap`, to show beside it.
        estimator: what weights are of.
        columns: regions that are shown, at most.
    """
    if len(sample) != 1:
        raise ValueError(f"the sample must be of one image, got {len(sample)}; pass sample[number]")
    if len(sample.levels) < 2:
        raise ValueError("the sample has one level: there is no zoom to show; draw its patches as an overlay")
    weights = _weights(sample, estimator)
    source = from_arrays([image.cpu()]) if isinstance(image, Tensor) else image
    low, high, whole = _whole(source)
    first = weights[0]
    heaviest = first.topk(min(columns, len(first))).indices.sort().values.tolist()
    depth, wide = len(sample.levels), max(2, len(heaviest))
    figure = plt.figure(figsize=(2.6 * wide, 5.2 + 2.9 * depth), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(1 + depth, 2 * wide, height_ratios=[1.8, *[1.0] * depth])
    split = wide if attention is not None else 2 * wide
    axes = figure.add_subplot(grid[0, :split])
    show_image(axes, whole)
    full = source.levels[0]
    scale = whole.shape[-1] / full.width
    level = sample.levels[0]
    for number, (top, left) in enumerate(level.offsets[0].tolist()):
        small = level.patch_size[0] * scale, level.patch_size[1] * scale
        frame(axes, (round(top * scale), round(left * scale)), (round(small[0]), round(small[1])), str(number))
    axes.set_title(f"{full.height:,}×{full.width:,} pixels, {len(first)} regions", fontsize=9)
    if attention is not None:
        beside = figure.add_subplot(grid[0, split:])
        show_image(beside, whole.float().mean(0, keepdim=True).to(torch.uint8))
        shown = (attention / attention.amax().clamp(min=1e-300)).sqrt().float().cpu().numpy()
        beside.imshow(shown, extent=(0, whole.shape[-1], whole.shape[-2], 0), cmap="viridis", alpha=0.65, vmin=0)
        beside.set_title("attention (root), fine where it looked", fontsize=9)
    for column, cell in enumerate(heaviest):
        place, name = cell, f"region {cell}"
        for row in range(depth):
            level, weight = sample.levels[row], weights[row]
            box = level.offsets.flatten(0, 1)[place].tolist()
            inner = sample.levels[row + 1] if row + 1 < depth else None
            panel = figure.add_subplot(grid[1 + row, 2 * column : 2 * column + 2])
            if inner is None:
                draws = level.indices.shape[1]
                siblings = torch.arange(draws, device="cpu") + place // draws * draws
                chosen = siblings[weight[siblings].topk(min(4, len(siblings))).indices.sort().values]
                show_image(panel, _mosaic(source, level.offsets.flatten(0, 1)[chosen], level.patch_size, low, high))
                each = ", ".join(f"{float(weight[one]):.2f}" for one in chosen)
                panel.set_title(f"patches ({each})", fontsize=8)
                continue
            step = _step(level.patch_size)
            show_image(
                panel, _read(source, host_tensor([box], torch.device("cpu")), level.patch_size, step, low, high)[0]
            )
            panel.set_title(f"{name} ({float(weight[place]):.2f})", fontsize=8)
            draws = inner.indices.shape[1]
            for number, (top, left) in enumerate(inner.offsets[place].tolist()):
                corner = round((top - box[0]) / step), round((left - box[1]) / step)
                frame(
                    panel, corner, (round(inner.patch_size[0] / step), round(inner.patch_size[1] / step)), str(number)
                )
            within = weights[row + 1].view(-1, draws)[place]
            best = int(within.argmax())
            place, name = place * draws + best, f"{name}.{best}"
    save(figure, path)


def _weights(sample: NestedSample, estimator: Estimator) -> list[Tensor]:
    """Of the boxes of each level, their weight in the estimate."""
    weights = [sample.levels[0].weights(estimator).detach().double().cpu().flatten()]
    for level in sample.levels[1:]:
        weights.append((weights[-1].unsqueeze(1) * level.weights(estimator).detach().double().cpu()).flatten())
    return weights


def _whole(source: ImageSource) -> tuple[float, float, Tensor]:
    """What is black and what is white, and the whole image (C, h, w) uint8 from a coarse view."""
    full = source.levels[0]
    view = read_view(source, scale=min(1.0, _WHOLE / max(full.height, full.width))).float()
    low, high = (0.0, 1.0) if source.dtype == torch.uint8 else (float(view.amin()), float(view.amax()))
    return low, high, _in_bytes(view, low, high)


def _in_bytes(view: Tensor, low: float, high: float) -> Tensor:
    shown = view[:3] if view.shape[0] >= 3 else view[:1]
    return (255 * (shown - low) / max(high - low, 1e-12)).clamp(0, 255).round().to(torch.uint8)


def _read(
    source: ImageSource, corners: Tensor, size: tuple[int, int], step: int, low: float, high: float
) -> list[Tensor]:
    """Boxes at corners (N, 2) as pictures (C, h, w) uint8, a pixel the mean of step×step; black beyond the image."""
    views = read_regions([source], corners[None].cpu(), size, step, Reading())[0].float().cpu()
    return [_in_bytes(view, low, high) for view in views]


def _step(size: tuple[int, int]) -> int:
    """Pixels along a side of one in the picture of a region: as many as divide it, and leave it large enough."""
    both = math.gcd(*size)
    return max((d for d in range(1, both + 1) if both % d == 0 and min(size) / d >= _PANEL / 2), default=1)


def _mosaic(source: ImageSource, corners: Tensor, size: tuple[int, int], low: float, high: float) -> Tensor:
    """Up to four patches beside and below each other, white between them."""
    patches = _read(source, corners, size, 1, low, high)
    gap = max(1, size[1] // 25)
    across = 1 if len(patches) == 1 else 2
    down = -(-len(patches) // across)
    height, width = down * (size[0] + gap) - gap, across * (size[1] + gap) - gap
    picture = torch.full((patches[0].shape[0], height, width), 255, dtype=torch.uint8, device="cpu")
    for number, patch in enumerate(patches):
        top, left = number // across * (size[0] + gap), number % across * (size[1] + gap)
        picture[:, top : top + size[0], left : left + size[1]] = patch
    return picture
