"""Normalisation of patches on the CPU, in place and along whole rows of pixels."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Affine:
    """Normalisation on the image's own values: ``(x − center)·scale`` by channel, of bytes ``x·scale + shift``."""

    def __init__(
        self,
        means: tuple[float, ...] | None,
        stds: tuple[float, ...] | None,
        channels: int,
        width: int,
        channels_last: bool,
        is_byte: bool,
        work: torch.dtype,
    ) -> None:
        self.channels_last = channels_last
        unit = 255.0 if is_byte else 1.0
        if stds is None and is_byte:
            stds = (1.0,) * channels
        self.is_identity = means is None and stds is None
        self.keeps_zero = means is None

        def row(values: Sequence[float]) -> Tensor:
            return _row(values, width, channels_last, np.float64 if work == torch.float64 else np.float32)

        self.center: Tensor | None = None
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        if stds is not None:
            self.scale = row([1 / (unit * std) for std in stds])
        if means is not None and stds is not None and is_byte:
            # One pass. Bytes lose nothing by it; large numbers near their mean would.
            self.shift = row([-mean / std for mean, std in zip(means, stds, strict=True)])
        elif means is not None:
            self.center = row(means)

    def apply(self, patches: Tensor) -> None:
        """Normalise patches (…, C, ph, pw), or (…, ph, pw, C) with the channels last, in place."""
        rows = patches.flatten(-2) if self.channels_last else patches
        if self.shift is not None and self.scale is not None:
            torch.addcmul(self.shift, rows, self.scale, out=rows)
            return
        if self.center is not None:
            rows.sub_(self.center)
        if self.scale is not None:
            rows.mul_(self.scale)


def _row(values: Sequence[float], width: int, channels_last: bool, number: type) -> Tensor:
    """One value a channel along a row of pixels, (pw·C) or (C, 1, pw).

    Broadcasting a few channels along the innermost dimension is slow, whole rows are not.
    """
    channel: np.ndarray = np.array(values, number)
    if channels_last:
        return torch.from_numpy(np.tile(channel, width))
    return torch.from_numpy(channel.repeat(width)).view(len(values), 1, width)


@lru_cache
def affine(
    means: tuple[float, ...] | None,
    stds: tuple[float, ...] | None,
    channels: int,
    width: int,
    channels_last: bool,
    is_byte: bool,
    work: torch.dtype,
) -> Affine:
    """The normalisation of an image's patches, computed in `work`; kept, as nothing writes to what it holds."""
    with torch.inference_mode(False):  # or it would not go into a graph later, outside of that mode
        return Affine(means, stds, channels, width, channels_last, is_byte, work)
