"""Pictures of what a model looked at."""

from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from ats.experiments.localisation import attention_map
from ats.experiments.plotting.overlay import Attention, extent_of, frame, grid_of, save, scale_of, show_attention
from ats.models import ATSClassifier

_PATCHES_PER_ROW = 5


@torch.no_grad()
def draw_attention(
    model: ATSClassifier,
    view: Tensor,
    image: Tensor,
    label: Tensor,
    path: Path,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """One row an image: the image with the drawn patches, the view, the attention map and the patches.

    Args:
        model: in evaluation mode.
        view: (B, C, h, w), as the attention network takes it.
        image: (B, C, H, W).
        label: (B,) true classes.
        path: of the PNG that is written.
        generator: of the draws.
    """
    attention, offsets, patch_size = attention_map(model, view, image)
    grid = grid_of(offsets)
    extent, scale = extent_of(Attention(attention[0], offsets, patch_size), *grid), scale_of(attention)
    scores, sample = model(view, image, generator=generator)
    weights = sample.weights(model.sampling.estimator)
    batch, n_patches = sample.indices.shape
    patch_rows = -(-n_patches // _PATCHES_PER_ROW)

    figure = plt.figure(figsize=(14, 3.6 * batch), layout="constrained")
    panels = figure.subfigures(batch, 1, squeeze=False)[:, 0]
    for b, panel in enumerate(panels):
        layout = panel.add_gridspec(1, 4, width_ratios=[1, 1, 1, 1.6])
        guess = int(scores[b].argmax())
        axes = panel.add_subplot(layout[0])
        _show(axes, image[b].float(), f"image {image.shape[2]}×{image.shape[3]}: class {int(label[b])}, said {guess}")
        for n in range(n_patches):
            top, left = sample.offsets[b, n].tolist()
            frame(axes, (top, left), (sample.patches.shape[-2], sample.patches.shape[-1]), str(n))
        _show(panel.add_subplot(layout[1]), view[b], f"view {view.shape[2]}×{view.shape[3]}")
        axes = panel.add_subplot(layout[2])
        shown = show_attention(axes, 255 * _between(image[b]), attention[b].view(grid), scale, extent)
        axes.set(xlim=(0, image.shape[3]), ylim=(image.shape[2], 0))
        _bare(axes, f"attention, entropy {float(sample.entropy[b]):.1f} nats")
        panel.colorbar(shown, ax=axes, shrink=0.7, format="%.2g")
        places = layout[3].subgridspec(patch_rows, _PATCHES_PER_ROW)
        for n in range(n_patches):
            title = f"{n + 1}: a {float(sample.log_attention[b, n].exp()):.2g}\nweight {float(weights[b, n]):.2g}"
            _show(panel.add_subplot(places[n]), sample.patches[b, n], title, size=7.5)
    save(figure, path)


def _show(axes: Axes, picture: Tensor, title: str, size: float = 9.5) -> None:
    pixels = _between(picture).movedim(0, -1)  # (h, w, C)
    axes.imshow(pixels.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    _bare(axes, title, size)


def _between(picture: Tensor) -> Tensor:
    """A picture in [0, 1], from the least to the most there is."""
    picture = picture.float().cpu()
    low, high = picture.amin(), picture.amax()
    return (picture - low) / (high - low).clamp(min=1e-6)


def _bare(axes: Axes, title: str, size: float = 9.5) -> None:
    axes.set_title(title, fontsize=size)
    axes.set_xticks([])
    axes.set_yticks([])
