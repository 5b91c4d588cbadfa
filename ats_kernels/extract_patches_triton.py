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

from ats_kernels._backend import device_guard
from ats_kernels._checks import compute_dtype
from ats_kernels._offline import OfflineCase

# What nothing is gained from knowing more closely must not start another compilation.
_SIZES = ("height", "width", "stride_image_b", "stride_image_h")
_STRIDES = ("stride_image_c", "stride_image_w")  # 1 is worth knowing


@triton.jit
def _divide(index, DIVISOR: tl.constexpr, LIMIT: tl.constexpr):
    """index // DIVISOR for 0 <= index < LIMIT, by one multiplication where that is exact.

    LLVM sees that few bits are needed and divides in 16, which takes a GPU five instructions.
    """
    if DIVISOR & (DIVISOR - 1) == 0 or LIMIT * DIVISOR >= 2**32:
        return index // DIVISOR
    else:
        RECIPROCAL: tl.constexpr = 2**32 // DIVISOR + 1
        return tl.umulhi(index.to(tl.uint32), RECIPROCAL).to(tl.int32)


@triton.jit
def _elements(index, PATCH_WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr):
    """Row, column and channel of a patch's elements `index` < LIMIT; number in the row = the last two, added."""
    # A row's elements come in chunks of a power of two, so that the compiler finds a chunk's row once.
    ROW: tl.constexpr = PATCH_WIDTH * INTERLEAVED
    CHUNK: tl.constexpr = 8 if ROW % 8 == 0 else (4 if ROW % 4 == 0 else (2 if ROW % 2 == 0 else 1))
    chunk = index // CHUNK
    y = _divide(chunk, ROW // CHUNK, LIMIT // CHUNK)
    first = (chunk - y * (ROW // CHUNK)) * CHUNK
    lane = index % CHUNK
    x = _divide(first + lane, INTERLEAVED, ROW)
    return y, x, first + lane - x * INTERLEAVED, first, lane


@triton.jit
def _corner(offsets_ptr, patch, height, width, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr):
    """A patch's first row and column; offsets farther out than this read the same, and fit in 32 bits."""
    top = tl.minimum(tl.maximum(tl.load(offsets_ptr + 2 * patch), -PATCH_HEIGHT), height)
    left = tl.minimum(tl.maximum(tl.load(offsets_ptr + 2 * patch + 1), -PATCH_WIDTH), width)
    return top.to(tl.int32), left.to(tl.int32)


@triton.jit
def _cast(values, DTYPE: tl.constexpr):
    if DTYPE.is_bf16():  # there is no step from float64
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def _clamp(pixel, limit):
    return tl.minimum(tl.maximum(pixel, 0), limit - 1)


@triton.jit
def _inside(pixel, limit):
    # As unsigned numbers, negative ones are larger than any size.
    return pixel.to(tl.uint32, bitcast=True) < limit.to(tl.uint32)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STRIDES)
def _extract_patches_fwd_kernel(
    image_ptr,  # (B, C, H, W)
    offsets_ptr,  # (B·N, 2)
    affine_ptr,  # (2, C): what is subtracted, what is multiplied by; None: pixels stay as they are
    out_ptr,  # (B·N, C, ph, pw), or (B·N, ph, pw, C) where INTERLEAVED is C
    height,
    width,
    stride_image_b,
    stride_image_c,
    stride_image_h,
    stride_image_w,
    PATCHES: tl.constexpr,  # N
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DENSE: tl.constexpr,  # a row's elements lie evenly spaced in the image
    PLANES: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,  # a window reaches past 2^31 elements
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
    y, x, channel, first, lane = _elements(index, PATCH_WIDTH, INTERLEAVED, TILES * BLOCK)
    top, left = _corner(offsets_ptr, patch, height, width, PATCH_HEIGHT, PATCH_WIDTH)
    valid = index < SIZE
    if EDGE:
        y = _clamp(top + y, height)
        x = _clamp(left + x, width)
        top = _clamp(top, height)
        left = _clamp(left, width)
        y -= top
        x -= left
    else:
        valid = valid & _inside(top + y, height) & _inside(left + x, width)
    if WIDE:
        y, x, channel = y.to(tl.int64), x.to(tl.int64), channel.to(tl.int64)
        first, lane = first.to(tl.int64), lane.to(tl.int64)
    if EDGE or not DENSE:
        row = y * stride_image_h
        column = x * stride_image_w + channel * stride_image_c
    else:
        # Apart, since the second is a constant for each of a thread's loads.
        stride = stride_image_w if INTERLEAVED == 1 else stride_image_c
        row = y * stride_image_h + first * stride
        column = lane * stride
    corner = (patch // PATCHES).to(tl.int64) * stride_image_b
    corner += top.to(tl.int64) * stride_image_h + left.to(tl.int64) * stride_image_w
    for step in tl.static_range(PLANES):
        plane = (group * PLANES + step).to(tl.int64)
        image_ptrs = image_ptr + (corner + plane * stride_image_c) + row + column
        if affine_ptr is None:
            values = tl.load(image_ptrs, mask=valid, other=0)
        else:
            pixels = tl.load(image_ptrs, mask=valid)
            center = tl.load(affine_ptr + plane + channel)
            scale = tl.load(affine_ptr + CHANNELS + plane + channel)
            values = tl.where(valid, (pixels.to(COMPUTE) - center) * scale, 0)
        out_ptrs = out_ptr + ((patch.to(tl.int64) * GROUPS + group) * PLANES + step) * SIZE + index
        tl.store(out_ptrs, _cast(values, out_ptr.dtype.element_ty), mask=index < SIZE)


@triton.jit
def _readers(pixel, start, limit, LENGTH: tl.constexpr, EDGE: tl.constexpr):
    """Along one axis, which of the LENGTH elements of a patch from `start` on read a pixel: the first, how many."""
    low = pixel - start
    if EDGE:
        high = tl.where(pixel == limit - 1, LENGTH - 1, tl.minimum(low, LENGTH - 1))
        low = tl.where(pixel == 0, 0, tl.maximum(low, 0))
        return low, high - low + 1
    else:
        return low, ((low >= 0) & (low < LENGTH)).to(tl.int32)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_STRIDES)
def _extract_patches_bwd_kernel(
    grad_patches_ptr,  # (B·N, C, ph, pw), or (B·N, ph, pw, C) where INTERLEAVED is C
    offsets_ptr,  # (B·N, 2)
    affine_ptr,  # (2, C), as in the forward; None: pixels stayed as they were
    grad_image_ptr,  # (B, C, H, W), zero
    height,
    width,
    stride_image_b,
    stride_image_c,
    stride_image_h,
    stride_image_w,
    PATCHES: tl.constexpr,  # N
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program writes the gradients of the pixels that BLOCK elements of one patch read, in one channel where
    # channels lie apart. Of all elements that read a pixel the first one owns it: it alone adds up what the others
    # bring and writes the sum. So nothing is atomic, sums have one order and are rounded once.
    SIZE: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH * INTERLEAVED
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = CHANNELS // INTERLEAVED
    program = tl.program_id(0)
    group = (program // TILES % GROUPS).to(tl.int64)
    patch = program // (TILES * GROUPS)
    image = patch // PATCHES
    mine = patch % PATCHES
    index = program % TILES * BLOCK + tl.arange(0, BLOCK)
    y, x, channel, _, _ = _elements(index, PATCH_WIDTH, INTERLEAVED, TILES * BLOCK)
    top, left = _corner(offsets_ptr, patch, height, width, PATCH_HEIGHT, PATCH_WIDTH)
    pixel_y, pixel_x = top + y, left + x
    owned = index < SIZE
    if EDGE:
        pixel_y, pixel_x = _clamp(pixel_y, height), _clamp(pixel_x, width)
        low_y, _ = _readers(pixel_y, top, height, PATCH_HEIGHT, EDGE)
        low_x, _ = _readers(pixel_x, left, width, PATCH_WIDTH, EDGE)
        owned = owned & (y == low_y) & (x == low_x)
    else:
        owned = owned & _inside(pixel_y, height) & _inside(pixel_x, width)

    total = tl.zeros([BLOCK], COMPUTE)
    for other in range(PATCHES):
        other_top, other_left = _corner(
            offsets_ptr, image * PATCHES + other, height, width, PATCH_HEIGHT, PATCH_WIDTH
        )  # fmt: skip
        # At the border, patches that lie apart can read the same pixel.
        near = EDGE or (
            (tl.abs(other_top - top) < PATCH_HEIGHT) & (tl.abs(other_left - left) < PATCH_WIDTH)
        )  # fmt: skip
        if near:
            low_y, count_y = _readers(pixel_y, other_top, height, PATCH_HEIGHT, EDGE)
            low_x, count_x = _readers(pixel_x, other_left, width, PATCH_WIDTH, EDGE)
            reads = (count_y > 0) & (count_x > 0)
            owned = owned & ((reads == 0) | (other >= mine))
            reads = reads & owned & (other >= mine)
            plane = ((image * PATCHES + other).to(tl.int64) * GROUPS + group) * SIZE
            grad_ptrs = grad_patches_ptr + plane + ((low_y * PATCH_WIDTH + low_x) * INTERLEAVED + channel)
            if EDGE:
                for step_y in range(tl.max(tl.where(reads, count_y, 0), 0)):
                    for step_x in range(tl.max(tl.where(reads, count_x, 0), 0)):
                        mask = reads & (step_y < count_y) & (step_x < count_x)
                        step = (step_y * PATCH_WIDTH + step_x) * INTERLEAVED
                        total += tl.load(grad_ptrs + step, mask=mask, other=0).to(COMPUTE)
            else:
                total += tl.load(grad_ptrs, mask=reads, other=0).to(COMPUTE)
    if affine_ptr is not None:
        total *= tl.load(affine_ptr + CHANNELS + group + channel)
    position = pixel_y.to(tl.int64) * stride_image_h + pixel_x.to(tl.int64) * stride_image_w
    position += image.to(tl.int64) * stride_image_b + (group + channel) * stride_image_c
    tl.store(grad_image_ptr + position, _cast(total, grad_image_ptr.dtype.element_ty), mask=owned)


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
    if out.numel() == 0:
        return
    work = compute_dtype(image.dtype, out.dtype)
    affine = _affine(means, stds, image.dtype == torch.uint8, image.shape[1], work, out.device)
    interleaved = _interleaved(out)
    block, planes, num_warps = _blocks(out, interleaved)
    lengths = interleaved, *out.shape[3:]
    reach = sum((length - 1) * stride for length, stride in zip(lengths, image.stride()[1:], strict=True))
    _launch(
        _extract_patches_fwd_kernel,
        (image, offsets.contiguous(), affine, out),
        image,
        out,
        planes,
        block,
        DENSE=interleaved == 1 or image.stride(3) == interleaved * image.stride(1),
        PLANES=planes,
        EDGE=padding == "edge",
        WIDE=reach >= 2**31,
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
    block = min(512, _blocks(grad_patches, _interleaved(grad_patches))[0])  # more would need too many registers
    _launch(
        _extract_patches_bwd_kernel,
        (grad_patches, offsets.contiguous(), affine, grad_image),
        grad_image,
        grad_patches,
        1,
        block,
        EDGE=padding == "edge",
        COMPUTE=_DTYPES[work],
        num_warps=block // 128,
    )


_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _launch(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    image: Tensor,
    patches: Tensor,
    planes: int,
    block: int,
    **options: Any,
) -> None:
    batch, n, channels, height, width = patches.shape
    interleaved = _interleaved(patches)
    tiles = triton.cdiv(height * width * interleaved, block)
    with device_guard(patches):
        kernel[(batch * n * (channels // (planes * interleaved)) * tiles,)](
            *tensors,
            *image.shape[2:],
            *image.stride(),
            PATCHES=n,
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


def _blocks(patches: Tensor, interleaved: int) -> tuple[int, int, int]:
    """Elements a program, channels that it treats one after the other, and warps."""
    channels, height, width = patches.shape[2:]
    elements = height * width * interleaved
    # The size that leaves the fewest threads idle at a patch's end, among equals the largest.
    block = min((1024, 512, 256), key=lambda block: (triton.cdiv(elements, block) * block, -block))
    planes = next(n for n in (4, 3, 2, 1) if channels // interleaved % n == 0)
    return block, planes, max(1, block // (512 if planes == 1 else 256))


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
    return _constant((*center, *scale), dtype, device)


@functools.lru_cache(maxsize=64)
def _cached(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).view(2, -1).to(device)


@torch.compiler.assume_constant_result
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _cached(values, dtype, device)


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
    wide = (r"st\.global\S*\.v4\.b32",)
    return [
        _case("fwd uint8 -> fp32", mnist, "u8", "fp32", needs=wide, budget=22),
        _case("fwd uint8 -> fp32", giga, "u8", "fp32", needs=wide, budget=22),
        _case("fwd uint8 -> bf16", giga, "u8", "bf16", needs=wide, budget=22),
        _case("fwd uint8 -> fp32 channels-last", giga, "u8", "fp32", needs=wide, budget=30, channels_last=True),
        _case("fwd uint8 -> bf16 channels-last", giga, "u8", "bf16", needs=wide, budget=30, channels_last=True),
        _case("fwd uint8 -> fp16 edge", signs, "u8", "fp16", needs=wide, budget=22, edge=True),
        _case("fwd fp32", signs, "fp32", "fp32", needs=wide, budget=12, affine=False),
        _case("fwd fp16", signs, "fp16", "fp16", needs=wide, budget=12, affine=False),
        _case("fwd bf16 -> fp32", signs, "bf16", "fp32", needs=wide, budget=22),
        _case("fwd fp64", signs, "fp64", "fp64", needs=(r"st\.global\S*\.v2\.b64",), budget=22),
        # The loop over the patches of an image counts as one patch.
        _case("bwd fp32", signs, "fp32", "fp32", budget=110, backward=True),
        _case("bwd fp32 edge", signs, "fp32", "fp32", budget=200, backward=True, edge=True),
        _case("bwd fp32 channels-last", signs, "fp32", "fp32", budget=130, backward=True, channels_last=True),
        _case("bwd bf16", signs, "bf16", "bf16", budget=130, backward=True),
    ]


def _case(
    name: str,
    workload: tuple[str, tuple[int, int, int], tuple[int, int], tuple[int, int]],
    image: str,
    patches: str,
    *,
    budget: float,
    needs: tuple[str, ...] = (),
    channels_last: bool = False,
    edge: bool = False,
    affine: bool = True,
    backward: bool = False,
) -> OfflineCase:
    workload_name, (batch, n, channels), size, image_size = workload
    interleaved = channels if channels_last else 1
    block, planes, num_warps = _blocks(torch.empty((batch, n, channels, *size), device="meta"), interleaved)
    work = "fp64" if "fp64" in (image, patches) else "fp32"
    tensors = {"offsets_ptr": "*i64", "affine_ptr": f"*{work}"}
    if backward:
        tensors |= {"grad_patches_ptr": f"*{patches}", "grad_image_ptr": f"*{image}"}
    else:
        tensors |= {"image_ptr": f"*{image}", "out_ptr": f"*{patches}"}
    constexprs: dict[str, object] = {} if affine else {"affine_ptr": None}
    constexprs |= {"stride_image_c" if channels_last else "stride_image_w": 1}
    constexprs |= {
        "PATCHES": n,
        "CHANNELS": channels,
        "PATCH_HEIGHT": size[0],
        "PATCH_WIDTH": size[1],
        "INTERLEAVED": interleaved,
    }
    if backward:
        block, planes = min(512, block), 1
        num_warps = block // 128
    else:
        constexprs |= {"DENSE": True, "PLANES": planes, "WIDE": False}
    constexprs |= {"EDGE": edge, "BLOCK": block}
    constexprs |= {"COMPUTE": tl.float64 if work == "fp64" else tl.float32}
    far = "i64" if channels * math.prod(image_size) >= 2**31 else "i32"
    signature = tensors | {"height": "i32", "width": "i32", "stride_image_b": far}
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
