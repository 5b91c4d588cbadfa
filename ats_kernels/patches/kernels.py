"""Triton kernels of `extract_patches`: patches straight from the full-resolution image, and their gradients back.

One pass: a pixel is loaded in the image's dtype, normalised and cast in registers, and stored 16 bytes a thread.
Windows begin anywhere, so loads are single pixels, which lie side by side and come from the same cache lines.
"""

import triton
import triton.language as tl

from ats_kernels.device import of_channel

# What nothing is gained from knowing more closely must not start another compilation.
_SIZES = ("height", "width", "stride_image_b", "stride_image_h", "patches_an_image")
_CELLS = ("grid_width", "row_a", "row_b", "row_d", "column_a", "column_b", "column_d")
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
def _corner(top, left, height, width, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr):
    """A patch's first row and column; offsets farther out than this read the same, and fit in 32 bits."""
    top = tl.minimum(tl.maximum(top, -PATCH_HEIGHT), height)
    left = tl.minimum(tl.maximum(left, -PATCH_WIDTH), width)
    return top.to(tl.int32), left.to(tl.int32)


@triton.jit
def _load_corner(offsets_ptr, patch, height, width, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr):
    top, left = tl.load(offsets_ptr + 2 * patch), tl.load(offsets_ptr + 2 * patch + 1)
    return _corner(top, left, height, width, PATCH_HEIGHT, PATCH_WIDTH)


@triton.jit
def _divide_down(number, divisor):
    """Quotient rounded down, and rest; Triton's own division drops the fraction, also of a negative number."""
    quotient = number // divisor
    rest = number - quotient * divisor
    below = rest < 0
    return tl.where(below, quotient - 1, quotient), tl.where(below, rest + divisor, rest)


@triton.jit
def _first_pixel(cell, a, b, d):
    """(a·cell + b) / d, rounded half to even."""
    quotient, rest = _divide_down(cell * a + b, d)
    up = (2 * rest > d) | ((2 * rest == d) & ((quotient & 1) == 1))
    return tl.where(up, quotient + 1, quotient)


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


@triton.jit
def _normalised(
    pixels, channel, affine_ptr, center_0, center_1, center_2, center_3, scale_0, scale_1, scale_2, scale_3,
    CHANNELS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(pixels − center)·scale, by the numbers of their channel."""
    if affine_ptr is None:
        center = of_channel(channel, center_0, center_1, center_2, center_3, CHANNELS).to(COMPUTE)
        scale = of_channel(channel, scale_0, scale_1, scale_2, scale_3, CHANNELS).to(COMPUTE)
    else:
        center = tl.load(affine_ptr + channel)
        scale = tl.load(affine_ptr + CHANNELS + channel)
    return (pixels.to(COMPUTE) - center) * scale


@triton.jit(do_not_specialize=_SIZES + _CELLS, do_not_specialize_on_alignment=_STRIDES)
def extract_patches_fwd_kernel(
    image_ptr,  # (B, C, H, W)
    indices_ptr,  # (B·N,): the patches' cells, whose offsets are written; None: offsets are read
    offsets_ptr,  # (B·N, 2)
    affine_ptr,  # (2, C) center and scale of each channel; None: center_0, … and scale_0, … are
    out_ptr,  # (B·N, C, ph, pw), or (B·N, ph, pw, C) where INTERLEAVED is C
    height,
    width,
    patches_an_image,
    grid_width,
    row_a,  # of a cell in row i the first pixel is (a·i + b)/d, rounded half to even
    row_b,
    row_d,
    column_a,
    column_b,
    column_d,
    stride_image_b,
    stride_image_c,
    stride_image_h,
    stride_image_w,
    center_0,
    center_1,
    center_2,
    center_3,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DENSE: tl.constexpr,  # a row's elements lie evenly spaced in the image
    PLANES: tl.constexpr,
    EDGE: tl.constexpr,
    WIDE: tl.constexpr,  # a window reaches past 2^31 elements
    INDEX: tl.constexpr,  # holds a·i + b, and 2·d
    AFFINE: tl.constexpr,  # pixels are normalised
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes BLOCK elements of one patch, the same ones of PLANES channels where these lie apart."""
    SIZE: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH * INTERLEAVED
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = CHANNELS // (PLANES * INTERLEAVED)
    program = tl.program_id(0)
    group = program // TILES % GROUPS
    patch = program // (TILES * GROUPS)
    index = program % TILES * BLOCK + tl.arange(0, BLOCK)
    y, x, channel, first, lane = _elements(index, PATCH_WIDTH, INTERLEAVED, TILES * BLOCK)
    if indices_ptr is None:
        top, left = _load_corner(offsets_ptr, patch, height, width, PATCH_HEIGHT, PATCH_WIDTH)
    else:
        row, column = _divide_down(tl.load(indices_ptr + patch).to(INDEX), grid_width)
        top = _first_pixel(row, row_a, row_b, row_d)
        left = _first_pixel(column, column_a, column_b, column_d)
        if program % (TILES * GROUPS) == 0:
            tl.store(offsets_ptr + 2 * patch, top.to(tl.int64))
            tl.store(offsets_ptr + 2 * patch + 1, left.to(tl.int64))
        top, left = _corner(top, left, height, width, PATCH_HEIGHT, PATCH_WIDTH)
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
    corner = (patch // patches_an_image).to(tl.int64) * stride_image_b
    corner += top.to(tl.int64) * stride_image_h + left.to(tl.int64) * stride_image_w
    for step in tl.static_range(PLANES):
        plane = (group * PLANES + step).to(tl.int64)
        image_ptrs = image_ptr + (corner + plane * stride_image_c) + row + column
        if AFFINE:
            values = _normalised(
                tl.load(image_ptrs, mask=valid), (group * PLANES + step) + channel, affine_ptr, center_0, center_1,
                center_2, center_3, scale_0, scale_1, scale_2, scale_3, CHANNELS, COMPUTE,
            )  # fmt: skip
            values = tl.where(valid, values, 0)
        else:
            values = tl.load(image_ptrs, mask=valid, other=0)
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
def extract_patches_bwd_kernel(
    grad_patches_ptr,  # (B·N, C, ph, pw), or (B·N, ph, pw, C) where INTERLEAVED is C
    offsets_ptr,  # (B·N, 2)
    affine_ptr,  # (2, C), as in the forward
    grad_image_ptr,  # (B, C, H, W), zero
    height,
    width,
    patches_an_image,
    stride_image_b,
    stride_image_c,
    stride_image_h,
    stride_image_w,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EDGE: tl.constexpr,
    AFFINE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the gradients of the pixels that BLOCK elements of one patch read, in one channel where
    channels lie apart. Of all elements that read a pixel the first one owns it: it alone adds up what the others bring
    and writes the sum. So nothing is atomic, sums have one order and are rounded once."""
    SIZE: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH * INTERLEAVED
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    GROUPS: tl.constexpr = CHANNELS // INTERLEAVED
    program = tl.program_id(0)
    group = (program // TILES % GROUPS).to(tl.int64)
    patch = program // (TILES * GROUPS)
    image = patch // patches_an_image
    mine = patch % patches_an_image
    index = program % TILES * BLOCK + tl.arange(0, BLOCK)
    y, x, channel, _, _ = _elements(index, PATCH_WIDTH, INTERLEAVED, TILES * BLOCK)
    top, left = _load_corner(offsets_ptr, patch, height, width, PATCH_HEIGHT, PATCH_WIDTH)
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
    for other in range(patches_an_image):
        other_top, other_left = _load_corner(
            offsets_ptr, image * patches_an_image + other, height, width, PATCH_HEIGHT, PATCH_WIDTH
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
            plane = ((image * patches_an_image + other).to(tl.int64) * GROUPS + group) * SIZE
            grad_ptrs = grad_patches_ptr + plane + ((low_y * PATCH_WIDTH + low_x) * INTERLEAVED + channel)
            if EDGE:
                for step_y in range(tl.max(tl.where(reads, count_y, 0), 0)):
                    for step_x in range(tl.max(tl.where(reads, count_x, 0), 0)):
                        mask = reads & (step_y < count_y) & (step_x < count_x)
                        step = (step_y * PATCH_WIDTH + step_x) * INTERLEAVED
                        total += tl.load(grad_ptrs + step, mask=mask, other=0).to(COMPUTE)
            else:
                total += tl.load(grad_ptrs, mask=reads, other=0).to(COMPUTE)
    if AFFINE:
        if affine_ptr is None:
            total *= of_channel(group + channel, scale_0, scale_1, scale_2, scale_3, CHANNELS).to(COMPUTE)
        else:
            total *= tl.load(affine_ptr + CHANNELS + group + channel)
    position = pixel_y.to(tl.int64) * stride_image_h + pixel_x.to(tl.int64) * stride_image_w
    position += image.to(tl.int64) * stride_image_b + (group + channel) * stride_image_c
    tl.store(grad_image_ptr + position, _cast(total, grad_image_ptr.dtype.element_ty), mask=owned)
