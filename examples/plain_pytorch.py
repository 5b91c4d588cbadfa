"""A training loop in plain PyTorch: attention sampling on Megapixel MNIST with the digits that ship with the package.

python examples/plain_pytorch.py --steps 1500
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import ats
from ats.datasets.megapixel_mnist import MegapixelMNIST
from ats.datasets.mnist import load_digits

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--patches", type=int, default=10)
options = parser.parse_args()
torch.manual_seed(0)

data = MegapixelMNIST(load_digits("train"), n_images=5000, image_size=500, n_noise=10)
attention = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 1, 3, padding=1),
)  # fmt: skip
features = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
    nn.AdaptiveMaxPool2d(1), nn.Flatten(),
)  # fmt: skip
head = nn.Linear(64, 10)
parameters = [*attention.parameters(), *features.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, lr=3e-3)

for step in range(options.steps):
    indices = torch.randint(len(data), (options.batch,))
    image, label = data.render(indices), data.labels[indices]  # (B, 1, 500, 500) uint8, (B,)
    view = ats.area_downsample(image, (60, 60))  # (B, 1, 60, 60)
    sample = ats.sample_patches(image, attention(view), options.patches, patch_size=50)
    feature = F.normalize(features(sample.patches.flatten(0, 1)), dim=1)  # (B·N, 64)
    pooled = ats.expectation(feature.unflatten(0, sample.indices.shape), sample.log_attention)  # (B, 64)
    scores = head(8 * pooled)
    loss = F.cross_entropy(scores, label) - 0.01 * sample.entropy.mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    if step % 50 == 0 or step == options.steps - 1:
        error = (scores.argmax(1) != label).float().mean()
        print(f"step {step}: loss {loss:.3f}, error {error:.2f}, entropy {sample.entropy.mean():.2f} nats", flush=True)
