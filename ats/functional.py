"""Attention sampling as functions: draw cells of an attention map, read their patches, pool their features."""

from dataclasses import dataclass

import torch
from torch import Tensor

import ats_kernels
from ats.grid import cell_offsets
from ats_kernels import area_downsample, estimator_weights, expectation
from ats_kernels.checks import Normalisation, check_count, check_floating, check_image, check_pair, check_tensor

__all__ = ["PatchSample", "area_downsample", "estimator_weights", "expectation", "extract_cells", "sample_patches"]


@dataclass(frozen=True)
class PatchSample:
    """Patches drawn from B images, N from each, in draw order.

    Attributes:
        patches: (B, N, C, ph, pw) read from the full-resolution images, normalised.
        log_attention: (B, N) log probability of each patch's cell under the attention; differentiable.
        indices: (B, N) int64, flat cells of the row-major attention grid.
        offsets: (B, N, 2) int64, top-left pixels (y, x); may lie outside the image.
        logsumexp: (B,) of the logits.
        entropy: (B,) of the attention, nats; differentiable.
    """

    patches: Tensor
    log_attention: Tensor
    indices: Tensor
    offsets: Tensor
    logsumexp: Tensor
    entropy: Tensor


def sample_patches(
    image: Tensor,
    logits: Tensor,
    n_patches: int,
    patch_size: int | tuple[int, int],
    *,
    replace: bool = False,
    method: str = "sample",
    receptive_field: int = 0,
    view_size: tuple[int, int] | None = None,
    padding: str = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    validate: bool | None = None,
) -> PatchSample:
    """Draw patches where the attention is, and read only those from the full-resolution images.

    Args:
        image: (B, C, H, W) uint8, float16, bfloat16, float32 or float64, any strides; on the logits' device, or
            on the CPU (pinned for speed) while the logits are on a GPU.
        logits: (B, gh, gw) or (B, 1, gh, gw), unnormalised log attention; −inf masks a cell.
        n_patches: patches an image.
        patch_size: pixels, an int or (ph, pw).
        replace: draw with replacement.
        method: "sample", or "topk": the most probable cells, no randomness.
        receptive_field: view pixels that an unpadded attention network loses along an axis
            (`ats.receptive_field` works it out).
        view_size: pixels (h, w) of the view the logits came from; needed only with a receptive_field.
        padding: what is read outside an image: "zeros" or "edge", the nearest pixel.
        mean, std: a float, or one a channel: patches are (x − mean) / std. A uint8 image is scaled by 1/255 before,
            so that its mean and std are those of values in [0, 1].
        dtype: of the patches; float32 for uint8 images and the image's own otherwise.
        generator: random numbers on the logits' device. Seed data-parallel ranks differently.
        validate: look at the logits' values, which makes the host wait for a GPU. None: on the CPU only.

    Returns:
        `PatchSample`. Without validation, an image whose attention cannot be drawn from comes back with index −1
        and NaN log_attention, which makes everything pooled with it NaN.

    Raises:
        TypeError: logits that are not floating point; an image, `dtype` or `generator` that does not fit.
        ValueError: wrong ranks, channels that seem to come last, batches that differ, more patches than cells that
            can be drawn, NaN or +inf logits, a row with every cell masked, unknown options, sizes that do not fit.

    Source: paper, section 3; the cell-to-pixel map is described in `ats.grid`.
    """
    check_image(image)
    grid = _check_grid(image, logits)
    n_patches = check_count("n_patches", n_patches)
    patch = check_pair("patch_size", patch_size)
    view = check_view_size(view_size, receptive_field, (image.shape[2], image.shape[3]))
    draw = ats_kernels.sample(
        logits.flatten(1), n_patches, replace=replace, method=method, generator=generator, validate=validate
    )
    patches, offsets = extract_cells(
        image,
        draw.indices,
        grid,
        patch,
        view_size=view,
        receptive_field=receptive_field,
        padding=padding,
        mean=mean,
        std=std,
        dtype=dtype,
    )
    return PatchSample(
        patches=patches,
        log_attention=draw.log_attention,
        indices=draw.indices,
        offsets=offsets,
        logsumexp=draw.logsumexp,
        entropy=draw.entropy,
    )


def extract_cells(
    image: Tensor,
    indices: Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    view_size: tuple[int, int] | None = None,
    receptive_field: int = 0,
    padding: str = "zeros",
    mean: Normalisation = None,
    std: Normalisation = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the patches of given cells, indices (B, N): patches (B, N, C, ph, pw) and their offsets (B, N, 2).

    The arguments are those of `sample_patches`. Patches come out on the indices' device.
    """
    offsets = cell_offsets(
        indices,
        grid_size,
        (image.shape[2], image.shape[3]),
        patch_size,
        view_size=view_size,
        receptive_field=receptive_field,
    )
    patches = ats_kernels.extract_patches(image, offsets, patch_size, padding=padding, mean=mean, std=std, dtype=dtype)
    return patches, offsets


def _check_grid(image: Tensor, logits: Tensor) -> tuple[int, int]:
    check_tensor("logits", logits)
    unfit = logits.ndim == 4 and (logits.shape[1] != 1 or not logits.is_floating_point())
    if unfit and logits.shape[2] > image.shape[2] and logits.shape[3] > image.shape[3]:
        raise ValueError(
            f"logits {tuple(logits.shape)} of {logits.dtype} are larger than the image, {tuple(image.shape)}: "
            "are the two swapped? The image comes first"
        )
    check_floating("logits", logits)
    if logits.ndim not in (3, 4) or (logits.ndim == 4 and logits.shape[1] != 1):
        raise ValueError(f"logits must be (B, gh, gw) or (B, 1, gh, gw), got {tuple(logits.shape)}")
    if logits.shape[0] != image.shape[0]:
        raise ValueError(f"image has batch size {image.shape[0]} but logits have {logits.shape[0]}; they must agree")
    if image.device != logits.device and image.device.type != "cpu":
        raise ValueError(
            f"image is on {image.device} but logits are on {logits.device}; move the image there, or leave it on "
            "the CPU, from where only the patches are copied"
        )
    return logits.shape[-2], logits.shape[-1]


def check_view(view: Tensor, image: Tensor, receptive_field: int) -> None:
    """Raise unless `view` (B, C, h, w) can be the view of `image` (B, C, H, W), e.g. where the two are swapped."""
    check_image(image)
    check_tensor("view", view)
    check_view_size((view.shape[-2], view.shape[-1]), receptive_field, (image.shape[2], image.shape[3]))


def check_view_size(
    view_size: tuple[int, int] | None, receptive_field: int, image_size: tuple[int, int]
) -> tuple[int, int] | None:
    """Return the view's size as a pair, or raise where it is missing or fits neither image nor receptive field."""
    if isinstance(receptive_field, bool) or not isinstance(receptive_field, int) or receptive_field < 0:
        raise ValueError(f"receptive_field must be an int of at least 0 view pixels, got {receptive_field!r}")
    if view_size is None:
        if receptive_field:
            raise ValueError(
                f"receptive_field={receptive_field} is in pixels of the view: pass view_size=(h, w) as well"
            )
        return None
    height, width = check_pair("view_size", view_size)
    if height > image_size[0] or width > image_size[1]:
        raise ValueError(
            f"view_size {(height, width)} is larger than the image, {image_size}; the view is the image shrunk: "
            "are the two swapped?"
        )
    if receptive_field >= min(height, width):
        raise ValueError(
            f"receptive_field={receptive_field} leaves nothing of a view of {(height, width)}; "
            "it is the view pixels lost along an axis"
        )
    return height, width
