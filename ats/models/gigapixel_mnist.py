"""The networks of the Gigapixel MNIST experiment: a coarse attention for places, a finer one for digits in them.

The recipe is that of `ats.models.megapixel_mnist`, with less arithmetic: logits begin as the view's brightness and are
bounded, features are the maxima of four convolutions.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.models.classifier import ChannelsLast, GlobalMaxPool, L2Normalise, SoftBound, conv_norm
from ats.models.networks import Networks

_FEATURES = 64
_FINE = 16  # pixels of the image a view pixel, at which a digit is 1.75 pixels


class _FromBrightness(nn.Sequential):
    """Layers whose logits add to gain·(brightness of the cell − offset), so that attention starts where something is.

    The brightness has a weight of its own, 1 to begin with, which is learned with the rest. The offset puts logits
    about 0, where the bound that follows leaves them room. The layers begin with logits of 0.

    Args:
        layers: from a view (B, 1, h, w) to maps (B, D, h // stride, w // stride); a convolution to logits follows.
        channels: D.
        pool: (view, stride) -> the brightness of each cell.
        stride: view pixels a cell.
        gain, offset: constants.
    """

    def __init__(
        self,
        *layers: nn.Module,
        channels: int,
        pool: Callable[[Tensor, int], Tensor],
        stride: int,
        gain: float,
        offset: float,
    ) -> None:
        last = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
        self.pool, self.stride, self.gain, self.offset = pool, stride, gain, offset
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, view: Tensor) -> Tensor:  # (B, 1, h, w) -> (B, 1, h // stride, w // stride)
        brightness = self.pool(view, self.stride)
        return super().forward(view) + self.weight * self.gain * (brightness - self.offset)


def coarse_attention(stride: int = 1) -> nn.Sequential:
    """View (B, 1, h, w) of places -> logits (B, 1, h // stride, w // stride), from how much of a cell is bright."""
    layers = [
        ChannelsLast(),
        *conv_norm(1, 8, kernel=3),
        *conv_norm(8, 8, kernel=3),
        nn.AvgPool2d(stride),
        *conv_norm(8, 16, kernel=3),
    ]
    start = _FromBrightness(*layers, channels=16, pool=F.avg_pool2d, stride=stride, gain=500.0, offset=0.015)
    return nn.Sequential(start, SoftBound(5.0))


def fine_attention(stride: int) -> nn.Sequential:
    """View (B, 1, h, w) of glyphs -> logits (B, 1, h // stride, w // stride), from a cell's brightest pixel.

    Raises:
        ValueError: a stride that is not even.
    """
    if stride % 2:
        raise ValueError(f"the networks of levels up to a scale of {_FINE} need an even stride, got {stride}")
    layers = [
        ChannelsLast(),
        *conv_norm(1, 8, kernel=3),
        nn.MaxPool2d(2),
        *conv_norm(8, 16, kernel=3),
        nn.MaxPool2d(stride // 2),
        *conv_norm(16, 32, kernel=1),
    ]
    start = _FromBrightness(*layers, channels=32, pool=F.max_pool2d, stride=stride, gain=20.0, offset=0.3)
    return nn.Sequential(start, SoftBound(8.0))


def level_attention(scale: int, stride: int) -> nn.Sequential:
    """The attention network of a level, `Networks.level`: for digits where these show, else for places."""
    return fine_attention(stride) if scale <= _FINE else coarse_attention(stride)


def feature_network(*, normalised: bool = True) -> nn.Sequential:
    """Patches (M, 1, ph, pw) -> features (M, 64), of length 1 if `normalised`."""
    return nn.Sequential(
        ChannelsLast(),
        *conv_norm(1, 16, kernel=5, stride=2),
        *conv_norm(16, 32, kernel=3, stride=2),
        *conv_norm(32, 64, kernel=3, stride=2),
        *conv_norm(64, _FEATURES, kernel=3),
        GlobalMaxPool(),
        nn.BatchNorm1d(_FEATURES),  # all maxima are positive: around 0 they differ more
        *([L2Normalise()] if normalised else []),
    )


NETWORKS = {"modern": Networks(partial(coarse_attention, 1), feature_network, _FEATURES, level=level_attention)}
"""What an experiment has to know of its networks."""
