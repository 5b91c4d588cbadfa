"""What an experiment has to know of its networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ats.models.evidence import EvidenceAttention

NETWORK_NAMES = ("paper", "modern")
"""Networks that most experiments have; some have others as well."""


@dataclass(frozen=True)
class Networks:
    """The networks of an experiment, each made with fresh weights when it is called.

    Args:
        attention: () -> network from a view (B, C, h, w) to logits (B, 1, (h − lost) // stride, (w − lost) // stride).
        feature: (normalised=…) -> network from patches (M, C, ph, pw) to features (M, n_features), of length 1 if
            `normalised`.
        n_features: the features' size; 0: what the feature network says, as its `n_features`.
        stride: view pixels from one cell of the attention's grid to the next.
        lost: view pixels that unpadded convolutions of the attention network lose along an axis: what
            `ats.receptive_field` measures, and `ats.nn.AttentionSampling` takes as its receptive_field.
        image: (channels) -> layers of a CNN from images (B, C, H, W) to features, and how many these are; `channels`
            is what it starts with. None: the experiment has no CNN.
        level: (scale, stride) -> attention network of a level of nested attention, from a view in which one pixel is
            scale×scale of the image's, to logits (B, 1, h // stride, w // stride). None: there is no nested attention.
        mean, std: of the images, by channel, where values of 1 are white: networks see (x − mean) / std. None: as is.
        view: mean and std by which the attention network sees, where they are others.
        evidence: (peaks=…) -> `attention` with an evidence head. None: there is none.
    """

    attention: Callable[[], nn.Module]
    feature: Callable[..., nn.Module]
    n_features: int
    stride: int = 1
    lost: int = 0
    image: Callable[[int], tuple[nn.Module, int]] | None = None
    level: Callable[[int, int], nn.Module] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    view: tuple[Sequence[float] | None, Sequence[float] | None] | None = None
    evidence: Callable[..., EvidenceAttention] | None = None

    @property
    def for_view(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and std by which views are normalised."""
        return (self.mean, self.std) if self.view is None else self.view

    def size_of(self, feature: nn.Module) -> int:
        """The number of features of a network that `feature` made."""
        size = self.n_features or feature.n_features
        assert isinstance(size, int)
        return size

    def view_size(self, image_size: tuple[int, int], scale: float) -> tuple[int, int]:
        """Pixels (h, w) of a view of about `scale` times an image (H, W), in whole cells of the attention's grid."""
        height, width = (
            self.lost + self.stride * max(1, round((size * scale - self.lost) / self.stride)) for size in image_size
        )
        return height, width


def check_networks(networks: str, names: Sequence[str] = NETWORK_NAMES) -> None:
    """Raise ValueError where networks go by no such name."""
    if networks not in names:
        raise ValueError(f"unknown networks {networks!r}, expected one of {', '.join(map(repr, names))}")
