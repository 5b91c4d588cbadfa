"""Limits drawn into photographs of streets, of which small data sets show too few to learn to read.

Unlike the signs of `ats.datasets.painting`, which are all that a synthetic street has to offer, these have the digits,
wear, light and blur of the photographs' own as far as that can be done without looking at any. Pillow draws.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ats.datasets.image_files import pillow
from ats.datasets.speed_limits import SOURCES

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[float, float, float]

SIDES = 16, 110
"""Pixels from edge to edge, the least and the most; their logarithms are alike probable."""
MOST = 8
"""Signs that an image gets at most, all of one limit: many are easily found while attention knows little, one is what
photographs have."""
_WHITE, _YELLOW = (228.0, 228.0, 228.0), (228.0, 190.0, 60.0)

_FINE = 100  # pixels: signs are drawn two to four times as large as they come out, the small ones more


def within(source: str) -> Colour:
    """The colour within the ring, of a data set's source: Swedish signs are yellow."""
    return _YELLOW if source.endswith(SOURCES["swedish"]) else _WHITE


@dataclass(frozen=True)
class Look:
    """How a sign is drawn: lengths as shares of its diameter, colours in 0 to 255."""

    red: Colour
    within: Colour
    black: Colour
    rim: float
    ring: float
    digits: float
    narrow: float  # a digit's width over what the font has
    bold: float
    degrees: float
    width: float  # seen from the side
    blur: float  # pixels
    noise: float


def draw_look(random: np.random.Generator, side: int, inner: Colour) -> Look:
    """A look by chance: faded or fresh, lit or in the shade, sharp or not."""
    light, grey = random.uniform(0.35, 1.05), random.uniform(10, 60)
    red = light * np.array([random.uniform(150, 215), random.uniform(25, 75), random.uniform(25, 80)])
    paper = light * (np.array(inner) + random.uniform(-22, 22) + random.uniform(-14, 14, 3))
    return Look(
        red=_colour(red),
        within=_colour(paper),
        black=_colour(light * np.full(3, grey)),
        rim=random.uniform(0, 0.03),
        ring=random.uniform(0.1, 0.16),
        digits=random.uniform(0.48, 0.6),
        narrow=random.uniform(0.78, 1),
        bold=random.uniform(0, 0.02),
        degrees=random.uniform(-6, 6),
        width=random.uniform(0.8, 1),
        blur=random.uniform(0.2, 0.2 + side / 40),
        noise=random.uniform(0, 6),
    )


def draw_sign(side: int, limit: int, look: Look) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """A round sign with a limit in a red ring, (side, width, 4): red, green, blue and how opaque."""
    finer = max(2, min(4, _FINE // side))
    fine = side * finer
    sign = pillow("Image").new("RGBA", (fine, fine), (0, 0, 0, 0))
    draw = pillow("ImageDraw").Draw(sign)
    for inset, colour in ((0.0, look.within), (look.rim, look.red), (look.ring, look.within)):
        draw.ellipse(
            (inset * fine, inset * fine, fine - 1 - inset * fine, fine - 1 - inset * fine), fill=_opaque(colour)
        )
    sign.paste(_opaque(look.black), (0, 0, fine, fine), _digits(fine, str(limit), look))
    sign = sign.rotate(look.degrees, pillow("Image").Resampling.BILINEAR)
    sign = sign.filter(pillow("ImageFilter").GaussianBlur(finer * look.blur))
    return np.asarray(sign.resize((max(4, round(side * look.width)), side), pillow("Image").Resampling.BOX))


def put_limit(
    image: Tensor, random: np.random.Generator, limit: int, inner: Colour, *, off_centre: int | None = None
) -> Tensor:
    """A copy of an image (3, H, W) uint8 that shows a limit somewhere.

    Args:
        image: photograph.
        random: decides place, size and look.
        limit: km/h.
        inner: colour within the ring, see `within`.
        off_centre: pixels, at most, from the middle of the image to that of the sign along both axes; by default it may
            be anywhere.

    Raises:
        ValueError: the image is smaller than the largest sign.
    """
    height, width = image.shape[-2:]
    if min(height, width) < SIDES[1]:
        raise ValueError(f"an image of {height}×{width} pixels has no place for signs of up to {SIDES[1]}")
    side = round(math.exp(random.uniform(*np.log(SIDES))))
    look = draw_look(random, side, inner)
    sign = draw_sign(side, limit, look)
    free = np.array([height - side, width - sign.shape[1]])
    low, high = np.zeros(2, int), free
    if off_centre is not None:
        low, high = (np.clip(free // 2 + by, 0, free) for by in (-off_centre, off_centre))
    top, left = random.integers(low, high, endpoint=True).tolist()
    image = image.clone()
    place = image[:, top : top + side, left : left + sign.shape[1]]
    pixels = torch.from_numpy(sign[..., :3] + look.noise * random.standard_normal((side, sign.shape[1], 3)))
    opaque = torch.from_numpy(sign[..., 3:] / 255.0)
    seen = pixels * opaque + place.movedim(0, -1).cpu() * (1 - opaque)
    place.copy_(seen.add_(0.5).clamp_(0, 255).to(torch.uint8).movedim(-1, 0))
    return image


def _digits(fine: int, text: str, look: Look) -> "Image":
    """Where the digits are, (fine, fine), grey."""
    size = fine * look.digits * (1 if len(text) < 3 else 0.78)
    layer = pillow("Image").new("L", (fine, fine), 0)
    font = pillow("ImageFont").load_default(size)
    bold = int(fine * look.bold)
    middle = (fine / 2, fine / 2)
    pillow("ImageDraw").Draw(layer).text(middle, text, 255, font, "mm", stroke_width=bold, stroke_fill=255)
    narrow = layer.resize((max(1, round(fine * look.narrow)), fine))
    layer.paste(0, (0, 0, fine, fine))
    layer.paste(narrow, ((fine - narrow.width) // 2, 0))
    return layer


def _colour(values: "np.ndarray[Any, np.dtype[np.float64]]") -> Colour:
    red, green, blue = values.clip(0, 255).tolist()
    return red, green, blue


def _opaque(colour: Colour) -> tuple[int, int, int, int]:
    red, green, blue = (round(value) for value in colour)
    return red, green, blue, 255
