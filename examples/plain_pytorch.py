"""Attention sampling in a loop of plain PyTorch: which digit occurs most in an image of noise?

Images of 300×300 pixels, of which eight patches of 40×40 are read; --side 1500 is the paper's size, which takes longer.
The digits come with the package.
Prints the loss as it goes, then the error on unseen images, where guessing errs on 0.90: 0.27 after about 60 seconds
of one CPU core.

python examples/plain_pytorch.py
"""

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ats
from ats.datasets.megapixel_mnist import MegapixelMNIST
from ats.datasets.mnist import load_digits


class Networks(nn.Module):
    """Where to look, what is seen there, and what follows from it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 1, 3, padding=1),
        )  # fmt: skip
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.BatchNorm1d(64),
        )  # fmt: skip
        self.brightness = nn.Parameter(torch.tensor(10.0))  # attention begins where something is
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor, n_patches: int) -> tuple[Tensor, ats.PatchSample]:
        """Images (B, 1, H, W) -> scores (B, 10), and what was drawn."""
        view = ats.area_downsample(image, (image.shape[-2] // 6, image.shape[-1] // 6))  # (B, 1, 50, 50)
        logits = self.attention(view) + self.brightness * view
        sample = ats.sample_patches(image, logits, n_patches, patch_size=40)
        features = F.normalize(self.features(sample.patches.flatten(0, 1)), dim=1)  # (B·N, 64)
        features = features.unflatten(0, sample.indices.shape)  # (B, N, 64)
        pooled = ats.pool(features, sample, estimator="unordered", control_variate=True)  # (B, 64)
        return self.head(8 * pooled), sample


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, print, and return the error on unseen images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--patches", type=int, default=8)
    parser.add_argument("--side", type=int, default=300, help="pixels of an image")
    parser.add_argument("--noise", type=int, default=5, help="patches of noise in an image")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    sizes = {"image_size": options.side, "n_noise": options.noise}
    train = MegapixelMNIST(load_digits("train"), n_images=4000, **sizes)
    test = MegapixelMNIST(load_digits("test"), n_images=500, split="test", **sizes)
    networks = Networks()
    optimizer = torch.optim.Adam(networks.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, options.steps, pct_start=0.05)
    start = time.perf_counter()
    for step in range(options.steps):
        indices = torch.randint(len(train), (options.batch,))
        image, label = train.render(indices), train.labels[indices]  # (B, 1, 300, 300) uint8, (B,)
        scores, sample = networks(image, options.patches)
        loss = F.cross_entropy(scores, label) - 0.01 * sample.entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == options.steps - 1:
            error = (scores.argmax(1) != label).float().mean()
            entropy = sample.entropy.mean()
            print(f"step {step}: loss {loss:.3f}, error {error:.2f}, entropy {entropy:.2f} nats", flush=True)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    networks.eval()
    wrong = 0
    with torch.no_grad():
        for indices in torch.arange(len(test)).split(100):
            scores, _ = networks(test.render(indices), 16)
            wrong += int((scores.argmax(1) != test.labels[indices]).sum())
    print(f"error on {len(test)} unseen images: {wrong / len(test):.3f}; guessing: 0.900")
    return wrong / len(test)


if __name__ == "__main__":
    main()
