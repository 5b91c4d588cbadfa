"""Training steps on images of any size: nested and flat attention, all patches, and the best of all patches.

All have one feature network and patches of one size. Views are given; reading regions and patches is part of a step.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ats
from ats.experiments.cost import Step
from ats.models.megapixel_mnist import feature_network
from ats.models.mil import MILAttention
from ats.sources import ImageSource
from bench.procedural import ProceduralImage

PATCH = 64  # pixels a side, of which whole images are made
N_PATCHES = 32  # that are read, or kept
FEATURES, CLASSES = 128, 10
CHUNK = 1024  # patches that a scan looks at together
CELL = 8  # view pixels along a side of an attention network's cell
CONTEXT = 8  # view pixels around a region
FINE = 8  # pixels of the image a view pixel, at which an object shows

SAME, DEEP = "Nested, the same views at every size", "Nested, last view at 1/8"
FLAT, MIL, BEST = "Flat, view at 1/8", "Deep MIL, all patches", "Best 32 of all patches (IPS)"


class AllPatches(nn.Module):
    """Attention pooling (Ilse et al., 2018) over every patch of an image, read a row of patches at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.feature = feature_network("modern")
        self.attention = MILAttention(FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, image: ImageSource) -> Tensor:
        """An image -> logits (1, classes)."""
        return self.pool(self.feature(torch.cat(list(self.rows(image)))))

    def rows(self, image: ImageSource) -> Iterator[Tensor]:
        """Patches (M, C, h, w) in [0, 1], no two of which overlap, of each row of them on the network's device."""
        full = image.levels[0]
        for top in range(0, full.height, PATCH):
            for left in range(0, full.width, PATCH * CHUNK):
                strip = image.read(0, top, left, PATCH, min(PATCH * CHUNK, full.width - left))
                patches = strip.unflatten(2, (-1, PATCH)).movedim(2, 0)  # (M, C, h, w)
                yield patches.to(self.head.weight.device).float() / 255

    def pool(self, features: Tensor) -> Tensor:
        """Features (M, D) of patches -> logits (1, classes)."""
        return self.head(self.attention(features[None]).exp() @ features)


class BestPatches(AllPatches):
    """Iterative patch selection: scan all patches, keep those of the largest attention, and learn from them alone.

    Source: Bergner, Lippert, Mahendran, "Iterative patch selection for high-resolution image recognition", 2023. A
    buffer of M patches and the next I go through the attention together, and the M best stay; nothing of the scan is
    differentiated. What is left goes through the networks again, in training. Here with attention pooling in place of a
    transformer, as in the other models.
    """

    def forward(self, image: ImageSource) -> Tensor:
        """An image -> logits (1, classes)."""
        return self.pool(self.feature(self.select(image)))

    @torch.no_grad()
    def select(self, image: ImageSource) -> Tensor:
        """The patches (M, C, h, w) that are kept of an image, as the networks are in evaluation."""
        training = self.training
        self.eval()
        kept, features = torch.empty(0), torch.empty(0)
        for patches in self.rows(image):
            found = self.feature(patches)
            if len(kept):
                patches, found = torch.cat([kept, patches]), torch.cat([features, found])
            best = self.attention(found[None])[0].topk(min(N_PATCHES, len(found))).indices
            kept, features = patches[best], found[best]
        self.train(training)
        return kept


class Sampled(nn.Module):
    """Attention sampling, flat or nested, and a linear layer."""

    def __init__(self, sampling: nn.Module) -> None:
        super().__init__()
        self.sampling = sampling
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, image: ImageSource, view: Tensor) -> tuple[Tensor, Tensor]:
        """An image and its view (1, C, h, w) -> logits (1, classes), entropy (1,)."""
        pooled, _, sample = self.sampling(view, [image])
        return self.head(pooled), sample.entropy


def attention_network(cell: int = CELL) -> nn.Sequential:
    """View (M, 1, h, w) -> logits (M, 1, h / cell, w / cell)."""
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(cell.bit_length() - 1):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        channels = 16
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def scales_of(line: str, side: int) -> tuple[int, ...]:
    """The scales of a line's levels for an image of so many pixels a side."""
    if line == SAME:
        return 4 * side // 1024, side // 1024
    if line == FLAT or side <= 1024:
        return (FINE,)
    if side <= 16_384:
        return side // 128, FINE
    return side // 128, 8 * FINE if side > 32_768 else 4 * FINE, FINE


def draws_of(line: str, levels: int) -> tuple[int, ...]:
    """Cells drawn at each level: always as many patches."""
    return {1: (N_PATCHES,), 2: (8, 4), 3: (4, 2, 4)}[levels]


def view_side(line: str, side: int) -> int:
    """Pixels along a side of the whole image's view."""
    return side // scales_of(line, side)[0]


def sampling_of(line: str, side: int) -> nn.Module:
    """The networks of a line that samples."""
    scales, feature = scales_of(line, side), feature_network("modern")
    if line == FLAT:
        return ats.nn.AttentionSampling(attention_network(), feature, N_PATCHES, PATCH, estimator="unordered")
    zooms = []
    for depth, (scale, n) in enumerate(zip(scales, draws_of(line, len(scales)), strict=True)):
        cell = 2 * CELL if line == SAME and depth == 0 else CELL
        zooms.append(ats.nn.Zoom(attention_network(cell), scale, n, context=CONTEXT if depth else 0))
    return ats.nn.NestedAttentionSampling(zooms, feature, PATCH, estimator="unordered")


def prepare(line: str, side: int, device: torch.device) -> Callable[[], Step]:
    """An image and its view, which are no cost of a step; what makes the model and the step."""
    image = ProceduralImage(side)
    image.read(0, 0, 0, 1, 1)
    view = None
    if line in (SAME, DEEP, FLAT):
        pixels = view_side(line, side)
        view = torch.rand(1, 1, pixels, pixels, device=device)  # any values will do
    return lambda: training_step(line, side, image, view, device)


def training_step(line: str, side: int, image: ImageSource, view: Tensor | None, device: torch.device) -> Step:
    """A function that runs an image forward and backward, with weights that are the same whenever it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = (
            {MIL: AllPatches, BEST: BestPatches}[line]() if view is None else Sampled(sampling_of(line, side))
        )
    model.to(device).train()
    label = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        if view is None:
            loss = F.cross_entropy(model(image), label)
        else:
            logits, entropy = model(image, view)
            loss = F.cross_entropy(logits, label) - 0.01 * entropy.mean()
        model.zero_grad(set_to_none=True)
        loss.backward()

    return step
