"""Networks for images of any kind: any number of channels, patches of any size from about 16 pixels on.

The recipe is that of `ats.models.colon_cancer` with one more stage of features, for patches that are larger.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from ats.models.classifier import ChannelsLast, GlobalMaxPool, L2Normalise, SharingLayers, SoftBound, conv_norm
from ats.models.evidence import EvidenceAttention
from ats.models.networks import Networks
from ats.models.resnet import RESNET_8, image_network

_FEATURES = 128
_BOUND = 5.0  # of the logits
_TRUNK = 8  # layers up to the pooling


def attention_network(channels: int) -> nn.Sequential:
    """View (B, channels, h, w) -> logits (B, 1, h // 2, w // 2)."""
    return level_network(channels, 1, 2)


def level_network(channels: int, scale: int, stride: int) -> nn.Sequential:
    """A level of nested attention: views (M, channels, h, w) -> logits (M, 1, h // stride, w // stride)."""
    return nn.Sequential(*_layers(channels, stride), SoftBound(_BOUND))


def evidence_network(channels: int, *, peaks: bool) -> EvidenceAttention:
    """`attention_network` with an evidence head, beside its last two convolutions."""
    return EvidenceAttention(SharingLayers(*_layers(channels, 2), depth=_TRUNK), 16, bound=_BOUND, peaks=peaks)


def _layers(channels: int, stride: int) -> list[nn.Module]:
    return [
        ChannelsLast(),
        *conv_norm(channels, 16, kernel=3),
        *conv_norm(16, 16, kernel=3),
        nn.MaxPool2d(stride),
        *conv_norm(16, 16, kernel=3),
        nn.Conv2d(16, 1, 3, padding=1),
    ]


def feature_network(channels: int, *, normalised: bool = True) -> nn.Sequential:
    """Patches (M, channels, ph, pw) -> features (M, 128), of length 1 if `normalised`."""
    return nn.Sequential(
        ChannelsLast(),
        *conv_norm(channels, 32, kernel=3),
        nn.MaxPool2d(2),
        *conv_norm(32, 48, kernel=3),
        *conv_norm(48, 64, kernel=3, stride=2),
        *conv_norm(64, 96, kernel=3),
        *conv_norm(96, _FEATURES, kernel=3, stride=2),
        GlobalMaxPool(),
        nn.BatchNorm1d(_FEATURES),  # all maxima are positive: around 0 they differ more
        *([L2Normalise()] if normalised else []),
    )


def image_networks(channels: int, mean: Sequence[float], std: Sequence[float]) -> Networks:
    """The networks for images of so many channels, of this mean and standard deviation each."""
    return Networks(
        partial(attention_network, channels),
        partial(feature_network, channels),
        _FEATURES,
        stride=2,
        mean=mean,
        std=std,
        image=partial(image_network, RESNET_8, channels),
        level=partial(level_network, channels),
        evidence=partial(evidence_network, channels),
    )
