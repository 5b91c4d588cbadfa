"""Attention of a nested model as a picture, fine where it looked closely and coarse where it did not."""

import torch
from torch import Tensor

from ats.batches import Images, Maps, Views, size_of
from ats.heatmaps import box_pictures
from ats.nested import NestedAttentionSampling
from ats.nested_levels import Look
from ats.nested_sample import NestedSample

LONGEST = 1024
"""Pixels along the longer side of a picture, where no size is given."""

_AT_ONCE = 4096  # boxes


@torch.no_grad()
def zoomed_heatmap(
    sampling: NestedAttentionSampling,
    view: Views | None,
    image: Images,
    sample: NestedSample,
    *,
    mask: Maps | None = None,
    size: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Attention spread over the pixels that it lies on, as mass: (h, w) float64 of each image, as `ats.heatmap`.

    In a region that was drawn it is the region's own attention, times that on it; elsewhere that on whole regions. The
    regions are looked at once more, their patches are not read.

    Args:
        sampling: in evaluation mode.
        view, image, mask: as in ``sampling(view, image, mask=mask)``.
        sample: what was drawn from them.
        size: pixels (h, w) of the pictures; where None the image's own, but no more than 1,024 along the longer side.
    """
    if len(sample.levels) != len(sampling.levels) or len(sample) != len(image):
        raise ValueError(
            f"sample must be what this model drew from these images: {len(sampling.levels)} levels and {len(image)} "
            f"images, got {len(sample.levels)} and {len(sample)}"
        )
    look = sampling.look(view, image, mask)
    share = torch.ones(len(image), 1, dtype=torch.float64, device=look.logits.device)  # (B, M) of each region
    images = [size_of(one) for one in image]
    pictures = [torch.zeros(size or _fitting(one), dtype=torch.float64, device=look.logits.device) for one in images]
    for depth, drawn in enumerate(sample.levels):
        attention = look.logits.flatten(1).double().softmax(-1) * share.view(-1, 1)  # (R, K)
        last = depth + 1 == len(sample.levels)
        indices = drawn.readable()
        if not last:
            again = (indices.unsqueeze(2) == indices.unsqueeze(1)) & ~drawn.surplus.unsqueeze(1)  # (R, n, n)
            inner = attention.gather(1, indices) / again.sum(-1).clamp(min=1)
            inner = inner.masked_fill(drawn.surplus, 0.0)
            attention = attention.scatter(1, indices, 0.0)
        _add_cells(pictures, attention, look, images)
        if not last:
            share = inner.view(len(image), -1)
            boxes, side = sampling.boxes(depth, look, indices)
            look = sampling.look_into(depth + 1, image, boxes.view(len(image), -1, 2), side, look.ground)
    return pictures


def _add_cells(pictures: list[Tensor], attention: Tensor, look: Look, images: list[tuple[int, int]]) -> None:
    """Add the attention (R, K) of all cells of what a level saw to the pictures of the images."""
    side = round(look.cells.side[0]), round(look.cells.side[1])
    every = torch.arange(attention.shape[1], device=attention.device).expand(len(attention), -1)
    offsets = look.cells.offsets(every, look.regions.flatten(0, 1), side)  # (R, K, 2)
    per_image = attention.view(len(pictures), -1), offsets.reshape(len(pictures), -1, 2)
    for picture, mass, boxes, full in zip(pictures, *per_image, images, strict=True):
        there = mass > 0
        shape = picture.shape[0], picture.shape[1]
        for some, where in zip(mass[there].split(_AT_ONCE), boxes[there].split(_AT_ONCE), strict=True):
            picture += box_pictures(some[None], where[None], side, full, shape)[0]


def _fitting(image: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, LONGEST / max(image))
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))
