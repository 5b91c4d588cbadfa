"""Images of different sizes, a model for them, and what each image alone gives."""

import numpy as np
import torch
from torch import nn

import ats
from ats.functional import extract_cells
from ats.sources import from_arrays
from tests.helpers import seeded

SIZES = (48, 64), (96, 40), (48, 64), (33, 77)
STEP = 4  # image pixels a view pixel


def make_images(dtype=torch.uint8, sizes=SIZES, channels=3):
    limits = (-3, 3) if dtype.is_floating_point else (torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1)
    whole = [torch.randint(*limits, (channels, *size), generator=seeded(i)) for i, size in enumerate(sizes)]
    return [image.to(dtype) for image in whole]


def views_of(images):
    """Of a quarter of the sides, rounded up, whose numbers are whole-sized whatever the image's are."""
    return [image[:, ::STEP, ::STEP].double() / 1000 for image in images]


def stored(images, folder=None):
    """The images as sources: arrays in memory, or memory maps of files."""
    if folder is None:
        return [from_arrays(image.numpy()) for image in images]
    for number, image in enumerate(images):
        np.save(folder / f"{number}.npy", image.numpy())
    return [from_arrays(np.load(folder / f"{number}.npy", mmap_mode="r")) for number in range(len(images))]


class Attention(nn.Module):
    """Logits of cells of 2×2 view pixels of an unpadded 3×3 convolution: 2 view pixels are lost, the rest is pooled."""

    def __init__(self, channels=3):
        super().__init__()
        self.layer = nn.Conv2d(channels, 1, 3)
        self.seen = []

    def forward(self, view):
        self.seen.append(tuple(view.shape))
        return nn.functional.avg_pool2d(self.layer(view), 2)


class Placed(nn.Module):
    def __init__(self, patch=7, channels=3):
        super().__init__()
        self.layer = nn.Linear(channels * patch * patch, 5)

    def forward(self, patches, positions):
        return torch.cat([self.layer(patches.flatten(1)), positions], dim=1)


def make_model(n=6, **options):
    torch.manual_seed(0)
    options = {"receptive_field": 2, "positions": True, "dtype": torch.float64} | options
    return ats.nn.AttentionSampling(Attention(), Placed(), n, 7, **options).double().eval()


def one_by_one(model, views, images, cells):
    """What the patches of one row of a draw are, by the path of tensors in memory."""
    for number, (view, image) in enumerate(zip(views, images, strict=True)):
        own = model.attention(view[None])
        row, column = cells.indices[number] // cells.grid_size[1], cells.indices[number] % cells.grid_size[1]
        flat = (row * own.shape[-1] + column)[None]
        patches, offsets = extract_cells(
            image[None], flat, tuple(own.shape[-2:]), (7, 7), view_size=tuple(view.shape[-2:]), receptive_field=2,
            padding=model.sampler.padding, mean=model.sampler.mean, std=model.sampler.std, dtype=model.sampler.dtype,
        )  # fmt: skip
        yield own[:, 0], flat, patches, offsets
