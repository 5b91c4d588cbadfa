"""Batches whose images differ in size: what may stand where one tensor does, and what is checked of it.

Images are a tensor (B, C, H, W) or a sequence of tensors (C, H, W) and `ImageSource`s, views a tensor (B, C, h, w) or a
sequence of tensors (C, h, w), logits and masks a tensor (B, gh, gw) or a sequence of maps (gh, gw). Maps of different
sizes are padded at the bottom and on the right to a common grid: a cell keeps its row and column. Views are never
padded, which would change what a network sees.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ats.grid import Placement
from ats.sources.image_source import ImageSource
from ats_kernels import advice
from ats_kernels.backend import may_look
from ats_kernels.checks import IMAGE_DTYPES, check_count, check_image, check_pair, check_tensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # of typing from Python 3.13 on

Images = Tensor | Sequence[Tensor | ImageSource]
Views = Tensor | Sequence[Tensor]
Maps = Tensor | Sequence[Tensor]
Size = tuple[int, int]
Sizes = Size | Sequence[Size]
GridSizes = tuple[Size, ...] | None
"""Cells (gh, gw) of each image's own grid; None where all have the common one."""

_OUT_OF_SHAPE = 1.25
"""By what factor the scales of a view's axes differ at least, if it is not merely rounded to a multiple of pixels."""


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether something is given one by one, and not as a tensor of all."""
    return not isinstance(value, Tensor | str | bytes) and isinstance(value, Sequence)


def is_many(sizes: Sizes | None) -> "TypeIs[Sequence[Size]]":
    """Whether sizes are one an image, and not one for all."""
    if sizes is None or not is_sequence(sizes) or not sizes:
        return False
    first: Any = sizes[0]
    if type(first) is int:
        return False
    return is_sequence(first) or (isinstance(first, Tensor | np.ndarray) and first.ndim > 0)


def each_size(name: str, sizes: Sizes, batch: int) -> list[Size]:
    """The size of each image of a batch."""
    if not is_many(sizes):
        return [check_pair(name, sizes)] * batch
    if len(sizes) != batch:
        raise ValueError(f"{name} has {len(sizes)} sizes for {batch} images; give one for all, or one an image")
    return [check_pair(f"{name}[{number}]", size) for number, size in enumerate(sizes)]


def size_of(image: Tensor | ImageSource) -> Size:
    """Pixels (H, W) of one image."""
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.levels[0].height, image.levels[0].width


def sizes_of(images: Images | Views) -> Sizes:
    """Pixels (H, W) of a tensor's images, or of each image of a sequence."""
    return size_of(images) if isinstance(images, Tensor) else tuple(size_of(image) for image in images)


def check_images(images: Images) -> None:
    """Raise unless `images` are a batch that patches can be read from.

    Raises:
        TypeError: what is neither a tensor nor a source, or of a dtype that patches are not read from.
        ValueError: no images, wrong ranks, images that differ in channels or dtype.
    """
    if isinstance(images, Tensor):
        check_image(images)
        return
    if not is_sequence(images):
        if isinstance(images, ImageSource):
            raise TypeError(f"image is a single image source, {images.name}; a batch of it is [image]")
        check_tensor("image", images)
    if images and isinstance(images[0], int | float | list | tuple):  # numbers, which make one tensor
        check_tensor("image", images)
    if not images:
        raise ValueError("image is an empty sequence; give at least one image")
    first, *others = [_kind(image, number) for number, image in enumerate(images)]
    for number, kind in enumerate(others, 1):
        if kind != first:
            raise ValueError(
                f"images of one batch must agree in channels and dtype: image 0 has {first[0]} channels of {first[1]}, "
                f"image {number} {kind[0]} of {kind[1]}; convert one of them, or give them in batches of their own"
            )


def _kind(image: Tensor | ImageSource, number: int) -> tuple[int, torch.dtype]:
    name = f"image[{number}]"
    if isinstance(image, Tensor):
        if image.ndim != 3:
            mend = {4: f"; {name}[0] is the first image of that batch", 2: f"; a grey one is {name}[None]"}
            raise ValueError(
                f"each image of a sequence must be (C, H, W), got {tuple(image.shape)} for {name}"
                + mend.get(image.ndim, "")
            )
        try:
            check_image(image[None])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}, with a batch dimension before: {error}") from None
        return image.shape[0], image.dtype
    _check_source(name, image)
    if image.dtype not in IMAGE_DTYPES:
        raise TypeError(f"{image.name} has dtype {image.dtype}, of which no patches are read; convert it as it is read")
    return image.channels, image.dtype


def _check_source(name: str, image: object) -> None:
    if isinstance(image, ImageSource):
        return
    mend = "; open it with ats.open_image" if isinstance(image, str) or hasattr(image, "__fspath__") else ""
    raise TypeError(
        f"{name} must be a tensor (C, H, W) or an ats.ImageSource, got {type(image).__name__}"
        f"{mend or advice.to_tensor(name, image)}"
    )


def check_view(view: Views, image: Images, receptive_field: int | Placement) -> None:
    """Raise unless `view` can be the views of `image`, e.g. where the two are swapped.

    Views may be rounded or padded to whole cells, or to any multiple, which changes their shape.
    """
    check_images(image)
    if isinstance(view, Tensor) or not is_sequence(view):
        check_tensor("view", view)
        check_view_size(sizes_of(view), receptive_field, sizes_of(image))
        if not isinstance(image, Tensor) and len(view) != len(image):
            raise ValueError(f"there are {len(view)} views but {len(image)} images; give one view an image")
        return
    for number, one in enumerate(view):
        if isinstance(one, ImageSource) and not isinstance(one, Tensor):
            raise TypeError(f"view[{number}] is an image source; read its view: ats.read_view(view[{number}], scale=…)")
        check_tensor(f"view[{number}]", one)
        if one.ndim != 3:
            mend = f"; that of a batch of one is view[{number}][0]" if one.ndim == 4 else ""
            raise ValueError(
                f"each view of a sequence must be (C, h, w), got {tuple(one.shape)} for view[{number}]{mend}"
            )
        kind = one.shape[0], one.dtype, one.device
        if number and kind != (view[0].shape[0], view[0].dtype, view[0].device):
            raise ValueError(
                f"views of one batch must agree in channels, dtype and device: view[0] is {tuple(view[0].shape)} of "
                f"{view[0].dtype} on {view[0].device}, view[{number}] {tuple(one.shape)} of {one.dtype} on {one.device}"
            )
    if len(view) != len(image):
        raise ValueError(f"there are {len(view)} views but {len(image)} images; give one view an image")
    sizes, views = each_size("image_size", sizes_of(image), len(image)), [size_of(one) for one in view]
    check_view_size(views, receptive_field, sizes)
    step = receptive_field.step if isinstance(receptive_field, Placement) else (1, 1)
    _check_order(views, sizes, math.ceil(max(step)))


def _check_order(views: Sequence[Size], images: Sequence[Size], step: int) -> None:
    """Raise where no view that is out of shape has its own image's, but each has another's: they are out of order."""

    def fits(view: Size, image: Size) -> bool:  # one scale for both axes, but for whole steps
        across, down = view[1] * image[0], view[0] * image[1]
        return abs(across - down) <= step * max(image)

    def is_odd(view: Size, image: Size) -> bool:
        across, down = view[1] * image[0], view[0] * image[1]
        return not fits(view, image) and max(across, down) > _OUT_OF_SHAPE * min(across, down)

    odd = [number for number, pair in enumerate(zip(views, images, strict=True)) if is_odd(*pair)]
    owners = {number: next((other for other in odd if fits(views[number], images[other])), None) for number in odd}
    if odd and None not in owners.values():
        number = odd[0]
        raise ValueError(
            f"view[{number}] of {views[number]} has not the shape of its own image, {images[number]}, but that of "
            f"image {owners[number]}: views and images seem to be in different orders; bring them into the same"
        )


def check_view_size(view_size: Sizes | None, receptive_field: int | Placement, image_size: Sizes) -> Sizes | None:
    """Return the views' size, or sizes, or raise where they are missing or fit neither images nor receptive field."""
    if not isinstance(receptive_field, Placement):
        receptive_field = check_count("receptive_field", receptive_field, least=0)
    if view_size is None:
        if receptive_field:
            raise ValueError(
                f"receptive_field={receptive_field} is in pixels of the view: pass view_size=(h, w) as well"
            )
        return None
    if not is_many(view_size) and not is_many(image_size):
        return _check_view_size("", view_size, receptive_field, check_pair("image_size", image_size))
    batch = len(view_size if is_many(view_size) else image_size)
    images = each_size("image_size", image_size, batch)
    views = each_size("view_size", view_size, batch)
    for number, (view, image) in enumerate(zip(views, images, strict=True)):
        _check_view_size(f" of image {number}", view, receptive_field, image)
    return tuple(views) if is_many(view_size) else views[0]


def _check_view_size(of: str, view_size: Sizes, receptive_field: int | Placement, image_size: Size) -> Size:
    height, width = check_pair("view_size", view_size)
    if height > image_size[0] or width > image_size[1]:
        raise ValueError(
            f"view_size {(height, width)}{of} is larger than the image, {image_size}; the view is the image shrunk: "
            "are the two swapped?"
        )
    if isinstance(receptive_field, int) and receptive_field >= min(height, width):
        raise ValueError(
            f"receptive_field={receptive_field} leaves nothing of a view of {(height, width)}{of}; "
            "it is the view pixels lost along an axis"
        )
    return height, width


def pad_logits(logits: Maps) -> tuple[Tensor, GridSizes]:
    """Logits of several grids as one tensor (B, gh, gw), −inf below and to the right of each, and what is whose.

    Args:
        logits: maps (gh, gw) or (1, gh, gw), one an image; a tensor comes back as it is.

    Returns:
        The logits, and each image's own grid; None where all are the same.
    """
    if isinstance(logits, Tensor):
        return logits, None
    if not is_sequence(logits) or not logits or not isinstance(logits[0], Tensor):
        check_tensor("logits", logits)
    maps = []
    for number, one in enumerate(logits):
        check_tensor(f"logits[{number}]", one)
        if one.ndim not in (2, 3) or (one.ndim == 3 and one.shape[0] != 1) or one.numel() == 0:
            raise ValueError(
                f"each image's logits must be (gh, gw) or (1, gh, gw), got {tuple(one.shape)} for logits[{number}]"
            )
        if (one.dtype, one.device) != (logits[0].dtype, logits[0].device):
            raise ValueError(
                f"logits must agree in dtype and device: logits[0] are {logits[0].dtype} on {logits[0].device}, "
                f"logits[{number}] {one.dtype} on {one.device}"
            )
        maps.append(one.reshape(one.shape[-2:]))
    sizes = tuple(size_of(one) for one in maps)
    return pad_maps(maps, _common(sizes), -torch.inf), (sizes if len(set(sizes)) > 1 else None)


def _common(sizes: Sequence[Size]) -> Size:
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def pad_maps(maps: Sequence[Tensor], grid_size: Size, value: float) -> Tensor:
    """Maps (gh, gw) as one tensor of a larger grid, with `value` below and to the right of each."""
    padded = []
    for one in maps:
        below, right = grid_size[0] - one.shape[0], grid_size[1] - one.shape[1]
        padded.append(F.pad(one, (0, right, 0, below), value=value) if below or right else one)
    return torch.stack(padded)


def check_grid_sizes(grid_sizes: Sequence[Size] | None, logits: Tensor) -> GridSizes:
    """Own grids as pairs, or None where all are that of the logits; raise where one is larger."""
    if grid_sizes is None:
        return None
    grid = (logits.shape[-2], logits.shape[-1])
    if not is_many(grid_sizes):
        raise ValueError(f"grid_sizes must be cells (gh, gw) of each image, got {grid_sizes!r}")
    sizes = tuple(each_size("grid_sizes", grid_sizes, len(logits)))
    for number, (height, width) in enumerate(sizes):
        if height > grid[0] or width > grid[1]:
            raise ValueError(f"grid_sizes[{number}] {(height, width)} is larger than the grid of the logits, {grid}")
    return None if all(size == grid for size in sizes) else sizes


def check_not_padded(logits: Tensor, image: Images, view_size: Sizes | None) -> None:
    """Raise where a tensor of logits for views of different sizes looks padded: its own grids would be forgotten."""
    if view_size is None and isinstance(image, Tensor):
        return
    views = sizes_of(image) if view_size is None else view_size
    if not is_many(views) or len(set(map(tuple, views))) < 2 or not may_look(logits):
        return
    dead = logits.detach().isneginf()
    ends = dead.all(-1)[..., -1] | dead.all(-2)[..., -1]
    if ends.any():
        number = int(ends.flatten().nonzero()[0])
        raise ValueError(
            f"the last row or column of logits of image {number} is −inf, as padding is: pass each image's own grid as "
            "well, grid_sizes=sample.grid_sizes, or a list of maps (gh, gw) in place of the tensor"
        )
