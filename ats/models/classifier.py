"""A linear classifier on attention-sampled features, and the parts that networks for it share."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.batches import Images, Maps, Views, sizes_of
from ats.nn import AttentionSampling
from ats.samples import PatchSample


class L2Normalise(nn.Module):
    """Flatten (M, …) to (M, D) and scale each row to length 1 (paper, section 3.4)."""

    def forward(self, features: Tensor) -> Tensor:
        """(M, …) -> (M, D)."""
        return F.normalize(features.flatten(1), dim=1)


def three_convolutions(channels: int, activation: type[nn.Module]) -> nn.Sequential:
    """A published attention network: view (B, channels, h, w) -> logits (B, 1, h, w)."""
    network = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        activation(),
        nn.Conv2d(8, 8, 3, padding=1),
        activation(),
        nn.Conv2d(8, 1, 3, padding=1),
    )
    # Convolved as the parameters lie, grey images too.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class ChannelsLast(nn.Module):
    """Bring (M, C, H, W) to channels-last memory, in which CPUs and GPUs convolve faster."""

    def forward(self, images: Tensor) -> Tensor:
        """The same values."""
        if images.shape[1] == 1:
            # A grey image lies in memory either way; the stride of its one channel tells PyTorch which is meant.
            return images.contiguous().squeeze(1).unsqueeze(-1).movedim(-1, 1)
        return images.contiguous(memory_format=torch.channels_last)


class PlacedFeatures(nn.Module):
    """Features that know where their patch lies, of length 1: those of the patch plus some of its place.

    Args:
        feature: from patches (M, C, ph, pw) to features (M, D).
        n_features: D.
        hidden: units between the place and what is added.

    Source: paper, end of section 3.4.
    """

    def __init__(self, feature: nn.Module, n_features: int, hidden: int = 32) -> None:
        super().__init__()
        self.feature = feature
        self.place = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, n_features))
        self.normalise = L2Normalise()

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Patches (M, C, ph, pw) with centres (y, x) in [0, 1] (M, 2) -> (M, D)."""
        return self.normalise(self.feature(patches) + self.place(2 * positions - 1))


class GlobalMaxPool(nn.Module):
    """The largest value of each channel."""

    def forward(self, maps: Tensor) -> Tensor:
        """(M, D, h, w) -> (M, D)."""
        return maps.flatten(2).amax(-1)


class SoftBound(nn.Module):
    """Keep logits within ±limit, smoothly: limit·tanh(x / limit).

    No cell can then outweigh another by more than exp(2·limit), so that attention spreads over all cells that are
    worth looking at in place of collapsing onto the first that helped.

    Attributes:
        limit: a buffer, which a training may widen once attention has found what is worth looking at.
    """

    limit: Tensor

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.start = limit
        self.register_buffer("limit", torch.tensor(float(limit)))

    def widen(self, times: float) -> None:
        """Let the limit be so many times what it was at the start."""
        self.limit.fill_(self.start * times)

    def forward(self, logits: Tensor) -> Tensor:
        """The bounded logits, of the same shape."""
        return self.limit * torch.tanh(logits / self.limit)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}limit", self.limit)  # of weights from before it was kept with them
        super()._load_from_state_dict(state_dict, prefix, *args)


class SharingLayers(nn.Sequential):
    """Layers in order, of which the first ones, its trunk, are shared with whatever else looks at the same view.

    Args:
        layers: from a view (B, C, h, w) to logits (B, 1, gh, gw).
        depth: how many of them are the trunk.
    """

    def __init__(self, *layers: nn.Module, depth: int) -> None:
        super().__init__(*layers)
        self.depth = depth

    def trunk(self, view: Tensor) -> Tensor:
        """View (B, C, h, w) -> maps (B, D, gh, gw)."""
        for layer in list(self)[: self.depth]:
            view = layer(view)
        return view

    def rest(self, view: Tensor, maps: Tensor) -> Tensor:
        """The view and its trunk's maps -> logits (B, 1, gh, gw)."""
        for layer in list(self)[self.depth :]:
            maps = layer(maps)
        return maps

    def forward(self, view: Tensor) -> Tensor:
        """View (B, C, h, w) -> logits (B, 1, gh, gw)."""
        return self.rest(view, self.trunk(view))


class UniformAttention(nn.Module):
    """Attention that is the same everywhere: drawing from it is uniform sampling, the paper's U-N.

    Args:
        stride: view pixels a cell, along both axes.
        lost: view pixels that the attention network it stands for loses along an axis.
    """

    def __init__(self, stride: int = 1, lost: int = 0) -> None:
        super().__init__()
        self.stride = stride
        self.lost = lost

    def forward(self, view: Tensor) -> Tensor:
        """View (B, C, h, w) -> logits (B, (h − lost) // stride, (w − lost) // stride) of zeros."""
        height, width = ((size - self.lost) // self.stride for size in view.shape[-2:])
        return view.new_zeros(view.shape[0], height, width)


def conv_norm(
    inputs: int, outputs: int, *, kernel: int, stride: int = 1, padding: int | None = None
) -> list[nn.Module]:
    """A convolution, by default with 'same' padding, batch norm and ReLU."""
    padding = kernel // 2 if padding is None else padding
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class ScaledLinear(nn.Linear):
    """A linear layer whose outputs are in a unit of their own: spread·(W x + b) + centre, with weights around 1.

    Args:
        linear: W and b.
        centre, spread: constants, which no checkpoint holds.
    """

    def __init__(self, linear: nn.Linear, centre: float, spread: float) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.centre, self.spread = centre, spread

    def forward(self, input: Tensor) -> Tensor:
        """(M, in) -> (M, out)."""
        return super().forward(input) * self.spread + self.centre


class SamplingClassifier(nn.Module):
    """What classifiers on sampled features share: `sampling`, then one linear layer, `head`."""

    head: nn.Linear
    feature_scale: float

    def classify(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, D) -> class logits (B, n_classes), linear."""
        return self.head(self.feature_scale * pooled)


class ATSClassifier(SamplingClassifier):
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
        self,
        view: Views,
        image: Images,
        *,
        mask: Maps | None = None,
        generator: torch.Generator | None = None,
        draws: int = 1,
    ) -> tuple[Tensor, PatchSample]:
        """View (B, C, h, w) and image (B, C, H, W) -> class logits (draws·B, n_classes), PatchSample of the first draw.

        With several draws each image comes once for each, all images of the first draw first. `mask` is as in
        `ats.sample_cells`. Views and images may be sequences, as `ats.nn.AttentionSampling` takes them.
        """
        pooled, samples = self.draw(view, image, mask=mask, generator=generator, draws=draws)
        return self.classify(pooled), samples[0]

    def draw(
        self,
        view: Views,
        image: Images,
        *,
        mask: Maps | None = None,
        generator: torch.Generator | None = None,
        draws: int = 1,
    ) -> tuple[Tensor, list[PatchSample]]:
        """Arguments of `forward` -> pooled features (draws·B, D), PatchSample of each draw."""
        pooled, logits, sample = self.sampling(view, image, mask=mask, generator=generator)
        again = {"mask": mask, "generator": generator, "grid_sizes": sample.grid_sizes}
        more = [self.sampling.draw(image, logits, sizes_of(view), **again) for _ in range(draws - 1)]
        return torch.cat([pooled, *(each for each, _ in more)]), [sample, *(each for _, each in more)]


class CNNClassifier(nn.Module):
    """A network on the whole image, or on a smaller version of it, then one linear layer: the paper's CNN baseline.

    Args:
        layers: from images (B, C, h, w) to features (B, D).
        n_features: D.
        n_classes: classes.
    """

    def __init__(self, layers: nn.Module, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(n_features, n_classes)

    def forward(
        self, view: Tensor | Sequence[Tensor], image: Tensor | Sequence[Tensor], *, generator: Any = None
    ) -> tuple[Tensor, None]:
        """View (B, C, h, w) -> class logits (B, n_classes), and no sample: nothing is drawn.

        Views of different sizes (C, h, w) go through one by one.
        """
        features = (
            self.layers(view) if isinstance(view, Tensor) else torch.cat([self.layers(one[None]) for one in view])
        )
        return self.head(features), None
