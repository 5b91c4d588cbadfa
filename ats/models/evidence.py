"""An evidence head: attention that is also taught by what each drawn patch alone says of its image's label.

Where the attention's own gradient is mostly noise, the classifier may already tell from a patch alone whether it speaks
for the label. The head learns to see that in the view, and its log-odds add to the logits. What it means for exactness
stands in docs/megapixel-mnist.md.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.batches import Images, Maps, Views, pad_maps
from ats.models.classifier import ATSClassifier, SharingLayers, SoftBound, conv_norm
from ats.nn import AttentionSampling
from ats.samples import PatchSample

WEIGHT = 10.0
"""Of the head's loss beside the classifier's."""
SHARPNESS = 0.3
"""Factor on the classifier's logits of one patch alone: it is trained on means of several, which are less extreme."""
START = -1.4
"""The log-odds that every cell begins with."""
GAIN = 4.0
"""Of the log-odds above `START`, in the logits."""
_HIDDEN = 32
_PEAK, _STEEPNESS = 3.0, 2.0


class EvidenceAttention(nn.Module):
    """An attention network with an evidence head: log-odds that a cell's patch alone speaks for its image's label.

    With own logits z and log-odds e, constant to autograd here, the logits are
    bound·tanh((z + 4(e + 1.4)) / bound) − 3·tanh(2(maxpool3×3(e) − e)), the last term with `peaks` alone. So z has the
    gradient that it has without a head, through the bound; the head learns by `EvidenceClassifier.teach` only, and
    with it the trunk that both share.

    Args:
        own: the network without its bound; the head looks at its trunk's maps.
        channels: of these maps.
        bound: as of `SoftBound`.
        peaks: let a cell with a neighbour of more evidence fall behind it.
    """

    def __init__(self, own: SharingLayers, channels: int, *, bound: float, peaks: bool) -> None:
        super().__init__()
        self.own = own
        last = nn.Conv2d(_HIDDEN, 1, 1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.constant_(last.bias, START)
        self.evidence = nn.Sequential(*conv_norm(channels, _HIDDEN, kernel=3), last)
        self.bound = SoftBound(bound)
        self.peaks = peaks

    def forward(self, view: Tensor) -> Tensor:
        """View (B, C, h, w) -> logits (B, 1, gh, gw)."""
        maps = self.own.trunk(view)
        evidence = self.evidence(maps).detach()
        logits: Tensor = self.bound(self.own.rest(view, maps) + GAIN * (evidence - START))
        if not self.peaks:
            return logits
        return logits - _PEAK * torch.tanh(_STEEPNESS * (F.max_pool2d(evidence, 3, 1, 1) - evidence))


class EvidenceClassifier(ATSClassifier):
    """`ATSClassifier` whose attention has an evidence head. It is used as that; only its training needs `teach`.

    Args:
        sampling: of which the attention is an `EvidenceAttention`.
        n_features, n_classes, feature_scale: as of `ATSClassifier`.
    """

    def __init__(
        self, sampling: AttentionSampling, n_features: int, n_classes: int, feature_scale: float = 1.0
    ) -> None:
        if not isinstance(sampling.attention, EvidenceAttention):
            raise TypeError(f"sampling.attention must be an EvidenceAttention, got {type(sampling.attention).__name__}")
        super().__init__(sampling, n_features, n_classes, feature_scale)

    def teach(
        self,
        view: Views,
        image: Images,
        label: Tensor,
        *,
        mask: Maps | None = None,
        generator: torch.Generator | None = None,
        draws: int = 1,
    ) -> tuple[Tensor, PatchSample, Tensor]:
        """What `forward` gives, and the head's loss of labels (B,) int64: 10·BCE(e, r) at the cells drawn.

        r = softmax(0.3·feature_scale·W f)[label], without gradient, is what the linear layer makes of a patch alone.
        """
        attention = self.sampling.attention
        assert isinstance(attention, EvidenceAttention)
        with _outputs(attention.evidence) as maps, _outputs(self.sampling.feature) as features:
            pooled, samples = self.draw(view, image, mask=mask, generator=generator, draws=draws)
        evidence = _precise(_of_grid(maps, view, samples[0].grid_size).flatten(1))  # (B, K)
        losses = []
        for sample, drawn in zip(samples, features, strict=True):
            drawn = drawn.detach().unflatten(0, tuple(sample.indices.shape))  # (B, N, D)
            speaks = patch_evidence(drawn, self.head.weight, label, self.feature_scale)
            at = evidence.gather(1, sample.readable())
            loss = F.binary_cross_entropy_with_logits(at, speaks.to(at.dtype), reduction="none")
            losses.append(loss[~sample.surplus].mean())
        return self.classify(pooled), samples[0], WEIGHT * torch.stack(losses).mean()


@torch.no_grad()
def patch_evidence(features: Tensor, weight: Tensor, label: Tensor, feature_scale: float) -> Tensor:
    """Features (B, N, D), a layer's weight (C, D), labels (B,) -> the label's share (B, N) by each patch."""
    logits = SHARPNESS * feature_scale * F.linear(_precise(features), weight.to(_precise(features).dtype))
    return logits.softmax(-1).gather(-1, label.view(-1, 1, 1).expand(-1, logits.shape[1], 1)).squeeze(-1)


def _precise(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module gives while this lasts, call by call."""
    found: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def _of_grid(maps: Sequence[Tensor], view: Views, grid_size: tuple[int, int]) -> Tensor:
    """Maps (b, 1, gh, gw) of views of one size after the other -> (B, gh, gw) in the views' order, on a common grid."""
    if isinstance(view, Tensor):
        (only,) = maps
        return only[:, 0]
    shapes = [one.shape for one in view]
    order = [number for shape in dict.fromkeys(shapes) for number, own in enumerate(shapes) if own == shape]
    rows = dict(zip(order, (row for some in maps for row in some[:, 0]), strict=True))
    return pad_maps([rows[number] for number in range(len(shapes))], grid_size, 0.0)
