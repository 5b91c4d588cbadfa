"""The low-resolution view V(x, s) of the paper (eq. 18): each output pixel is the mean of the area it covers.

Output row i averages the input rows ⌊i·H/h⌋ to ⌈(i+1)·H/h⌉ − 1, and columns likewise, so bins overlap where
the ratio is no integer: what ``F.interpolate(mode="area")`` computes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ats_kernels.backend import backend_for, check_not_to_onnx, is_transformed, wants_graph
from ats_kernels.checks import (
    Normalisation,
    check_image,
    check_normalisation,
    check_pair,
    compute_dtype,
    normalise,
    output_dtype,
)
from ats_kernels.plausible import warn_of_bytes
from ats_kernels.views.cpu import area_downsample_cpu, channels_come_last


def area_downsample_ref(
    image: Tensor,  # (B, C, H, W)
    size: tuple[int, int],
    *,
    means: list[float] | None = None,
    stds: list[float] | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain PyTorch, differentiable in a floating-point image. Arguments as `area_downsample` passes."""
    pixels = image.to(compute_dtype(image.dtype, dtype))
    # Rows, then columns: a bin's mean is the mean of its rows' means, and sums stay short enough for float32.
    rows = F.adaptive_avg_pool2d(pixels, (size[0], pixels.shape[3]))  # (B, C, h, W)
    view = F.adaptive_avg_pool2d(rows, size)  # (B, C, h, w)
    return normalise(view, means, stds, channel_dim=1, is_byte=image.dtype == torch.uint8).to(dtype)


def _launch(
    image: Tensor, size: tuple[int, int], means: list[float] | None, stds: list[float] | None, dtype: torch.dtype
) -> Tensor:
    if torch.compiler.is_compiling():
        from ats_kernels.views.opaque import downsample

        return downsample(image, list(size), means, stds, dtype)
    from ats_kernels.views.triton import area_downsample_triton

    return area_downsample_triton(image, size, means=means, stds=stds, dtype=dtype)


class _AreaDownsample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        size: tuple[int, int],
        means: list[float] | None,
        stds: list[float] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        view = _launch(image, size, means, stds, dtype)
        channels_last = view.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        ctx.image, ctx.stds = (image.shape, image.dtype), stds
        return view

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        spread = _Spread.apply if wants_graph() else _spread
        shape, dtype = ctx.image
        return spread(grad_out, shape, dtype, ctx.memory_format, ctx.stds), None, None, None, None


def _spread(
    grad_out: Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    stds: list[float] | None,
) -> Tensor:
    """The gradient of an image from that of its view."""
    if torch.compiler.is_compiling():
        from ats_kernels.views.opaque import spread

        return spread(grad_out, list(shape), dtype, memory_format == torch.channels_last, stds)
    from ats_kernels.views.triton import area_downsample_backward_triton

    grad_image = torch.empty(shape, dtype=dtype, device=grad_out.device, memory_format=memory_format)
    area_downsample_backward_triton(grad_out, grad_image, stds=stds)
    return grad_image


class _Spread(torch.autograd.Function):
    """`_spread` where it must be differentiable itself: it is linear, and the view its transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_out: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        stds: list[float] | None,
    ) -> Tensor:
        ctx.size, ctx.dtype, ctx.stds = (grad_out.shape[2], grad_out.shape[3]), grad_out.dtype, stds
        return _spread(grad_out, shape, dtype, memory_format, stds)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return area_downsample(grad, ctx.size, std=ctx.stds, dtype=ctx.dtype), None, None, None, None


@torch.library.custom_op(
    "ats_kernels::area_downsample_cpu",
    mutates_args=(),
    schema="(Tensor image, int[] size, float[]? means, float[]? stds, ScalarType dtype) -> Tensor",
)
def _opaque_area_downsample(
    image: Tensor, size: list[int], means: list[float] | None, stds: list[float] | None, dtype: torch.dtype
) -> Tensor:
    """The lean path as one operator to a compiler, whose own loops over the reference take longer."""
    return area_downsample_cpu(image, (size[0], size[1]), means=means, stds=stds, dtype=dtype)


@_opaque_area_downsample.register_fake
def _(
    image: Tensor, size: list[int], means: list[float] | None, stds: list[float] | None, dtype: torch.dtype
) -> Tensor:
    view = image.new_empty((*image.shape[:2], *size), dtype=dtype)
    return view.contiguous(memory_format=torch.channels_last) if channels_come_last(image) else view


def area_downsample(
    image: Tensor,
    size: int | tuple[int, int],
    *,
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Shrink images to a low-resolution view by averaging areas, normalised.

    Args:
        image: (B, C, H, W) uint8, uint16, int16 or floating point (16 to 64 bits), any strides.
        size: of the view in pixels, an int or (h, w); no larger than the image.
        mean, std: a float, or one a channel: the view is (x − mean) / std. A uint8 image is scaled by 1/255 before,
            so that its mean and std are those of values in [0, 1]; no other is scaled.
        dtype: of the view; float32 for whole numbers and the image's own otherwise.

    Returns:
        (B, C, h, w), differentiable in a floating-point image.

    Raises:
        TypeError: an image of a dtype that does not fit, a `dtype` that is not floating point.
        ValueError: an image that is not (B, C, H, W), whose channels seem to come last, or that is empty; a size
            that is not positive or larger than the image; a mean or std of the wrong length or a std that is not
            positive.

    Source: paper, eq. 18.
    """
    check_image(image)
    height, width = check_pair("size", size)
    if height > image.shape[2] or width > image.shape[3]:
        raise ValueError(
            f"size {(height, width)} is larger than the image, {tuple(image.shape[2:])}; "
            "a view has at most the image's resolution"
        )
    if torch.jit.is_tracing() and (image.shape[2] % height or image.shape[3] % width):
        check_not_to_onnx(f"a view of {(height, width)} pixels, which do not divide the image's,")
    means, stds = check_normalisation(mean, std, image)
    out_dtype = output_dtype(image, dtype)
    learns = image.requires_grad and torch.is_grad_enabled()
    backend = "reference" if is_transformed() else backend_for(image)
    if backend == "triton":
        launch = _AreaDownsample.apply if learns else _launch
        return launch(image, (height, width), means, stds, out_dtype)
    if backend == "cpu" and not learns:
        if torch.compiler.is_compiling():
            return _opaque_area_downsample(image, [height, width], means, stds, out_dtype)
        view = area_downsample_cpu(image, (height, width), means=means, stds=stds, dtype=out_dtype)
    else:
        view = area_downsample_ref(image, (height, width), means=means, stds=stds, dtype=out_dtype)
    warn_of_bytes(image, means, stds, view)
    return view
