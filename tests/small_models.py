"""A small `AttentionSampling` in float64, images for it, and Φ as a loop over its cells; used by several test files."""

import torch
from torch import Tensor, nn

import ats
from tests.helpers import cut, seeded


class UnitNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class Masked(nn.Module):
    """Attention that is −inf where the view is darker than −1."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, view: Tensor) -> Tensor:
        return self.attention(view).masked_fill(view < -1, float("-inf"))


def make_model(n_patches=4, patch_size=5, *, padded=True, masked=False, **options) -> ats.nn.AttentionSampling:
    """A model in float64 for images 24×30 with a view of 8×10; logits are 8×10, or 4×6 where not padded."""
    torch.manual_seed(0)
    padding = int(padded)
    attention = nn.Sequential(nn.Conv2d(1, 3, 3, padding=padding), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=padding))
    feature = nn.Sequential(nn.Flatten(), nn.Linear(patch_size**2, 6), nn.Tanh(), nn.Linear(6, 3), UnitNorm())
    with torch.no_grad():
        attention[-1].weight.mul_(8)  # an attention far from flat
    network = Masked(attention) if masked else attention
    return ats.nn.AttentionSampling(network, feature, n_patches, patch_size, **options).double()


def make_images() -> tuple[Tensor, Tensor]:
    """Views (2, 1, 8, 10) and the images (2, 1, 24, 30) that they are of."""
    image = torch.randn(2, 1, 24, 30, dtype=torch.float64, generator=seeded(3))
    return image[:, :, ::3, ::3].contiguous(), image


def slow_full(model, view, image, *, lost=0):
    """Φ cell by cell: the formula for where a cell lies, a slice there, its feature times its attention."""
    logits = model.attention(view)[:, 0]
    gh, gw = logits.shape[1:]
    attention = logits.flatten(1).softmax(-1)
    size = model.sampler.patch_size
    total = 0
    for cell in range(gh * gw):
        y, x = (
            ats.cell_offsets(torch.tensor(cell), (gh, gw), (24, 30), size, view_size=(8, 10), receptive_field=lost)
        ).tolist()
        patches = torch.stack([cut(one, y, x, size) for one in image])
        total = total + attention[:, cell, None] * model.feature(patches)
    return total


class FromView(nn.Module):
    def forward(self, view: Tensor) -> Tensor:
        return 5 * view
