"""Quantities that fit in shape and dtype but cannot be what was meant; looked at on the CPU only, in few operations.

An error where no one can mean it, a warning, once a process, where hardly anyone can.
"""

import math
import warnings

import torch
from torch import Tensor

from ats_kernels.backend import may_look

_warned: set[str] = set()


def warn_once(about: str, message: str) -> None:
    """Warn of something the first time that it is seen."""
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, stacklevel=4)


def check_no_attention(logits: Tensor, logsumexp: Tensor) -> None:
    """Raise if logits (B, K) are an attention already: softmax(softmax(z)) is next to uniform.

    Of numbers in [0, 1] that add up to 1 the logsumexp (B,) lies between those of the flattest and of the sharpest,
    log(K e^{1/K}) and log(K − 1 + e), where K counts what is not masked. One number tells most logits from them.
    """
    cells = logits.shape[1]
    half = logits.dtype in (torch.float16, torch.bfloat16)
    first, slack = logsumexp.tolist()[0], (1e-2 if half else 1e-4)
    rounding = 2e-7 * abs(first)
    if cells < 2 or not 1 - slack - rounding <= first <= math.log(cells + 1.7183 + slack) + rounding:
        return
    live = int(logits.detach()[0].isneginf().logical_not_().sum())
    low, high = math.log(live) + (1 - slack) / live, math.log(live + 1.7183 + slack)
    if not low - rounding <= first <= high + rounding:
        return
    values = logits.detach().double()
    values = values.masked_fill(values.isneginf(), 0.0)
    if not ((values >= 0).all() and ((values.sum(-1) - 1).abs() <= slack).all()):
        return
    message = (
        "logits are not negative and add up to 1 in every row, as attention after a softmax does; the softmax is taken "
        "here, so pass what comes before it, or logits.log()"
    )
    if ((values > 0).sum(-1) > 1).any():
        raise ValueError(message)
    warn_once("attention", message + ". (Taken as they are: every row has a single 1)")


def warn_of_bytes(image: Tensor, means: list[float] | None, stds: list[float] | None, out: Tensor) -> None:
    """Warn if an image of numbers far above 1 is normalised by statistics of numbers in [0, 1].

    Of `out` (B, …, C, h, w), which is (x − mean) / std, a channel of the first image, and of its first patch, is looked
    at. Bytes are scaled before. A floating-point image in [0, 1] may glare in a few pixels, but not in half of them.
    """
    if means is None or stds is None or image.dtype == torch.uint8 or "bytes" in _warned or not may_look(out):
        return
    if out.numel() == 0 or not (0 < max(means) <= 1 and max(stds) < 1):
        return
    first = out.detach()[(0,) * (out.ndim - 2)]  # (h, w)
    most = first.amax().item() * stds[0] + means[0]
    if not most > 16:
        return
    if not image.is_floating_point():
        warn_once(
            "bytes",
            f"the image holds {image.dtype} numbers up to {most:.6g}, which are taken as they are, but mean {means} "
            f"and std {stds} are of numbers in [0, 1]; give both in the image's own units",
        )
    elif most < 256 or first.float().median().item() * stds[0] + means[0] > 16:
        warn_once(
            "bytes",
            f"the image holds floating-point numbers up to {most:.4g} but mean {means} and std {stds} are of numbers "
            "in [0, 1]; pass image / 255, or bytes as uint8, which are scaled here",
        )


def check_strip(grid: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raise if a grid is one cell wide whose cells would be long strips: a list of scores taken for a map."""
    cells = max(grid)
    if min(grid) > 1 or cells < 16:
        return
    height, width = image_size[0] / grid[0], image_size[1] / grid[1]
    if max(height / width, width / height) > 8:
        raise ValueError(
            f"logits are a grid of {grid} cells, which cuts an image of {tuple(image_size)} into strips of "
            f"{height:.4g}×{width:.4g} pixels; if they are the scores of {cells} cells in a list, give them the shape "
            "of the grid, logits.reshape(B, gh, gw)"
        )
