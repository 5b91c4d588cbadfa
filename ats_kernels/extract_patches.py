"""Cut patches out of full-resolution images.

``patches[b, n, c, y, x] = image[b, c, offsets[b, n, 0] + y, offsets[b, n, 1] + x]``: T(x, i) of the paper
(eq. 3). Only the patches are read. A patch may lie partly or wholly outside its image: there it reads zeros,
put in after normalisation, or the nearest pixel.
"""

import torch
from torch import Tensor

from ats_kernels._checks import (
    Normalisation,
    check_choice,
    check_image,
    check_normalisation,
    check_pair,
    check_tensor,
    compute_dtype,
    normalise,
    output_dtype,
)

PADDINGS = ("zeros", "edge")


def extract_patches_ref(
    image: Tensor,  # (B, C, H, W)
    offsets: Tensor,  # (B, N, 2)
    patch_size: tuple[int, int],
    *,
    padding: str = "zeros",
    means: list[float] | None = None,
    stds: list[float] | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain PyTorch, differentiable in a floating-point image. Arguments as `extract_patches` passes."""
    batch, _, height, width = image.shape
    rows = offsets[..., 0, None] + torch.arange(patch_size[0], device=offsets.device)  # (B, N, ph)
    columns = offsets[..., 1, None] + torch.arange(patch_size[1], device=offsets.device)  # (B, N, pw)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(-1) & ((columns >= 0) & (columns < width)).unsqueeze(-2)
    which = torch.arange(batch, device=offsets.device).view(-1, 1, 1, 1)
    # Indexing around the channels puts them last: (B, N, ph, pw, C).
    pixels = image[which, :, rows.clamp(0, height - 1).unsqueeze(-1), columns.clamp(0, width - 1).unsqueeze(-2)]
    patches = pixels.movedim(-1, 2).to(compute_dtype(image.dtype, dtype))  # (B, N, C, ph, pw)
    patches = normalise(patches, means, stds, channel_dim=2, is_byte=image.dtype == torch.uint8)
    if padding == "zeros":
        patches = patches.masked_fill(~inside.unsqueeze(2), 0.0)
    return patches.to(dtype).contiguous()


def extract_patches(
    image: Tensor,
    offsets: Tensor,
    patch_size: int | tuple[int, int],
    *,
    padding: str = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cut N patches out of each image.

    Args:
        image: (B, C, H, W) uint8, float16, bfloat16, float32 or float64, any strides.
        offsets: (B, N, 2) int32 or int64, top-left pixels (y, x); they may lie outside the image.
        patch_size: pixels, an int or (ph, pw).
        padding: what is read outside: "zeros", after normalisation, or "edge", the nearest pixel.
        mean, std: a float, or one a channel: patches are (x − mean) / std, of x / 255 for a uint8 image.
        dtype: of the patches; float32 for uint8 images and the image's own otherwise.

    Returns:
        (B, N, C, ph, pw) patches, differentiable in a floating-point image.

    Raises:
        TypeError: an image or offsets of a dtype that does not fit, a `dtype` that is not floating point.
        ValueError: a wrong rank, batches that differ, an empty image, patch_size < 1, unknown padding, a mean
            or std of the wrong length or a std that is not positive, tensors on different devices.

    Source: paper, eq. 3.
    """
    check_image(image)
    check_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets must be int32 or int64, got {offsets.dtype}; round and convert with offsets.long()")
    if offsets.ndim != 3 or offsets.shape[2] != 2:
        raise ValueError(f"offsets must be (B, N, 2), pairs (y, x), got {tuple(offsets.shape)}")
    if offsets.shape[0] != image.shape[0]:
        raise ValueError(f"image has batch size {image.shape[0]} but offsets have {offsets.shape[0]}; they must agree")
    if offsets.device != image.device:
        raise ValueError(f"image is on {image.device} but offsets are on {offsets.device}; move one to the other")
    check_choice("padding", padding, PADDINGS)
    means, stds = check_normalisation(mean, std, image.shape[1])
    return extract_patches_ref(
        image,
        offsets.long(),
        check_pair("patch_size", patch_size),
        padding=padding,
        means=means,
        stds=stds,
        dtype=output_dtype(image, dtype),
    )
