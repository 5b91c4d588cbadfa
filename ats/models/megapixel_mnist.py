"""The networks of the Megapixel MNIST experiment: as published, a recipe that trains faster (``modern``), and one with
a wider attention network (``wide``).

What they change and why stands in docs/megapixel-mnist.md.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.models.classifier import (
    ChannelsLast,
    GlobalMaxPool,
    L2Normalise,
    SharingLayers,
    SoftBound,
    conv_norm,
    three_convolutions,
)
from ats.models.evidence import EvidenceAttention
from ats.models.networks import NETWORK_NAMES, Networks, check_networks
from ats.models.resnet import RESNET_16, image_network

_MODERN_STRIDE = 3  # view pixels a cell
_MODERN_FEATURES = 128
_BOUND = 5.0  # of the logits
_NAMES = (*NETWORK_NAMES, "wide")


class _FromBrightness(SharingLayers):
    """Layers whose logits add to the view's brightness, so that attention starts where something is.

    It may go anywhere from there: the brightness has a weight of its own, which is learned with the rest.
    """

    def __init__(self, *layers: nn.Module, depth: int) -> None:
        super().__init__(*layers, depth=depth)
        self.weight = nn.Parameter(torch.tensor(10.0))

    def rest(self, view: Tensor, maps: Tensor) -> Tensor:
        return super().rest(view, maps) + self.weight * F.max_pool2d(view, _MODERN_STRIDE)


def attention_network(networks: str) -> nn.Sequential:
    """View (B, 1, h, w) -> logits (B, 1, h // stride, w // stride)."""
    check_networks(networks, _NAMES)
    if networks == "paper":
        return three_convolutions(1, nn.Tanh)
    return nn.Sequential(_unbounded(networks)[0], SoftBound(_BOUND))


def evidence_network(networks: str, *, peaks: bool) -> EvidenceAttention:
    """The same with an evidence head."""
    network, channels = _unbounded(networks)
    return EvidenceAttention(network, channels, bound=_BOUND, peaks=peaks)


def _unbounded(networks: str) -> tuple[_FromBrightness, int]:
    """Attention without its bound, and the channels of its trunk."""
    width = 32 if networks == "wide" else 16
    trunk = [
        ChannelsLast(),
        *conv_norm(1, width, kernel=3),
        *conv_norm(width, width, kernel=3),
        nn.MaxPool2d(_MODERN_STRIDE),
    ]
    if networks == "wide":
        trunk += conv_norm(width, 2 * width, kernel=3)
        width = 2 * width
        hidden = width
    else:
        hidden = 2 * width
    own = [*conv_norm(width, hidden, kernel=3), nn.Conv2d(hidden, 1, 3, padding=1)]
    return _FromBrightness(*trunk, *own, depth=len(trunk)), width


def feature_network(networks: str, *, normalised: bool = True) -> nn.Sequential:
    """Patches (M, 1, ph, pw) -> features (M, D), of length 1 if `normalised`."""
    check_networks(networks, _NAMES)
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
    if networks != "paper":
        layers.append(nn.BatchNorm1d(_MODERN_FEATURES))  # all maxima are positive: around 0 they differ more
    return nn.Sequential(ChannelsLast(), *layers, *([L2Normalise()] if normalised else []))


_IMAGE = partial(image_network, RESNET_16, 1)  # the same in both
NETWORKS = {
    "paper": Networks(partial(attention_network, "paper"), partial(feature_network, "paper"), 32, image=_IMAGE),
} | {
    name: Networks(
        partial(attention_network, name),
        partial(feature_network, name),
        _MODERN_FEATURES,
        stride=_MODERN_STRIDE,
        image=_IMAGE,
        evidence=partial(evidence_network, name),
    )
    for name in ("modern", "wide")
}
