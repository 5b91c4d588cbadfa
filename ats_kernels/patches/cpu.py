"""The CPU path of `extract_patches`: one `index_select` from an overlapping view of all windows of the images.

Little is allocated but the windows' places: many bytes that become floats are first gathered into the end of the result
itself. Patches that cross the border are read from the nearest place inside and then shifted. Places are worked out and
patches shifted by NumPy, whose small operations cost half of PyTorch's or less. Few small patches are for
`ats_kernels.patches.few`.
"""

import numpy as np
import torch
from torch import Tensor

from ats_kernels.checks import bits, compute_dtype
from ats_kernels.patches.affine import affine
from ats_kernels.patches.few import moved, nearest, one_by_one, overlap, read_few

_SCRATCH = 1 << 18  # bytes where some is needed: small beside any batch of patches, and it stays in a core's cache


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
    work = compute_dtype(image.dtype, out.dtype)
    normal = affine(
        None if means is None else tuple(means),
        None if stds is None else tuple(stds),
        channels=image.shape[1],
        width=out.shape[4],
        channels_last=channels_last,
        is_byte=image.dtype == torch.uint8,
        work=work,
    )
    direct = work == out.dtype or normal.is_identity
    if direct and work in (out.dtype, image.dtype) and (way := one_by_one(image, out)):
        read_few(image, offsets, out, normal, padding, way)
        return
    patches = (out.movedim(2, -1) if channels_last else out).flatten(0, 1)  # (B·N, …), as it lies in memory
    wanted = offsets.numpy()
    # (B, N, 2): the nearest windows that cross no border
    inside = np.minimum(np.maximum(wanted, 0), (image.shape[2] - out.shape[3], image.shape[3] - out.shape[4]))
    windows = _Windows(image, inside, (out.shape[3], out.shape[4]), channels_last)

    if direct and image.dtype == out.dtype:
        windows.read(0, patches)
        normal.apply(patches)
    elif direct and image.dtype.itemsize < out.dtype.itemsize:
        if patches.numel() * image.dtype.itemsize <= _SCRATCH:
            raw = torch.empty(patches.shape, dtype=image.dtype, device="cpu")
            windows.read(0, raw)
            patches.copy_(raw)
        else:
            _read_narrower(windows, patches, image.dtype)
        normal.apply(patches)
    else:
        few = max(1, _SCRATCH // (patches[0].numel() * work.itemsize))
        scratch = patches.new_empty((min(few, len(patches)), *patches.shape[1:]), dtype=image.dtype)
        for first, part in zip(range(0, len(patches), few), patches.split(few), strict=True):
            raw = scratch[: len(part)]
            windows.read(first, raw)
            values = raw.to(work)
            normal.apply(values)
            part.copy_(values)

    if np.count_nonzero(inside != wanted):
        _shift_crossing(out, wanted, inside, image, padding)


class _Windows:
    """Every window of an image, from one border to the other, as one view (starts, …) of its memory, to select from."""

    def __init__(self, image: Tensor, corners: np.ndarray, size: tuple[int, int], channels_last: bool) -> None:
        batch, channels, height, width = image.shape
        stride_b, stride_c, stride_h, stride_w = image.stride()
        window, strides = (channels, *size), (stride_c, stride_h, stride_w)
        if channels_last:
            window, strides = (*size, channels), (stride_h, stride_w, stride_c)
        most = (batch - 1) * stride_b + (height - size[0]) * stride_h + (width - size[1]) * stride_w
        # Windows overlap in this view: element i of the image's memory is where window i begins.
        self.windows = bits(image.detach()).as_strided((most + 1, *window), (1, *strides))
        starts = corners @ np.array((stride_h, stride_w))  # (B, N)
        if batch > 1:
            starts += np.arange(batch)[:, None] * stride_b
        self.starts = torch.from_numpy(starts.ravel())  # (B·N,)

    def read(self, first: int, raw: Tensor) -> None:
        """Copy the windows from number `first` on to `raw` (windows, …), as many as it takes."""
        torch.index_select(self.windows, 0, self.starts[first : first + len(raw)], out=bits(raw))


def _read_narrower(windows: _Windows, patches: Tensor, raw_dtype: torch.dtype) -> None:
    """Read all windows of an image whose pixels are narrower than those of `patches`, and convert them.

    They are read into the end of the result. From there they are converted in a few steps, each of as many patches as
    fit before the raw pixels of those to come.
    """
    raw = patches.view(-1).view(raw_dtype)[-patches.numel() :].view(patches.shape)
    windows.read(0, raw)
    first, total, ratio = 0, len(patches), patches.dtype.itemsize // raw_dtype.itemsize
    while first < total:
        left = total - first
        part = left - -(-left // ratio)
        # The last patch lies on its own raw pixels.
        patches[first : first + max(part, 1)] = raw[first : first + part] if part else raw[first:].clone()
        first += max(part, 1)


def _shift_crossing(out: Tensor, offsets: np.ndarray, inside: np.ndarray, image: Tensor, padding: str) -> None:
    """Move the pixels of patches that cross the border to their place, and pad around them."""
    height, width = image.shape[2:]
    size = out.shape[3], out.shape[4]
    pixels = (out.view(torch.int16) if out.dtype == torch.bfloat16 else out).numpy()  # moved about, whatever they mean
    for b, n in zip(*(places.tolist() for places in (offsets != inside).any(-1).nonzero()), strict=True):
        (y, x), (read_y, read_x), patch = offsets[b, n].tolist(), inside[b, n].tolist(), pixels[b, n]
        if padding == "edge":
            rows, columns = nearest(y, size[0], height) - read_y, nearest(x, size[1], width) - read_x
            patch[...] = patch[:, rows[:, None], columns]
            continue
        rows, columns = overlap(y, size[0], height), overlap(x, size[1], width)
        kept = patch[:, moved(rows, y - read_y), moved(columns, x - read_x)].copy()
        patch.fill(0)
        patch[:, rows, columns] = kept


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
    scale = None if stds is None else torch.tensor([1 / std for std in stds], dtype=work, device="cpu").view(-1, 1, 1)
    for b, corners in enumerate(offsets.tolist()):
        for n, (y, x) in enumerate(corners):
            rows, columns = overlap(y, size[0], height), overlap(x, size[1], width)
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
            grad_image[b, :, moved(rows, y), moved(columns, x)].add_(grad)


def _fold(grad: Tensor, dim: int, start: int, limit: int) -> tuple[Tensor, int]:
    """Add what lies outside the image along `dim` to the nearest pixel inside; also that dim's first pixel number."""
    pixels = nearest(start, grad.shape[dim], limit)
    first, last = int(pixels[0]), int(pixels[-1])
    shape = list(grad.shape)
    shape[dim] = last - first + 1
    return grad.new_zeros(shape).index_add_(dim, torch.from_numpy(pixels - first), grad), first
