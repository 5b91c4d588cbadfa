"""The area view on a CPU: PyTorch's own operators, no compiler, no float copy of the image.

For a reduced ratio H/h = p/q the bins of the rows repeat every p rows in q phases, so the bins of one phase are one
strided window over the image and a single `sum` adds them all. A chunk of rows at a time, so that what is added is
still in cache:

1. bytes become 16-bit integers (32-bit where a bin has more than 128 rows), in rows of whole 64-bit words;
2. each phase is summed word by word, four (or two) pixels in one 64-bit addition, exactly: no lane overflows;
3. the sums become means of rows, and `adaptive_avg_pool2d` takes the means of the columns' bins.

Floating-point images are summed as they are, half precision by way of float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_kernels.checks import compute_dtype, normalise

CHUNK = 1 << 22  # pixels at most: 8 MiB of 16-bit integers stay in cache, and spread the operators' own cost
_LEAST_CHUNK = 1 << 19  # of a small image: one megabyte, in fewer operators
SHORT_BIN = 128  # rows whose bytes a signed 16-bit integer can hold the sum of: 128 · 255 < 2¹⁵


def area_downsample_cpu(
    image: Tensor,  # (B, C, H, W)
    size: tuple[int, int],
    *,
    means: list[float] | None = None,
    stds: list[float] | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The op without a gradient. Arguments as `area_downsample_ref` takes them."""
    channels = image.shape[1]
    compute = compute_dtype(image.dtype, dtype)
    if channels_come_last(image):  # a row is (W, C)
        view = torch.empty(image.shape[0], 1, *size, channels, dtype=compute, device="cpu")
        _pool(image.permute(0, 2, 3, 1).flatten(2).unsqueeze(1), view)
        view = view.squeeze(1).permute(0, 3, 1, 2)
    else:
        view = torch.empty(*image.shape[:2], *size, 1, dtype=compute, device="cpu")
        _pool(image, view)
        view = view.squeeze(-1)
    return normalise(view, means, stds, channel_dim=1, is_byte=False).to(dtype)  # (B, C, h, w)


def channels_come_last(image: Tensor) -> bool:
    """Whether the channels of a pixel lie beside each other, and the pixels of a row too."""
    channels = image.shape[1]
    return channels > 1 and image.stride(1) == 1 and image.stride(3) == channels


def _pool(
    image: Tensor,  # (B, P, H, L): planes of rows, L = W·Q
    view: Tensor,  # (B, P, h, w, Q): written; bytes as fractions of 255
) -> None:
    batch, planes, height, length = image.shape
    rows, is_byte = view.shape[2], image.dtype == torch.uint8
    common = math.gcd(height, rows)
    period, phases = height // common, rows // common
    starts = [i * height // rows for i in range(rows)]
    ends = [-(-(i + 1) * height // rows) for i in range(rows)]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    divisors = torch.tensor(lengths, dtype=view.dtype, device="cpu")  # (h,)
    divisors = divisors.mul_(255 if is_byte else 1).view(-1, 1, 1)

    chunk_size = min(CHUNK, max(_LEAST_CHUNK, image.numel() // 8))  # an eighth: scratch far below a float copy
    images = min(batch, max(1, chunk_size // (planes * height * length)))  # of a chunk
    step = min(rows, max(1, chunk_size * rows // (images * planes * height * length)))  # output rows of a chunk
    step -= step % phases if step > phases else 0
    buffer = None
    if image.dtype != view.dtype:
        lane = (torch.int16 if max(lengths) <= SHORT_BIN else torch.int32) if is_byte else view.dtype
        padded = length + -length % (8 // lane.itemsize) if is_byte else length
        tallest = max(ends[min(i + step, rows) - 1] - starts[i] for i in range(0, rows, step))
        buffer = torch.zeros(images, planes, tallest, padded, dtype=lane, device="cpu")

    for first in range(0, batch, images):
        for top in range(0, rows, step):
            bottom = min(top + step, rows)
            chunk = image[first : first + images, :, starts[top] : ends[bottom - 1]]
            if buffer is not None:
                widened = buffer[: chunk.shape[0], :, : chunk.shape[2]]
                widened[..., :length].copy_(chunk)
                chunk = widened.view(torch.int64) if is_byte else widened
            sums = chunk.new_empty(*chunk.shape[:2], bottom - top, chunk.shape[3])
            for row in range(top, min(top + phases, bottom)):
                out = sums[:, :, row - top :: phases]
                reach = (out.shape[2] - 1) * period + lengths[row]
                windows = chunk.narrow(2, starts[row] - starts[top], reach).unfold(2, lengths[row], period)
                torch.sum(windows, -1, dtype=chunk.dtype, out=out)
            if buffer is not None and is_byte:
                sums = sums.view(buffer.dtype)[..., :length]
            part = view[first : first + images, :, top:bottom]
            torch.div(_mean_of_columns(sums.to(view.dtype), part.shape), divisors[top:bottom], out=part)


def _mean_of_columns(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows (…, W·Q) to (…, w, Q), the shape given: each row an image of its own, which is what threads share out."""
    lines = rows.view(-1, 1, rows.shape[-1] // shape[-1], shape[-1]).permute(0, 3, 1, 2)  # (rows, Q, 1, W)
    if shape[-1] == 1:
        lines = lines.transpose(0, 1)  # (1, rows, 1, W)
    means = F.adaptive_avg_pool2d(lines, (1, shape[-2]))
    if shape[-1] == 1:
        means = means.transpose(0, 1)
    return means.permute(0, 2, 3, 1).view(shape)
