"""A linear classifier on attention-sampled features, and the parts that networks for it share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.functional import PatchSample
from ats.nn import AttentionSampling


class L2Normalise(nn.Module):
    """Flatten (M, …) to (M, D) and scale each row to length 1 (paper, section 3.4)."""

    def forward(self, features: Tensor) -> Tensor:
        """(M, …) -> (M, D)."""
        return F.normalize(features.flatten(1), dim=1)


class ChannelsLast(nn.Module):
    """Bring (M, C, H, W) to channels-last memory, in which CPUs and GPUs convolve faster."""

    pointwise = True

    def forward(self, images: Tensor) -> Tensor:
        """The same values."""
        return images.contiguous(memory_format=torch.channels_last)


class SoftBound(nn.Module):
    """Keep logits within ±limit, smoothly: limit·tanh(x / limit).

    No cell can then outweigh another by more than exp(2·limit), so that attention spreads over all cells that are
    worth looking at in place of collapsing onto the first that helped.
    """

    pointwise = True

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, logits: Tensor) -> Tensor:
        """The bounded logits, of the same shape."""
        return self.limit * torch.tanh(logits / self.limit)


class UniformAttention(nn.Module):
    """Attention that is the same everywhere: drawing from it is uniform sampling, the paper's U-N.

    Args:
        stride: view pixels a cell, along both axes.
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, view: Tensor) -> Tensor:
        """View (B, C, h, w) -> logits (B, h // stride, w // stride) of zeros."""
        return view.new_zeros(view.shape[0], view.shape[2] // self.stride, view.shape[3] // self.stride)


class ATSClassifier(nn.Module):
    """Φ̂ from attention sampling, then one linear layer.

    Args:
        sampling: the attention, the features and how they meet.
        n_features: D, the features' size.
        n_classes: classes.
        feature_scale: factor on the pooled features. Their length is at most 1, which bounds the logits that a
            linear layer with small weights can reach; 1 is the paper's.
    """

    def __init__(
        self, sampling: AttentionSampling, n_features: int, n_classes: int, feature_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.sampling = sampling
        self.head = nn.Linear(n_features, n_classes)
        self.feature_scale = feature_scale

    def forward(
        self, view: Tensor, image: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, PatchSample]:
        """View (B, C, h, w) and image (B, C, H, W) -> class logits (B, n_classes), PatchSample."""
        pooled, _, sample = self.sampling(view, image, generator=generator)
        return self.head(self.feature_scale * pooled), sample
