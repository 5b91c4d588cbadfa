"""Deep MIL (Ilse et al. 2018, Attention-based Deep Multiple Instance Learning): every patch of a grid is read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ats_kernels import extract_patches


class MILAttention(nn.Module):
    """a_k = softmax(wᵀ tanh(V h_k)) over a bag, or wᵀ (tanh(V h_k) ⊙ sigmoid(U h_k)) if gated.

    Args:
        n_features: the size of h_k.
        hidden: rows of V and U; 128 in Ilse et al.
        gated: with U.
    """

    def __init__(self, n_features: int, *, hidden: int = 128, gated: bool = False) -> None:
        super().__init__()
        self.tanh_layer = nn.Linear(n_features, hidden)
        self.gate = nn.Linear(n_features, hidden) if gated else None
        self.score = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, n, D) of bags -> log attention (B, n)."""
        hidden = torch.tanh(self.tanh_layer(features))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(features))
        return self.score(hidden).squeeze(-1).log_softmax(-1)


class MILClassifier(nn.Module):
    """Attention pooling over the features of all patches of a regular grid, then one linear layer.

    Args:
        feature: network from patches (M, C, ph, pw) to features (M, D).
        n_features: D.
        n_classes: classes.
        patch_size: pixels a side.
        grid_step: pixels from one patch to the next; the first patch is centred on the first step's middle.
        gated: the gated attention.
        chunk_size: patches of an image whose features are computed at a time, and again in the backward pass; 0: all
            at once, which keeps every activation.
        mean, std: of the patches, as in `ats.sample_patches`.
    """

    def __init__(
        self,
        feature: nn.Module,
        n_features: int,
        n_classes: int,
        *,
        patch_size: int,
        grid_step: int,
        gated: bool = False,
        chunk_size: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.feature = feature
        self.attention = MILAttention(n_features, gated=gated)
        self.head = nn.Linear(n_features, n_classes)
        self.patch_size = patch_size
        self.grid_step = grid_step
        self.chunk_size = chunk_size
        self.mean = mean
        self.std = std

    def forward(
        self, view: Tensor | Sequence[Tensor], image: Tensor | Sequence[Tensor], *, generator: Any = None
    ) -> tuple[Tensor, None]:
        """Image (B, C, H, W) -> class logits (B, n_classes), and no sample: nothing is drawn, no view is looked at.

        Images may differ in size (C, H, W): each is a bag of its own grid.
        """
        if isinstance(image, Tensor):
            return self.pool(image)[0], None
        offsets = [self._offsets(one[None]) for one in image]
        if self.chunk_size:
            bags = [self._bag(one[None], places)[0] for one, places in zip(image, offsets, strict=True)]
        else:  # all at once, as images of one size: a norm sees them together
            read = [self._patches(one[None], places)[0] for one, places in zip(image, offsets, strict=True)]
            bags = list(self.feature(torch.cat(read)).split([len(places) for places in offsets]))
        return self.head(torch.stack([self._pool(bag[None])[0][0] for bag in bags])), None

    def pool(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image (B, C, H, W) -> class logits (B, n_classes), log attention (B, n), offsets (n, 2) of the patches."""
        offsets = self._offsets(image)
        pooled, log_attention = self._pool(self._bag(image, offsets))
        return self.head(pooled), log_attention, offsets

    def _offsets(self, image: Tensor) -> Tensor:
        offsets = grid_offsets((image.shape[2], image.shape[3]), self.patch_size, self.grid_step)
        return offsets.to(self.head.weight.device)  # where the patches come out; the image may be in main memory

    def _bag(self, image: Tensor, offsets: Tensor) -> Tensor:
        """Features (B, n, D) of all patches."""
        chunks = offsets.split(self.chunk_size or len(offsets))
        return torch.cat([self._features(image, chunk) for chunk in chunks], dim=1)

    def _pool(self, features: Tensor) -> tuple[Tensor, Tensor]:
        log_attention = self.attention(features)
        return torch.einsum("bn,bnd->bd", log_attention.exp(), features), log_attention

    def _features(self, image: Tensor, offsets: Tensor) -> Tensor:
        if self.chunk_size and torch.is_grad_enabled():
            features = checkpoint(self._read, image, offsets, use_reentrant=False)
            assert isinstance(features, Tensor)
            return features
        return self._read(image, offsets)

    def _read(self, image: Tensor, offsets: Tensor) -> Tensor:
        patches = self._patches(image, offsets)
        return self.feature(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])

    def _patches(self, image: Tensor, offsets: Tensor) -> Tensor:
        offsets = offsets.expand(len(image), -1, -1)
        return extract_patches(image, offsets, self.patch_size, mean=self.mean, std=self.std)  # (B, m, C, ph, pw)


def grid_offsets(image_size: tuple[int, int], patch_size: int, step: int) -> Tensor:
    """Top-left pixels (n, 2) int64 of patches centred on the cells of a grid that covers an image.

    There are ⌈size / step⌉ cells along an axis, spread evenly; patches at the border may lie partly outside.
    """
    axes = []
    for size in image_size:
        cells = -(-size // step)
        # centre − patch/2 = (i + ½)·size/cells − patch/2, rounded half up, in integers
        numerator = (2 * torch.arange(cells, device="cpu") + 1) * size - patch_size * cells
        axes.append((numerator + cells).div(2 * cells, rounding_mode="floor"))
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], dim=-1)
