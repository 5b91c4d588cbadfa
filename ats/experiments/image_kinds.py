"""Whether an image is of the kind that a model is of: its bands, its numbers and their unit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ats.sources import ImageSource
from ats.sources.plain import PlainSource

_FAR = 10.0  # standard deviations from the mean within which half of the numbers of data in one unit are
_BOX = 32  # pixels a side of what is looked at, at three places along each side


class Strange(NamedTuple):
    """What may not be meant about an image: its kind, which others may share, and a text about this one."""

    kind: str
    text: str


def is_picture(source: ImageSource) -> bool:
    """Whether a source is a photograph or drawing, of which grey and colours are two ways to show the same.

    Of rasters and arrays each band is a quantity of its own.
    """
    return source.dtype == torch.uint8 and isinstance(source, PlainSource) and source.channels in (1, 3)


def dtype_name(source: ImageSource) -> str:
    """The name of what a source holds, e.g. "uint8"."""
    return str(source.dtype).removeprefix("torch.")


def check_kind(where: str, source: ImageSource, channels: int, dtype: str, *, like: str, to_grey: bool = False) -> None:
    """Raise where an image has other bands or numbers than it must.

    Args:
        where: what the message calls the image.
        source: the image.
        channels: that it must have. A grey picture may stand for one in colours.
        dtype: of its numbers; "" where that is not known.
        like: whose channels and numbers these are.
        to_grey: a picture in colours may stand for a grey one.

    Raises:
        ValueError: it has others.
    """
    found, held = source.channels, dtype_name(source)
    if dtype and held != dtype:
        raise ValueError(f"{where} holds {held}, expected {dtype} as {like}: convert it to the same numbers and unit")
    shown = is_picture(source) and (found, channels) in ((1, 3), (3, 1) if to_grey else (1, 3))
    if found != channels and not shown:
        one = "; one band of a raster is no picture in grey" if (found, channels) == (1, 3) else ""
        raise ValueError(
            f"{where} has {counted(found, 'channel')}, expected {channels} as {like}{one}: take an image of the same "
            "bands, or convert it"
        )


def other_unit(source: ImageSource, mean: Sequence[float], std: Sequence[float]) -> Strange | None:
    """What is strange about an image of numbers that are no bytes, by nine boxes of it; None: nothing.

    It is strange where half of its numbers lie more than ten standard deviations from what a model knows.
    """
    if source.dtype == torch.uint8 or len(mean) != source.channels:
        return None
    full, boxes = source.levels[0], []
    height, width = min(_BOX, full.height), min(_BOX, full.width)
    for row in range(3):
        for column in range(3):
            top, left = row * (full.height - height) // 2, column * (full.width - width) // 2
            boxes.append(source.read(0, top, left, height, width).double().flatten(1))
    values = torch.cat(boxes, 1)  # (C, n)
    centre, spread = (values.new_tensor(list(numbers)).unsqueeze(1) for numbers in (mean, std))
    far = ((values - centre) / spread).abs().nanmedian(1).values
    worst = int(far.nan_to_num(0.0).argmax())
    if not float(far[worst]) > _FAR:
        return None
    return Strange(
        "unit",
        f"half of the numbers of band {worst} lie {float(far[worst]):.0f} standard deviations or more from the mean "
        f"that the model knows, {mean[worst]:g} ± {std[worst]:g}; their median is "
        f"{float(values[worst].nanmedian()):g}: are they in another unit?",
    )


def counted(count: int, what: str) -> str:
    """A number of things in words: "1 image", "2 images"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
