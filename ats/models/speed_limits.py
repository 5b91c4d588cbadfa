"""The networks of the speed limits experiment: as published, and our recipe (``modern``).

What ``modern`` changes and why stands in docs/experiments.md.
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
)
from ats.models.evidence import EvidenceAttention
from ats.models.networks import Networks, check_networks
from ats.models.resnet import RESNET_8, RESNET_16, image_network, resnet

_STRIDE = 8  # view pixels a cell
_MODERN_FEATURES = 128
_BOUND = 15.0  # of the logits
_MEAN, _STD = 0.4, 0.25


class _FromRedness(SharingLayers):
    """Layers whose logits add to how red the view is, so that attention starts where a sign's rim may be.

    It may go anywhere from there: redness has a weight of its own, 25·exp(gain), whose gain is learned with the rest.
    """

    def __init__(self, *layers: nn.Module, depth: int) -> None:
        super().__init__(*layers, depth=depth)
        self.gain = nn.Parameter(torch.tensor(0.0))  # of a size that the optimiser's steps are made for

    def rest(self, view: Tensor, maps: Tensor) -> Tensor:
        """Normalised view (B, 3, h, w) and the trunk's maps -> logits (B, 1, h // 8, w // 8), of mean 0."""
        red, green, blue = (view * _STD + _MEAN).split(1, dim=1)
        others = torch.maximum(green, blue)
        redness = (red - others) / (torch.maximum(red, others) + 0.1)  # of the colour, be it bright or dark
        redness = 25.0 * self.gain.exp() * F.max_pool2d(redness, _STRIDE)
        logits = super().rest(view, maps) + redness
        return logits - logits.mean((1, 2, 3), keepdim=True)  # in the middle of the bound that follows


def attention_network(networks: str) -> nn.Sequential:
    """View (B, 3, h, w) -> logits (B, 1, (h − lost) // 8, (w − lost) // 8); 8 are lost by the published one."""
    check_networks(networks)
    if networks == "paper":
        layers: list[nn.Module] = [
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
        ]
        return nn.Sequential(ChannelsLast(), *layers, nn.Conv2d(32, 1, 3), nn.MaxPool2d(_STRIDE))
    return nn.Sequential(_unbounded(), SoftBound(_BOUND))


def evidence_network(*, peaks: bool) -> EvidenceAttention:
    """Our recipe's with an evidence head."""
    return EvidenceAttention(_unbounded(), 32, bound=_BOUND, peaks=peaks)


def _unbounded() -> _FromRedness:
    """Our recipe's without its bound."""
    trunk = [
        ChannelsLast(),
        *conv_norm(3, 8, kernel=4, stride=2, padding=1),
        *conv_norm(8, 16, kernel=4, stride=2, padding=1),
        *conv_norm(16, 32, kernel=4, stride=2, padding=1),
    ]
    return _FromRedness(*trunk, *conv_norm(32, 32, kernel=3), nn.Conv2d(32, 1, 1), depth=len(trunk))


def feature_network(networks: str, *, normalised: bool = True) -> nn.Sequential:
    """Patches (M, 3, ph, pw) -> features (M, D), of length 1 if `normalised`."""
    check_networks(networks)
    if networks == "paper":
        layers = resnet(3, *RESNET_8)
    else:
        layers = [  # the first without a stride: digits of a far sign are a few pixels high
            *conv_norm(3, 16, kernel=3),
            *conv_norm(16, 32, kernel=3, stride=2),
            *conv_norm(32, 48, kernel=3),
            *conv_norm(48, 64, kernel=3, stride=2),
            *conv_norm(64, 96, kernel=3, stride=2),
            *conv_norm(96, 128, kernel=3),
            GlobalMaxPool(),
            nn.BatchNorm1d(_MODERN_FEATURES),  # all maxima are positive: around 0 they differ more
        ]
    return nn.Sequential(ChannelsLast(), *layers, *([L2Normalise()] if normalised else []))


_IMAGE = partial(image_network, RESNET_16, 3)  # the same in both
NETWORKS = {
    "paper": Networks(
        partial(attention_network, "paper"), partial(feature_network, "paper"), 32, stride=_STRIDE, lost=8, image=_IMAGE
    ),
    "modern": Networks(
        partial(attention_network, "modern"),
        partial(feature_network, "modern"),
        _MODERN_FEATURES,
        stride=_STRIDE,
        mean=[_MEAN] * 3,
        std=[_STD] * 3,
        image=_IMAGE,
        evidence=evidence_network,
    ),
}
