"""The GPU path of `extract_patches`: it launches the Triton kernels.

The image may lie in device memory or in pinned host memory: Triton's launcher asks the driver for the device's address
of a pointer, and of a pinned tensor only the lines that the patches touch cross the bus.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels.backend import device_guard
from ats_kernels.checks import compute_dtype
from ats_kernels.device import fits, padded
from ats_kernels.patches.cells import CellMap
from ats_kernels.patches.kernels import extract_patches_bwd_kernel, extract_patches_fwd_kernel

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def extract_patches_triton(
    image: Tensor,  # (B, C, H, W), on the GPU or in pinned memory
    offsets: Tensor,  # (B, N, 2), written where there are indices
    out: Tensor,  # (B, N, C, ph, pw), contiguous or with the channels last
    *,
    indices: Tensor | None = None,  # (B, N), cells of the map
    cells: CellMap | None = None,
    padding: str,
    means: list[float] | None,
    stds: list[float] | None,
) -> None:
    """Write the patches to `out`, and the offsets where cells are given. Arguments as the ops check them."""
    if out.numel() == 0:
        return
    work = compute_dtype(image.dtype, out.dtype)
    affine = _affine(means, stds, image.dtype == torch.uint8, image.shape[1], work, out.device)
    index, *numbers = _cell_numbers(cells)
    interleaved = _interleaved(out)
    block, planes, num_warps = fwd_blocks(out, interleaved)
    lengths = interleaved, *out.shape[3:]
    reach = sum((length - 1) * stride for length, stride in zip(lengths, image.stride()[1:], strict=True))
    _launch(
        extract_patches_fwd_kernel,
        (image, None if indices is None else indices.contiguous(), offsets.contiguous(), affine.tensor, out),
        image,
        out,
        planes,
        block,
        (*numbers, *image.stride(), *affine.centers, *affine.scales),
        DENSE=interleaved == 1 or image.stride(3) == interleaved * image.stride(1),
        PLANES=planes,
        EDGE=padding == "edge",
        WIDE=reach >= 2**31,
        INDEX=index,
        AFFINE=affine.used,
        COMPUTE=_DTYPES[work],
        num_warps=num_warps,
    )
    if image.device != out.device and not torch.cuda.is_current_stream_capturing():
        _hold(image, out.device)


def scatter_patches_triton(
    grad_patches: Tensor,  # (B, N, C, ph, pw), any strides
    offsets: Tensor,  # (B, N, 2)
    grad_image: Tensor,  # (B, C, H, W), zero
    *,
    padding: str,
    stds: list[float] | None,
) -> None:
    """Add the patches' gradients up in `grad_image`, deterministically."""
    if grad_patches.numel() == 0:
        return
    if not grad_patches.movedim(2, -1).is_contiguous():  # nor with the channels last
        grad_patches = grad_patches.contiguous()
    work = compute_dtype(grad_patches.dtype, grad_image.dtype)
    affine = _affine(None, stds, False, grad_image.shape[1], work, grad_image.device)
    block, num_warps = bwd_blocks(grad_patches, _interleaved(grad_patches))
    _launch(
        extract_patches_bwd_kernel,
        (grad_patches, offsets.contiguous(), affine.tensor, grad_image),
        grad_image,
        grad_patches,
        1,
        block,
        (*grad_image.stride(), *affine.scales),
        EDGE=padding == "edge",
        AFFINE=affine.used,
        COMPUTE=_DTYPES[work],
        num_warps=num_warps,
    )


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    image: Tensor,
    patches: Tensor,
    planes: int,
    block: int,
    numbers: tuple[float, ...],
    **options: Any,
) -> None:
    batch, n, channels, height, width = patches.shape
    interleaved = _interleaved(patches)
    tiles = triton.cdiv(height * width * interleaved, block)
    with device_guard(patches):
        kernel[(batch * n * (channels // (planes * interleaved)) * tiles,)](
            *tensors,
            *image.shape[2:],
            n,
            *numbers,
            CHANNELS=channels,
            PATCH_HEIGHT=height,
            PATCH_WIDTH=width,
            INTERLEAVED=interleaved,
            BLOCK=block,
            **options,
        )


def _interleaved(patches: Tensor) -> int:
    """How many channels lie beside each other in memory: all or, where they lie apart, 1."""
    return patches.shape[2] if patches.stride(2) < patches.stride(4) else 1


def fwd_blocks(patches: Tensor, interleaved: int) -> tuple[int, int, int]:
    """Elements a program, channels that it treats one after the other, and warps."""
    channels, height, width = patches.shape[2:]
    elements = height * width * interleaved
    # The size that leaves the fewest threads idle at a patch's end, among equals the largest.
    block = min((1024, 512, 256), key=lambda block: (triton.cdiv(elements, block) * block, -block))
    planes = next(n for n in (4, 3, 2, 1) if channels // interleaved % n == 0)
    return block, planes, max(1, block // (512 if planes == 1 else 256))


def bwd_blocks(patches: Tensor, interleaved: int) -> tuple[int, int]:
    """Elements a program, and warps."""
    block = min(512, fwd_blocks(patches, interleaved)[0])  # more would need too many registers
    return block, block // 128


class _Affine(NamedTuple):
    """``(x − center)·scale`` on the image's own values, by numbers that travel with the launch, or a tensor (2, C)."""

    used: bool
    centers: list[float]
    scales: list[float]
    tensor: Tensor | None


def _affine(
    means: list[float] | None,
    stds: list[float] | None,
    is_byte: bool,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Affine:
    unit = 255.0 if is_byte else 1.0
    center = None if means is None else [unit * mean for mean in means]
    scale = [1 / (unit * std) for std in stds or [1.0] * channels]
    used = means is not None or stds is not None or is_byte
    tensor = None
    if used and not (dtype == torch.float32 and fits(center) and fits(scale)):
        # Many channels, or numbers in float64, which no launch carries. They are filled in one by one: a copy from the
        # host would make it wait, and what were kept from call to call could be freed while a graph still reads it.
        tensor = torch.empty(2, channels, dtype=dtype, device=device)
        for row, values in zip(tensor, (center or [0.0] * channels, scale), strict=True):
            if values.count(values[0]) == channels:
                row.fill_(values[0])
            else:
                for channel, value in enumerate(values):
                    row[channel].fill_(value)
    return _Affine(used, padded(center, 0.0), padded(scale, 1.0), tensor)


def _cell_numbers(cells: CellMap | None) -> tuple[Any, ...]:
    """The type that cells are turned into pixels in, the grid's width and a, b and d along both axes, in lowest terms;
    divisions in 64 bits are worth avoiding."""
    if cells is None:
        return (tl.int32, *(7 * [0]))
    axes = [[number // math.gcd(*axis) for number in axis] for axis in (cells.rows, cells.columns)]
    most = max(abs(a) * (length + 1) + abs(b) + 2 * d for (a, b, d), length in zip(axes, cells.grid_size, strict=True))
    index = tl.int32 if max(most, math.prod(cells.grid_size)) < 2**31 else tl.int64
    return index, cells.grid_size[1], *axes[0], *axes[1]


def _hold(image: Tensor, device: torch.device) -> None:
    """Keep pinned memory from being given to others before the kernel on the current stream has read it.

    PyTorch's pinned-memory allocator knows of the copies that it makes itself and of nothing else, so that a batch
    freed after the launch could be overwritten by the next one. A copy of one element, queued behind the kernel,
    tells it.
    """
    with torch.cuda.device(device):
        image.as_strided((1,), (1,)).to(device, non_blocking=True)
