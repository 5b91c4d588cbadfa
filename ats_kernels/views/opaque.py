"""The kernels' launches as operators that `torch.compile` does not look into.

Launchers choose tiles by the numbers of a shape, which a compiler that traces sizes as symbols does not have.
"""

import torch
from torch import Tensor

from ats_kernels.checks import is_channels_last
from ats_kernels.views.triton import area_downsample_backward_triton, area_downsample_triton


@torch.library.custom_op(
    "ats_kernels::area_downsample",
    mutates_args=(),
    schema="(Tensor image, SymInt[] size, float[]? means, float[]? stds, ScalarType dtype) -> Tensor",
)
def downsample(
    image: Tensor, size: list[int], means: list[float] | None, stds: list[float] | None, dtype: torch.dtype
) -> Tensor:
    """`area_downsample_triton`."""
    return area_downsample_triton(image.detach(), (size[0], size[1]), means=means, stds=stds, dtype=dtype)


@downsample.register_fake
def _(
    image: Tensor, size: list[int], means: list[float] | None, stds: list[float] | None, dtype: torch.dtype
) -> Tensor:
    memory_format = torch.channels_last if is_channels_last(image) else torch.contiguous_format
    shape = (*image.shape[:2], *size)
    return torch.empty(shape, dtype=dtype, device=image.device, memory_format=memory_format)


@torch.library.custom_op(
    "ats_kernels::area_downsample_backward",
    mutates_args=(),
    schema="(Tensor grad_out, SymInt[] shape, ScalarType dtype, bool channels_last, float[]? stds) -> Tensor",
)
def spread(
    grad_out: Tensor, shape: list[int], dtype: torch.dtype, channels_last: bool, stds: list[float] | None
) -> Tensor:
    """`area_downsample_backward_triton`."""
    grad_image = _empty(grad_out, shape, dtype, channels_last)
    area_downsample_backward_triton(grad_out, grad_image, stds=stds)
    return grad_image


@spread.register_fake
def _(grad_out: Tensor, shape: list[int], dtype: torch.dtype, channels_last: bool, stds: list[float] | None) -> Tensor:
    return _empty(grad_out, shape, dtype, channels_last)


def _empty(grad_out: Tensor, shape: list[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=grad_out.device, memory_format=memory_format)
