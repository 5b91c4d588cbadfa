"""The paper's networks for Megapixel MNIST, in channels-last or contiguous memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureNetwork(nn.Module):
    """Patches (M, 1, 50, 50) -> features (M, 32) of length 1: convolutions of 7×7 and three of 3×3, 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 32, 7), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(32, 32, 3), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        return F.normalize(self.layers(patches).amax((2, 3)), dim=1)


def attention_network() -> nn.Sequential:
    """View (B, 1, 180, 180) -> logits (B, 1, 180, 180)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 1, 3, padding=1),
    )


class TrainingNetworks(nn.Module):
    """Both networks and the linear layer, with parameters in `memory_format`."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.memory_format = memory_format
        self.attention = attention_network()
        self.feature = FeatureNetwork()
        self.head = nn.Linear(32, 10)
        self.to(memory_format=memory_format)
