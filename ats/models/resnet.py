"""Residual networks with pre-activation (He et al. 2016, Identity Mappings), as the paper's experiments use them.

A network of n blocks has a convolution, two in each block, and the linear layer that follows it: ResNet-8 has three
blocks, ResNet-16 seven.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ats.models.classifier import ChannelsLast


class ResidualBlock(nn.Module):
    """Batch norm, ReLU, 3×3 convolution, twice, added to what the first ReLU gives.

    As in the paper's release the shortcut starts there, after the first batch norm; it is a 1×1 convolution where the
    shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(M, inputs, h, w) -> (M, outputs, h / stride, w / stride)."""
        active = F.relu(self.first_norm(maps))
        return self.second(F.relu(self.second_norm(self.first(active)))) + self.shortcut(active)


class GlobalAveragePool(nn.Module):
    """The mean of each channel."""

    def forward(self, maps: Tensor) -> Tensor:
        """(M, D, h, w) -> (M, D)."""
        return maps.mean((2, 3))


def resnet(channels: int, widths: Sequence[int], strides: Sequence[int]) -> list[nn.Module]:
    """Layers from images (M, channels, h, w) to features (M, widths[-1]): a convolution, blocks, global average.

    Args:
        channels: of the images.
        widths: channels of the first convolution and of each block.
        strides: of the same.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, strides[0], padding=1, bias=False)]
    for inputs, outputs, stride in zip(widths[:-1], widths[1:], strides[1:], strict=True):
        layers.append(ResidualBlock(inputs, outputs, stride))
    return [*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True), GlobalAveragePool()]


class Layout(NamedTuple):
    """Channels and strides of a network's first convolution and of each block."""

    widths: tuple[int, ...]
    strides: tuple[int, ...]


RESNET_8 = Layout((32, 32, 32, 32), (1, 2, 2, 2))
RESNET_16 = Layout((32, 32, 32, 64, 64, 128, 128, 256), (1, 2, 1, 2, 1, 2, 1, 2))


def image_network(layout: Layout, channels: int, width: int = 32) -> tuple[nn.Sequential, int]:
    """A CNN's layers from images (B, channels, H, W) to features, and how many these are.

    It starts with `width` channels, and the others grow with them; 32 are the paper's.
    """
    widths = [each * width // 32 for each in layout.widths]
    return nn.Sequential(ChannelsLast(), *resnet(channels, widths, layout.strides)), widths[-1]
