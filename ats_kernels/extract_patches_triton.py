"""Triton kernels of `extract_patches`: patches straight from the full-resolution image, and their gradients back.

One pass: a pixel is loaded in the image's dtype, normalised and cast in registers, and stored 16 bytes a thread.
Windows begin anywhere, so loads are single pixels, which lie side by side and come from the same cache lines. The
image may lie in device memory or in pinned host memory: Triton's launcher asks the driver for the device's address
of a pointer, and of a pinned tensor only the lines that the patches touch cross the bus.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels._checks import compute_dtype
from ats_kernels._offline import OfflineCase


# What nothing is gained from knowing more closely must not start another compilation.
_SIZES = ("n_patches", "height", "width", "stride_image_b", "stride_image_h")
_STRIDES = ("stride_image_c", "stride_image_w")  # 1 is worth knowing


@triton.jit
def _pixels(
    offsets_ptr,
    patch,
    index,
    height,
    width,
    stride_c,
    stride_h,
    stride_w,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where the elements `index` of a patch lie in its image.

    Returns the position of a pixel at or near the patch's corner, a scalar in int64; the elements' positions from
    there, int32 unless WIDE; the elements' channels; and which of them are read at all.
    """
    # Offsets farther out than this read the same, and fit in 32 bits.
    top = tl.minimum(tl.maximum(tl.load(offsets_ptr + 2 * patch), -PATCH_HEIGHT), height).to(tl.int32)
    left = tl.minimum(tl.maximum(tl.load(offsets_ptr + 2 * patch + 1), -PATCH_WIDTH), width).to(tl.int32)
    channel = index % INTERLEAVED
    y = index // (INTERLEAVED * PATCH_WIDTH)
    x = index // INTERLEAVED % PATCH_WIDTH
    valid = index < PATCH_HEIGHT * PATCH_WIDTH * INTERLEAVED
    if EDGE:
        first_y = tl.minimum(tl.maximum(top, 0), height - 1)
        first_x = tl.minimum(tl.maximum(left, 0), width - 1)
        y = tl.minimum(tl.maximum(top + y, 0), height - 1) - first_y
        x = tl.minimum(tl.maximum(left + x, 0), width - 1) - first_x
        corner = first_y.to(tl.int64) * stride_h + first_x.to(tl.int64) * stride_w
    else:
        # As unsigned numbers, negative ones are larger than any size.
        inside_y = (top + y).to(tl.uint32, bitcast=True) < height.to(tl.uint32)
        inside_x = (left + x).to(tl.uint32, bitcast=True) < width.to(tl.uint32)
        valid = valid & inside_y & inside_x
        corner = top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    if WIDE:
        y, x, channel = y.to(tl.int64), x.to(tl.int64), channel.to(tl.int64)
    return corner, y * stride_h + x * stride_w + channel * stride_c, channel, valid


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STRIDES)
def _extract_patches_fwd_kernel(
    image_ptr,  # (B, C, H, W)
    offsets_ptr,  # (B·N, 2)
    affine_ptr,  # (2, C): what is subtracted, what is multiplied by; None: pixels stay as they are
    out_ptr,  # (B·N, C, ph, pw), or (B·N, ph, pw, C) where INTERLEAVED is C
    n_patches,  # N
    height,
    width,
    stride_image_b,
    stride_image_c,
    stride_image_h,
    stride_image_w,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PLANES: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program writes BLOCK elements of one patch, the same ones of PLANES channels where these lie apart.
    SIZE: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH * INTERLEAVED
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = CHANNELS // (PLANES * INTERLEAVED)
    program = tl.program_id(0)
    group = program // TILES % GROUPS
    patch = program // (TILES * GROUPS)
    index = program % TILES * BLOCK + tl.arange(0, BLOCK)
    corner, position, channel, valid = _pixels(
        offsets_ptr, patch, index, height, width, stride_image_c, stride_image_h, stride_image_w,
        PATCH_HEIGHT, PATCH_WIDTH, INTERLEAVED, EDGE, WIDE,
    )  # fmt: skip
    corner += (patch // n_patches).to(tl.int64) * stride_image_b
    for step in tl.static_range(PLANES):
        plane = (group * PLANES + step).to(tl.int64)
        pixels = tl.load(image_ptr + (corner + plane * stride_image_c) + position, mask=valid, other=0)
        if affine_ptr is None:
            values = pixels
        else:
            center = tl.load(affine_ptr + plane + channel)
            scale = tl.load(affine_ptr + CHANNELS + plane + channel)
            values = tl.where(valid, (pixels.to(COMPUTE) - center) * scale, 0)
        out_ptrs = out_ptr + ((patch.to(tl.int64) * GROUPS + group) * PLANES + step) * SIZE + index
        tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=index < SIZE)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STRIDES)
def _extract_patches_bwd_kernel(
    grad_patches_ptr,  # (B·N, C, ph, pw), or (B·N, ph, pw, C) where INTERLEAVED is C
    offsets_ptr,  # (B·N, 2)
    affine_ptr,  # (2, C), as in the forward; None: pixels stayed as they were
    grad_image_ptr,  # (B, C, H, W), zero
    n_patches,  # N
    height,
    width,
    stride_image_b,
    stride_image_c,
    stride_image_h,
    stride_image_w,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PLANES: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program adds the gradients of the elements that one program of the forward wrote, where it read them.
    SIZE: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH * INTERLEAVED
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = CHANNELS // (PLANES * INTERLEAVED)
    program = tl.program_id(0)
    group = program // TILES % GROUPS
    patch = program // (TILES * GROUPS)
    index = program % TILES * BLOCK + tl.arange(0, BLOCK)
    corner, position, channel, valid = _pixels(
        offsets_ptr, patch, index, height, width, stride_image_c, stride_image_h, stride_image_w,
        PATCH_HEIGHT, PATCH_WIDTH, INTERLEAVED, EDGE, WIDE,
    )  # fmt: skip
    corner += (patch // n_patches).to(tl.int64) * stride_image_b
    for step in tl.static_range(PLANES):
        plane = (group * PLANES + step).to(tl.int64)
        grad_ptrs = grad_patches_ptr + ((patch.to(tl.int64) * GROUPS + group) * PLANES + step) * SIZE + index
        grad = tl.load(grad_ptrs, mask=index < SIZE, other=0).to(COMPUTE)
        if affine_ptr is not None:
            grad *= tl.load(affine_ptr + CHANNELS + plane + channel)
        grad_image_ptrs = grad_image_ptr + (corner + plane * stride_image_c) + position
        tl.atomic_add(grad_image_ptrs, grad.to(grad_image_ptr.dtype.element_ty), mask=valid, sem="relaxed")


def extract_patches_triton(
    image: Tensor,  # (B, C, H, W), on the GPU or in pinned memory
    offsets: Tensor,  # (B, N, 2)
    out: Tensor,  # (B, N, C, ph, pw), contiguous or with the channels last
    *,
    padding: str,
    means: list[float] | None,
    stds: list[float] | None,
) -> None:
    """Write the patches to `out`. Arguments as `extract_patches` checks them."""
    work = compute_dtype(image.dtype, out.dtype)
    affine = _affine(means, stds, image.dtype == torch.uint8, image.shape[1], work, out.device)
    _launch(_extract_patches_fwd_kernel, (image, offsets.contiguous(), affine, out), image, out, padding, work)
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
    """Add the patches' gradients up in `grad_image`, with atomics: in no particular order."""
    if not grad_patches.movedim(2, -1).is_contiguous():  # neither with the channels last
        grad_patches = grad_patches.contiguous()
    work = compute_dtype(grad_patches.dtype, grad_image.dtype)
    affine = _affine(None, stds, False, grad_image.shape[1], work, grad_image.device)
    arguments = grad_patches, offsets.contiguous(), affine, grad_image
    _launch(_extract_patches_bwd_kernel, arguments, grad_image, grad_patches, padding, work)


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    image: Tensor,
    patches: Tensor,
    padding: str,
    work: torch.dtype,
) -> None:
    if patches.numel() == 0:
        return
    channels = image.shape[1]
    interleaved = channels if patches.stride(2) < patches.stride(4) else 1
    size = patches.shape[3], patches.shape[4]
    block, planes, num_warps = _blocks(channels, interleaved, size)
    elements = math.prod(size) * interleaved
    grid = (patches.shape[0] * patches.shape[1] * (channels // (planes * interleaved)) * triton.cdiv(elements, block),)
    reach = sum((n - 1) * abs(s) for n, s in zip((interleaved, *size), image.stride()[1:], strict=True))
    with torch.cuda.device_of(patches):
        kernel[grid](
            *tensors,
            patches.shape[1],
            image.shape[2],
            image.shape[3],
            *image.stride(),
            CHANNELS=channels,
            PATCH_HEIGHT=size[0],
            PATCH_WIDTH=size[1],
            INTERLEAVED=interleaved,
            PLANES=planes,
            EDGE=padding == "edge",
            WIDE=reach >= 2**31,
            COMPUTE=tl.float64 if work == torch.float64 else tl.float32,
            BLOCK=block,
            num_warps=num_warps,
        )


def _blocks(channels: int, interleaved: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """Elements a program, channels that it treats one after the other, and warps, eight elements a thread."""
    elements = math.prod(size) * interleaved
    # The size that leaves the fewest threads idle at a patch's end, among equals the largest.
    block = min((1024, 512, 256), key=lambda block: (triton.cdiv(elements, block) * block, -block))
    planes = next(n for n in (4, 3, 2, 1) if channels // interleaved % n == 0)
    return block, planes, block // 256


@functools.lru_cache(maxsize=64)
def _cached_affine(values: tuple[float, ...], channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).view(2, channels).to(device)


def _affine(
    means: list[float] | None,
    stds: list[float] | None,
    is_byte: bool,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Center and scale (2, C) of ``(x − center)·scale`` on the image's own values; None where nothing is done.

    Kept from call to call: a copy from the host would make it wait, and could not be captured in a graph.
    """
    if means is None and stds is None and not is_byte:
        return None
    unit = 255.0 if is_byte else 1.0
    center = [unit * mean for mean in means or [0.0] * channels]
    scale = [1 / (unit * std) for std in stds or [1.0] * channels]
    return _cached_affine((*center, *scale), channels, dtype, device)


def _hold(image: Tensor, device: torch.device) -> None:
    """Keep pinned memory from being given to others before the kernel on the current stream has read it.

    PyTorch's pinned-memory allocator knows of the copies that it makes itself and of nothing else, so that a batch
    freed after the launch could be overwritten by the next one. A copy of one element, queued behind the kernel,
    tells it.
    """
    with torch.cuda.device(device):
        image.as_strided((1,), (1,)).to(device, non_blocking=True)


def offline_cases() -> list[OfflineCase]:
    """The launches of the three workloads: uint8 and float images, either memory order, forward and backward."""
    mnist = "MNIST", (128, 10, 1), (50, 50), (1500, 1500)
    signs = "signs", (32, 5, 3), (100, 100), (960, 1280)
    giga = "gigapixel", (1, 256, 3), (256, 256), (40000, 40000)
    wide_store, half_store = (r"st\.global\S*\.v4\.b32",), (r"st\.global\S*\.v4\.b32",)
    return [
        _case("fwd uint8 -> fp32", mnist, "u8", "fp32", needs=wide_store, budget=22),
        _case("fwd uint8 -> fp32", giga, "u8", "fp32", needs=wide_store, budget=22),
        _case("fwd uint8 -> bf16", giga, "u8", "bf16", needs=half_store, budget=22),
        _case("fwd uint8 -> fp32 channels-last", giga, "u8", "fp32", needs=wide_store, budget=40, channels_last=True),
        _case("fwd uint8 -> bf16 channels-last", giga, "u8", "bf16", needs=half_store, budget=40, channels_last=True),
        _case("fwd uint8 -> fp16 edge", signs, "u8", "fp16", needs=half_store, budget=26, edge=True),
        _case("fwd fp32", signs, "fp32", "fp32", needs=wide_store, budget=22, affine=False),
        _case("fwd fp16", signs, "fp16", "fp16", needs=half_store, budget=22, affine=False),
        _case("fwd bf16 -> fp32", signs, "bf16", "fp32", needs=wide_store, budget=22),
        _case("fwd fp64", signs, "fp64", "fp64", needs=(), budget=22),
        _case("bwd fp32", signs, "fp32", "fp32", needs=(), budget=22, backward=True),
        _case("bwd fp32 edge", signs, "fp32", "fp32", needs=(), budget=26, backward=True, edge=True),
        _case("bwd bf16", signs, "bf16", "bf16", needs=(), budget=30, backward=True),
        _case("bwd fp16", signs, "fp16", "fp16", needs=(), budget=30, backward=True),
    ]


def _case(
    name: str,
    workload: tuple[str, tuple[int, int, int], tuple[int, int], tuple[int, int]],
    image: str,
    patches: str,
    *,
    needs: tuple[str, ...],
    budget: float,
    channels_last: bool = False,
    edge: bool = False,
    affine: bool = True,
    backward: bool = False,
) -> OfflineCase:
    workload_name, (batch, n, channels), size, image_size = workload
    interleaved = channels if channels_last else 1
    block, planes, num_warps = _blocks(channels, interleaved, size)
    work = "fp64" if "fp64" in (image, patches) else "fp32"
    tensors = {"offsets_ptr": "*i64", "affine_ptr": f"*{work}"}
    if backward:
        tensors |= {"grad_patches_ptr": f"*{patches}", "grad_image_ptr": f"*{image}"}
    else:
        tensors |= {"image_ptr": f"*{image}", "out_ptr": f"*{patches}"}
    constexprs: dict[str, object] = {} if affine else {"affine_ptr": None}
    constexprs |= {"stride_image_c" if channels_last else "stride_image_w": 1}
    constexprs |= {"CHANNELS": channels, "PATCH_HEIGHT": size[0], "PATCH_WIDTH": size[1], "INTERLEAVED": interleaved}
    constexprs |= {"PLANES": planes, "EDGE": edge, "WIDE": False, "BLOCK": block}
    constexprs |= {"COMPUTE": tl.float64 if work == "fp64" else tl.float32}
    far = "i64" if channels * math.prod(image_size) >= 2**31 else "i32"
    signature = tensors | {"n_patches": "i32", "height": "i32", "width": "i32", "stride_image_b": far}
    signature |= {"stride_image_c": "i32", "stride_image_h": "i32", "stride_image_w": "i32"}
    itemsize = {"u8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
    return OfflineCase(
        name=f"{name}, {workload_name}",
        kernel=_extract_patches_bwd_kernel if backward else _extract_patches_fwd_kernel,
        signature={key: kind for key, kind in signature.items() if key not in constexprs},
        constexprs=constexprs,
        divisible_by_16=tuple(key for key in tensors if key not in constexprs),
        num_warps=num_warps,
        elements=block * planes,
        bytes_per_element=itemsize[image] * (2 if backward else 1) + itemsize[patches],
        budget=budget,
        needs=needs,
        workload=(workload_name, batch * n * channels * math.prod(size)),
    )
