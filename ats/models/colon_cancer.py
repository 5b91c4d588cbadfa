"""The networks of the colon cancer experiment: as published, and our recipe (``modern``).

Published features are those of Ilse et al. 2018, which the paper shares with Deep MIL. What ``modern`` changes and why
stands in docs/experiments.md.
"""

from functools import partial

from torch import nn

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
from ats.models.networks import Networks, check_networks
from ats.models.resnet import RESNET_8, image_network

_BOUND = 5.0  # of the logits
_TRUNK = 8  # layers up to the pooling


def attention_network(networks: str) -> nn.Sequential:
    """View (B, 3, h, w) -> logits (B, 1, h // stride, w // stride)."""
    check_networks(networks)
    if networks == "paper":
        return three_convolutions(3, nn.ReLU)
    return nn.Sequential(*_layers(), SoftBound(_BOUND))


def evidence_network(*, peaks: bool) -> EvidenceAttention:
    """Our recipe's with an evidence head, beside its last two convolutions."""
    return EvidenceAttention(SharingLayers(*_layers(), depth=_TRUNK), 16, bound=_BOUND, peaks=peaks)


def _layers() -> list[nn.Module]:
    return [
        ChannelsLast(),
        *conv_norm(3, 16, kernel=3),
        *conv_norm(16, 16, kernel=3),
        nn.MaxPool2d(2),
        *conv_norm(16, 16, kernel=3),
        nn.Conv2d(16, 1, 3, padding=1),
    ]


def feature_network(networks: str, *, normalised: bool = True) -> nn.Sequential:
    """Patches (M, 3, 27, 27) -> features (M, D), of length 1 if `normalised`."""
    check_networks(networks)
    layers: list[nn.Module]
    if networks == "paper":
        layers = [
            nn.Conv2d(3, 36, 4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(36, 48, 3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48 * 5 * 5, 512),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(),
        ]
    else:
        layers = [
            *conv_norm(3, 32, kernel=3),
            nn.MaxPool2d(2),
            *conv_norm(32, 48, kernel=3),
            *conv_norm(48, 64, kernel=3, stride=2),
            *conv_norm(64, 96, kernel=3),
            GlobalMaxPool(),
        ]
    return nn.Sequential(ChannelsLast(), *layers, *([L2Normalise()] if normalised else []))


_IMAGE = partial(image_network, RESNET_8, 3)  # the same in both
NETWORKS = {
    "paper": Networks(partial(attention_network, "paper"), partial(feature_network, "paper"), 512, image=_IMAGE),
    "modern": Networks(
        partial(attention_network, "modern"),
        partial(feature_network, "modern"),
        96,
        stride=2,
        mean=[0.76, 0.6, 0.75],
        std=[0.15, 0.2, 0.15],
        image=_IMAGE,
        evidence=evidence_network,
    ),
}
