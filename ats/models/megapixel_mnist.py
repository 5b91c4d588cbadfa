"""The networks of the Megapixel MNIST experiment: as published, and a recipe that trains faster (``modern``).

What ``modern`` changes and why stands in docs/megapixel-mnist.md.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.models.classifier import (
    ChannelsLast,
    GlobalMaxPool,
    L2Normalise,
    SoftBound,
    conv_norm,
    three_convolutions,
)
from ats.models.networks import Networks, check_networks
from ats.models.resnet import RESNET_16, image_network

_MODERN_STRIDE = 3  # view pixels a cell
_MODERN_FEATURES = 128


class _FromBrightness(nn.Sequential):
    """Layers whose logits add to the view's brightness, so that attention starts where something is.

    It may go anywhere from there: the brightness has a weight of its own, which is learned with the rest.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.weight = nn.Parameter(torch.tensor(10.0))

    def forward(self, view: Tensor) -> Tensor:  # (B, 1, h, w) -> (B, 1, h // stride, w // stride)
        return super().forward(view) + self.weight * F.max_pool2d(view, _MODERN_STRIDE)


def attention_network(networks: str) -> nn.Sequential:
    """View (B, 1, h, w) -> logits (B, 1, h // stride, w // stride)."""
    check_networks(networks)
    if networks == "paper":
        return three_convolutions(1, nn.Tanh)
    layers = [
        ChannelsLast(),
        *conv_norm(1, 16, kernel=3),
        *conv_norm(16, 16, kernel=3),
        nn.MaxPool2d(_MODERN_STRIDE),
        *conv_norm(16, 32, kernel=3),
        nn.Conv2d(32, 1, 3, padding=1),
    ]
    return nn.Sequential(_FromBrightness(*layers), SoftBound(5.0))


def feature_network(networks: str, *, normalised: bool = True) -> nn.Sequential:
    """Patches (M, 1, ph, pw) -> features (M, D), of length 1 if `normalised`."""
    check_networks(networks)
    if networks == "paper":
        layers: list[nn.Module] = [nn.Conv2d(1, 32, 7), nn.ReLU(inplace=True)]
        for _ in range(3):
            layers += [nn.Conv2d(32, 32, 3), nn.ReLU(inplace=True)]
    else:
        layers = [
            *conv_norm(1, 16, kernel=5, stride=2),
            *conv_norm(16, 32, kernel=3, stride=2),
            *conv_norm(32, 64, kernel=3, stride=2),
            *conv_norm(64, 128, kernel=3),
        ]
    layers.append(GlobalMaxPool())
    if networks == "modern":
        layers.append(nn.BatchNorm1d(_MODERN_FEATURES))  # all maxima are positive: around 0 they differ more
    return nn.Sequential(ChannelsLast(), *layers, *([L2Normalise()] if normalised else []))


_IMAGE = partial(image_network, RESNET_16, 1)  # the same in both
NETWORKS = {
    "paper": Networks(partial(attention_network, "paper"), partial(feature_network, "paper"), 32, image=_IMAGE),
    "modern": Networks(
        partial(attention_network, "modern"),
        partial(feature_network, "modern"),
        _MODERN_FEATURES,
        stride=_MODERN_STRIDE,
        image=_IMAGE,
    ),
}
