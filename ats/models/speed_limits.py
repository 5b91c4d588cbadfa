"""The networks of the speed limits experiment: as published, and our recipe (``modern``).

What ``modern`` changes and why stands in docs/experiments.md.
"""

from torch import nn

from ats.models.classifier import ChannelsLast, L2Normalise, Normalisation, SoftBound, check_networks, conv_norm
from ats.models.resnet import RESNET_8, RESNET_16, resnet

N_FEATURES = {"paper": 32, "modern": 32}
ATTENTION_STRIDE = {"paper": 8, "modern": 8}  # view pixels a cell
ATTENTION_LOSS = {"paper": 8, "modern": 8}  # view pixels lost by the unpadded convolutions
NORMALISATION: dict[str, Normalisation] = {"paper": (None, None), "modern": ([0.4, 0.4, 0.4], [0.25, 0.25, 0.25])}


def attention_network(networks: str) -> nn.Sequential:
    """View (B, 3, h, w) -> logits (B, 1, (h − 8) // 8, (w − 8) // 8)."""
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
        return nn.Sequential(ChannelsLast(), *layers, nn.Conv2d(32, 1, 3), nn.MaxPool2d(8))
    layers = [
        *conv_norm(3, 8, kernel=3, padding=0),
        *conv_norm(8, 16, kernel=3, padding=0),
        *conv_norm(16, 32, kernel=3, padding=0),
    ]
    return nn.Sequential(ChannelsLast(), *layers, nn.Conv2d(32, 1, 3), nn.MaxPool2d(8), SoftBound(5.0))


def feature_network(networks: str, *, normalised: bool = True) -> nn.Sequential:
    """Patches (M, 3, ph, pw) -> features (M, N_FEATURES), of length 1 if `normalised`."""
    check_networks(networks)
    strides = RESNET_8["strides"] if networks == "paper" else (2, 2, 2, 2)
    layers = resnet(3, RESNET_8["widths"], strides)
    return nn.Sequential(ChannelsLast(), *layers, *([L2Normalise()] if normalised else []))


def image_network(networks: str) -> tuple[nn.Sequential, int]:
    """The CNN's layers from images (B, 3, H, W) to features, and how many these are: the same for both `networks`."""
    check_networks(networks)
    return nn.Sequential(ChannelsLast(), *resnet(3, **RESNET_16)), RESNET_16["widths"][-1]
