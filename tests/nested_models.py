"""A small nested model in float64, what it should compute written out in loops, and every draw that it could make."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.nested import Drawing
from ats.nested_levels import Look
from ats.nn import NestedAttentionSampling, Zoom
from ats.samples import CellSample
from tests.enumeration import ordered_draws, step_probabilities
from tests.helpers import seeded

SCALES = 8, 4, 2
STRIDES = (1, 3), (2, 2), (4, 2)  # cells of 8×24, 8×8 and 8×4 pixels, three, three and two of a region
CONTEXT = (0, 0), (2, 4), (4, 2)
CELLS = 3, 3, 2
PATCH = 6


class Feature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(PATCH * PATCH, 3)

    def forward(self, patches: Tensor) -> Tensor:
        return torch.tanh(self.linear(patches.flatten(1)))


def draw_image(batch: int = 1, width: int = 72, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, 8, width, dtype=torch.float64, generator=seeded(seed))


def small_model(n: tuple[int, ...], kind: type[NestedAttentionSampling] = NestedAttentionSampling, **options):
    torch.manual_seed(0)
    levels = []
    for depth, draws in enumerate(n):
        stride = STRIDES[depth]
        attention = nn.Conv2d(1, 1, stride, stride, bias=False)  # a bias moves all logits alike
        nn.init.normal_(attention.weight, std=2.0)
        levels.append(Zoom(attention, SCALES[depth], draws, context=CONTEXT[depth], receptive_field=0))
    return kind(levels, Feature(), PATCH, **options).double().eval()


def written_out(
    model: NestedAttentionSampling, image: Tensor, depth: int = 0, place: tuple[int, int, int, int] = (0, 0, 8, 72)
) -> tuple[Tensor, Tensor]:
    """Φ (D,) and the entropy of the whole tree of one image (1, C, 8, 72), by slicing and loops.

    Of a region at `place` (top, left, height, width) alone where `depth` is that of its look.
    """

    def look(depth: int, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        scale, stride, context = SCALES[depth], STRIDES[depth], CONTEXT[depth]
        margin = context[0] * scale, context[1] * scale
        box = box_of(image, top - margin[0], left - margin[1], height + 2 * margin[0], width + 2 * margin[1])
        logits = model.levels[depth].attention(F.avg_pool2d(box, scale))[0, 0]
        first = context[0] // stride[0], context[1] // stride[1]
        side = stride[0] * scale, stride[1] * scale
        logits = logits[first[0] :, first[1] :][: height // side[0], : width // side[1]]
        assert logits.numel() == CELLS[depth]
        attention = logits.flatten().softmax(-1)
        phi, entropy = torch.zeros(3, dtype=torch.float64), -(attention * attention.log()).sum()
        for cell, share in enumerate(attention):
            row, column = divmod(cell, logits.shape[1])
            y, x = top + row * side[0], left + column * side[1]
            if depth + 1 < len(model.levels):
                inner, inner_entropy = look(depth + 1, y, x, *side)
                phi, entropy = phi + share * inner, entropy + share * inner_entropy
            else:
                begin = round(y + side[0] / 2 - PATCH / 2), round(x + side[1] / 2 - PATCH / 2)
                phi = phi + share * model.feature(box_of(image, *begin, PATCH, PATCH))[0]
        return phi, entropy

    return look(depth, *place)


def box_of(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    margin = 100
    padded = F.pad(image, [margin] * 4)
    return padded[..., top + margin : top + margin + height, left + margin : left + margin + width]


class EveryDraw(NestedAttentionSampling):
    """A model that makes every draw there is, one an image of a batch, and says how probable each one was."""

    def prepare(self) -> int:
        """Images that are needed."""
        n = [self.zoom(depth).n for depth in range(len(self.levels))]
        rows = [1, *itertools.accumulate(n, lambda a, b: a * b)][:-1]  # regions of an image at each level
        draws = [ordered_draws(CELLS[depth], n[depth], replace=self.replace) for depth in range(len(n))]
        which = torch.cartesian_prod(
            *(torch.arange(len(some)) for some, count in zip(draws, rows, strict=True) for _ in range(count))
        ).view(-1, sum(rows))
        self._forced, begin = [], 0
        for some, count in zip(draws, rows, strict=True):
            self._forced.append(some[which[:, begin : begin + count]].flatten(0, 1))  # (R, n)
            begin += count
        self._probability = torch.ones(len(which), dtype=torch.float64)
        return len(which)

    def draw_cells(self, depth: int, look: Look, how: Drawing, generator: torch.Generator | None) -> CellSample:
        flat = look.logits.flatten(1)
        log_attention, indices = flat.log_softmax(-1), self._forced[depth]
        attention = log_attention.exp()
        steps = step_probabilities(attention.detach(), indices, replace=self.replace).prod(-1)  # (R,)
        self._probability = self._probability * steps.view(len(self._probability), -1).prod(-1)
        return CellSample(
            indices=indices,
            log_attention=log_attention.gather(1, indices),
            logsumexp=flat.logsumexp(-1),
            entropy=-(attention * log_attention).sum(-1),
            replace=self.replace,
            selection="sample",
            grid_size=(look.logits.shape[-2], look.logits.shape[-1]),
        )

    @property
    def probability(self) -> Tensor:
        """(B,) of each image's draw."""
        return self._probability


def bytes_of(batch: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=seeded(seed))


def model_of(*zooms: Zoom, patch: int = 6, channels: int = 3, **options) -> NestedAttentionSampling:
    feature = nn.Sequential(nn.Flatten(), nn.Linear(channels * patch * patch, 4))
    return NestedAttentionSampling(list(zooms), feature, patch, **options).eval()


def cells_of(stride: int, channels: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, 1, stride, stride)
