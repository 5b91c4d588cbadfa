"""The CPU path of `extract_patches`: every row of a patch is one run of memory, copied by one `index_select`.

Nothing is allocated but a few indices: bytes that become floats are first gathered into the end of the result
itself. Patches that cross the border are read from the nearest place inside and then shifted.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ats_kernels._checks import compute_dtype

# Bytes of scratch where some is needed: small beside any batch of patches, and it stays in a core's cache.
_SCRATCH = 1 << 18
_INDICES = 1 << 13  # rows gathered at once, 8 bytes each


def extract_patches_cpu(
    image: Tensor,  # (B, C, H, W), at least as large as a patch
    offsets: Tensor,  # (B, N, 2) int64
    out: Tensor,  # (B, N, C, ph, pw), contiguous or with the channels last
    *,
    padding: str,
    means: list[float] | None,
    stds: list[float] | None,
) -> None:
    """Write the patches to `out`. Arguments as `extract_patches` checks them."""
    if out.numel() == 0:
        return
    channels_last = out.stride(2) < out.stride(4)
    patches = (out.movedim(2, -1) if channels_last else out).flatten(0, 1)  # (B·N, …), as it lies in memory
    last = torch.tensor([image.shape[2] - out.shape[3], image.shape[3] - out.shape[4]])
    inside = torch.minimum(offsets.clamp(min=0), last)  # (B, N, 2): the nearest windows that cross no border
    windows = _Windows(image, inside, (out.shape[3], out.shape[4]), channels_last)

    work = compute_dtype(image.dtype, out.dtype)
    # Broadcasting a few channels along the innermost dimension is slow, along whole rows it is not.
    center, scale = (
        None if t is None else t.repeat(out.shape[4]) if channels_last else t.unsqueeze(1)
        for t in _affine(means, stds, image, work)
    )
    direct = work == out.dtype or (center is None and scale is None)
    for first, raw in _stages(patches, image.dtype, direct):
        windows.read(first, raw)
        part = patches[first : first + len(raw)]
        values = part if direct else raw.to(work)
        if direct and raw.dtype != part.dtype:
            part.copy_(raw)
        rows = values.flatten(-2)  # (…, ph, pw·C) or (…, C, ph·pw)
        if center is not None:
            rows.sub_(center)
        if scale is not None:
            rows.mul_(scale)
        if not direct:
            part.copy_(values)

    if not torch.equal(inside, offsets):
        _shift_crossing(out, offsets, inside, image, padding)


class _Windows:
    """Every row of every window of an image, as one view (starts, …) of its memory, to select from."""

    def __init__(self, image: Tensor, corners: Tensor, size: tuple[int, int], channels_last: bool) -> None:
        batch, channels, height, width = image.shape
        stride_b, stride_c, stride_h, stride_w = image.stride()
        rows = torch.arange(size[0]) * stride_h
        most = (batch - 1) * stride_b + (height - 1) * stride_h + (width - size[1]) * stride_w
        run: tuple[int, ...] = (size[1],)
        run_stride: tuple[int, ...] = (stride_w,)
        if channels_last:
            run, run_stride = (size[1], channels), (stride_w, stride_c)
        else:
            rows = (torch.arange(channels).unsqueeze(1) * stride_c + rows).flatten()
            most += (channels - 1) * stride_c
        # Rows overlap in this view: that of element i begins at element i.
        self.runs = image.detach().as_strided((most + 1, *run), (1, *run_stride))
        self.rows = rows  # (rows of a patch,), from the patch's first element
        images = torch.arange(batch).unsqueeze(1) * stride_b
        self.starts = (images + corners[..., 0] * stride_h + corners[..., 1] * stride_w).flatten()  # (B·N,)

    def read(self, first: int, raw: Tensor) -> None:
        """Copy the windows from number `first` on to `raw` (windows, …), as many as it takes."""
        step = max(1, _INDICES // len(self.rows))
        for i in range(0, len(raw), step):
            part = raw[i : i + step]
            index = self.starts[first + i : first + i + len(part)].unsqueeze(1) + self.rows
            target = part.view(index.numel(), *self.runs.shape[1:])
            torch.index_select(self.runs, 0, index.flatten(), out=target)


def _stages(patches: Tensor, raw_dtype: torch.dtype, direct: bool) -> Iterator[tuple[int, Tensor]]:
    """Divide the patches into parts: the number of a part's first patch, and memory for its raw pixels.

    That is the part's own memory where pixels need no conversion; the end of the result, which later parts
    overwrite, where they are narrower and converted in place; scratch else, and for the last few patches.
    """
    if raw_dtype == patches.dtype and direct:
        yield 0, patches
        return
    first, total, numel = 0, len(patches), patches[0].numel()
    few = max(1, _SCRATCH // (numel * 4))
    if raw_dtype.itemsize < patches.dtype.itemsize and direct:
        end = patches.view(-1).view(raw_dtype)
        share = patches.dtype.itemsize / (patches.dtype.itemsize + raw_dtype.itemsize)
        while total - first > few:
            # So many patches and behind them their raw pixels fill what is left of the result.
            part = max(1, int((total - first) * share))
            yield first, end[-part * numel :].view(part, *patches.shape[1:])
            first += part
    scratch = patches.new_empty((min(few, total - first), *patches.shape[1:]), dtype=raw_dtype)
    for i in range(first, total, few):
        yield i, scratch[: total - i]


def _affine(
    means: list[float] | None, stds: list[float] | None, image: Tensor, work: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Center and scale, (C,) each, of ``(x − center)·scale`` on the image's own values; None where nothing is done."""
    unit = 255.0 if image.dtype == torch.uint8 else 1.0
    if stds is None and unit != 1:
        stds = [1.0] * image.shape[1]
    center = None if means is None else torch.tensor([unit * mean for mean in means], dtype=work)
    return center, None if stds is None else torch.tensor([1 / (unit * std) for std in stds], dtype=work)


def _shift_crossing(out: Tensor, offsets: Tensor, inside: Tensor, image: Tensor, padding: str) -> None:
    """Move the pixels of patches that cross the border to their place, and pad around them."""
    height, width = image.shape[2:]
    size = out.shape[3], out.shape[4]
    for b, n in (offsets != inside).any(-1).nonzero().tolist():
        (y, x), (read_y, read_x), patch = offsets[b, n].tolist(), inside[b, n].tolist(), out[b, n]
        if padding == "edge":
            rows, columns = _nearest(y, size[0], height) - read_y, _nearest(x, size[1], width) - read_x
            patch.copy_(patch.index_select(1, rows).index_select(2, columns))
            continue
        rows, columns = _overlap(y, size[0], height), _overlap(x, size[1], width)
        pixels = patch[:, _moved(rows, y - read_y), _moved(columns, x - read_x)].clone()
        patch.zero_()
        patch[:, rows, columns] = pixels


def _nearest(start: int, length: int, limit: int) -> Tensor:
    """Pixel numbers start, …, start + length − 1, those outside the image replaced by the nearest inside."""
    start = min(max(start, -length), limit)  # farther out reads the same, and does not overflow
    return torch.arange(start, start + length).clamp(0, limit - 1)


def _overlap(start: int, length: int, limit: int) -> slice:
    """The part of a patch that lies inside the image, along one axis."""
    low = min(max(-start, 0), length)
    return slice(low, max(min(length, limit - start), low))


def _moved(part: slice, by: int) -> slice:
    return slice(0, 0) if part.start == part.stop else slice(part.start + by, part.stop + by)


def scatter_patches_cpu(
    grad_patches: Tensor,  # (B, N, C, ph, pw), any strides
    offsets: Tensor,  # (B, N, 2) int64
    grad_image: Tensor,  # (B, C, H, W), zero
    *,
    padding: str,
    stds: list[float] | None,
) -> None:
    """Add the patches' gradients up in `grad_image`, one patch after the other: deterministic."""
    height, width = grad_image.shape[2:]
    size = grad_patches.shape[3], grad_patches.shape[4]
    work = compute_dtype(grad_patches.dtype, grad_image.dtype)
    scale = None if stds is None else torch.tensor([1 / std for std in stds], dtype=work).view(-1, 1, 1)
    for b, corners in enumerate(offsets.tolist()):
        for n, (y, x) in enumerate(corners):
            rows, columns = _overlap(y, size[0], height), _overlap(x, size[1], width)
            crosses = rows.stop - rows.start < size[0] or columns.stop - columns.start < size[1]
            grad = grad_patches[b, n]
            if crosses and padding == "edge":
                grad = grad.to(work)
                grad, y = _fold(grad, 1, y, height)
                grad, x = _fold(grad, 2, x, width)
                rows, columns = slice(0, grad.shape[1]), slice(0, grad.shape[2])
            elif rows.start == rows.stop or columns.start == columns.stop:
                continue
            grad = grad[:, rows, columns]
            if scale is not None:
                grad = grad * scale
            grad_image[b, :, _moved(rows, y), _moved(columns, x)].add_(grad)


def _fold(grad: Tensor, dim: int, start: int, limit: int) -> tuple[Tensor, int]:
    """Add what lies outside the image along `dim` to the nearest pixel inside; also that dim's first pixel number."""
    nearest = _nearest(start, grad.shape[dim], limit)
    first, last = int(nearest[0]), int(nearest[-1])
    shape = list(grad.shape)
    shape[dim] = last - first + 1
    return grad.new_zeros(shape).index_add_(dim, nearest - first, grad), first
