"""Images and logits to draw from, and the patches that must be read; used by several test files."""

import torch

from tests.helpers import cut, seeded

INF = float("inf")


def make_image(dtype=torch.uint8, size=(40, 60)):
    if dtype == torch.uint8:
        return torch.randint(0, 256, (2, 3, *size), generator=seeded(), dtype=torch.uint8)
    return torch.randn(2, 3, *size, generator=seeded(), dtype=torch.float64).to(dtype)


def make_logits(*shape):
    return torch.randn(*(shape or (2, 4, 6)), generator=seeded(1), dtype=torch.float64).float()


def expected_patches(image, sample, size, mode="constant"):
    """Slices of each image at the sample's offsets, bytes as values in [0, 1]."""
    patches = [
        torch.stack([cut(one, y, x, size, mode) for y, x in offsets])
        for one, offsets in zip(image, sample.offsets.tolist(), strict=True)
    ]
    return torch.stack(patches) / (255 if image.dtype == torch.uint8 else 1)
