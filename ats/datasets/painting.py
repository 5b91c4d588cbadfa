"""Drawing tissue and streets for synthetic data sets: crude, but the same task at the same scales as the photographs.

What the low-resolution view shows says where to look, what the label is shows at full resolution only. Every random
choice is one of `Integers`; Pillow draws.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ats.datasets.image_files import pillow
from ats.datasets.integers import Integers

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom, as Pillow has them

_FINER = 4  # edges are drawn this much larger and averaged, so that they are soft

# Half axes in pixels, colour of the rim, colour within. Epithelial nuclei have a dark rim and speckles around a pale
# middle. Other nuclei have the same outline and, seen from afar, about the same colour, but are even.
_NUCLEI: dict[str, tuple[tuple[int, int], Colour, Colour]] = {
    "epithelial": ((9, 7), (72, 38, 122), (166, 128, 196)),
    "fibroblast": ((11, 3), (118, 70, 142), (126, 78, 150)),
    "inflammatory": ((4, 4), (58, 34, 96), (64, 38, 104)),
    "others": ((9, 7), (121, 84, 160), (119, 82, 158)),
}
NUCLEUS_MARGIN = 12  # pixels between the centre of a nucleus and the image's edge

# Segments of a digit: a top, b and c right, d bottom, e and f left, g middle.
_SEGMENTS = {
    "a": (0, 0, 2, 0), "b": (2, 0, 2, 2), "c": (2, 2, 2, 4), "d": (0, 4, 2, 4),
    "e": (0, 2, 0, 4), "f": (0, 0, 0, 2), "g": (0, 2, 2, 2),
}  # fmt: skip
_DIGITS = {
    "0": "abcdef", "1": "bc", "2": "abged", "3": "abgcd", "4": "fgbc",
    "5": "afgcd", "6": "afgedc", "7": "abc", "8": "abcdefg", "9": "abcdfg",
}  # fmt: skip

WHITE: Colour = (236, 236, 232)
YELLOW: Colour = (238, 200, 60)
_RED: Colour = (186, 28, 34)
_BLUE: Colour = (36, 70, 160)
_BLACK: Colour = (24, 24, 26)
OTHER_SIGNS = ("triangle", "disc", "diamond")


def tissue(random: Integers, size: int) -> "Image":
    """Pink background of uneven stain with paler holes, (size, size)."""
    patches = _clouds(random, (size, size), 25).astype(np.int64)
    holes = _clouds(random, (size, size), 60) > 175
    base = np.array([222, 176, 212], np.int32) + (patches[..., None] - 128) * np.array([1, 2, 1], np.int32) // 6
    return pillow("Image").fromarray(np.where(holes[..., None], [242, 236, 242], base).clip(0, 255).astype(np.uint8))


def islands(random: Integers, size: tuple[int, int]) -> "tuple[Image, np.ndarray[Any, np.dtype[np.bool_]]]":
    """Tissue of `size` (height, width) that bright background parts, and where it is, (height, width)."""
    side = max(size)
    pixels = np.asarray(tissue(random, side))[: size[0], : size[1]]
    shore = _clouds(random, size, 400).astype(np.int16) * 3 + _clouds(random, size, 30)
    inside = shore > 400
    background = np.array([244, 243, 245], np.uint8)
    return pillow("Image").fromarray(np.where(inside[..., None], pixels, background)), inside


def draw_nucleus(image: "Image", random: Integers, kind: str, x: int, y: int) -> None:
    """A nucleus of a kind, turned at random, centred at x, y."""
    (long, short), rim, within = _NUCLEI[kind]
    long, short = long + random.between(-1, 1), short + random.between(-1, 1)
    angle = math.pi * random.below(180) / 180
    shade = random.between(-12, 12)
    rim, within = _shaded(rim, shade), _shaded(within, shade)
    with _finer(image, (x - 14, y - 14, x + 14, y + 14)) as (draw, middle):
        draw.polygon(_ellipse(middle, long * _FINER, short * _FINER, angle), fill=rim)
        draw.polygon(_ellipse(middle, (long - 2) * _FINER, max(1, short - 2) * _FINER, angle), fill=within)
        if kind == "epithelial":
            for _ in range(3):
                spot = middle + random.between(-4, 4) * _FINER, middle + random.between(-3, 3) * _FINER
                draw.ellipse((spot[0] - 5, spot[1] - 5, spot[0] + 5, spot[1] + 5), fill=rim)


def street(random: Integers, size: tuple[int, int]) -> "Image":
    """Sky, trees, houses and a road, of `size` (height, width)."""
    height, width = size
    horizon = height * random.between(45, 55) // 100
    rows = np.arange(horizon, dtype=np.int16)[:, None, None]
    foliage = (_clouds(random, size, 8).astype(np.int16) + _clouds(random, size, 70))[..., None]
    sky = np.array([176, 198, 224], np.int16) + rows // 16
    trees = np.array([30, 52, 20], np.int16) + foliage[:horizon] * np.array([4, 5, 3], np.int16) // 16
    ground = np.array([70, 84, 50], np.int16) + foliage[horizon:] * np.array([3, 3, 2], np.int16) // 16
    treetops = horizon - _clouds(random, (1, width), 40).astype(np.int32)[..., None] * height // 700
    pixels = np.concatenate([np.where(rows < treetops, sky, trees), ground])
    image: Image = pillow("Image").fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = pillow("ImageDraw").Draw(image)
    for _ in range(random.between(0, 3)):
        left, wide = random.below(width), random.between(width // 20, width // 8)
        shade = random.between(-30, 30)
        draw.rectangle((left, horizon - wide * 3 // 4, left + wide, horizon), fill=_shaded((150, 110, 96), shade))
        draw.polygon(
            [
                (left, horizon - wide * 3 // 4),
                (left + wide // 2, horizon - wide),
                (left + wide, horizon - wide * 3 // 4),
            ],
            fill=_shaded((134, 62, 50), shade),
        )
    vanishing = width * random.between(40, 60) // 100
    draw.polygon([(vanishing - 4, horizon), (vanishing + 4, horizon), (width, height), (0, height)], fill=(96, 96, 100))
    draw.polygon([(vanishing, horizon), (width // 2 + 8, height), (width // 2 - 8, height)], fill=(206, 206, 204))
    return image


def draw_limit(image: "Image", box: Box, limit: int, *, inside: Colour = WHITE) -> None:
    """A round sign with a red ring and a limit in black digits, filling a square box, on a pole."""
    _draw_pole(image, box)
    with _finer(image, box) as (draw, middle):
        draw.ellipse((0, 0, 2 * middle, 2 * middle), fill=_RED)
        ring = middle * 2 // 7
        draw.ellipse((ring, ring, 2 * middle - ring, 2 * middle - ring), fill=inside)
        text = str(limit)
        half = middle * 2 // 5  # a digit is 2 units wide and 4 units high, and 1 from the next
        unit = half / 2 if len(text) < 3 else half / 3
        left = middle - unit * (3 * len(text) - 1) / 2
        for digit in text:
            for segment in _DIGITS[digit]:
                x0, y0, x1, y1 = _SEGMENTS[segment]
                ends = (left + x0 * unit, middle + (y0 - 2) * unit, left + x1 * unit, middle + (y1 - 2) * unit)
                draw.line(ends, fill=_BLACK, width=max(2, round(unit * 0.7)))
            left += 3 * unit


def draw_other_sign(image: "Image", box: Box, kind: str) -> None:
    """A sign that is no limit, one of `OTHER_SIGNS`, filling a square box, on a pole."""
    _draw_pole(image, box)
    with _finer(image, box) as (draw, middle):
        side = 2 * middle
        if kind == "triangle":
            draw.polygon([(middle, 0), (side, side), (0, side)], fill=_RED)
            draw.polygon([(middle, middle // 2), (side - middle // 3, side - 6), (middle // 3, side - 6)], fill=WHITE)
            draw.line((middle, middle, middle, side * 5 // 6), fill=_BLACK, width=max(2, middle // 5))
        elif kind == "disc":
            draw.ellipse((0, 0, side, side), fill=_BLUE)
            draw.line((middle // 2, middle // 2, side * 3 // 4, side * 3 // 4), fill=WHITE, width=max(2, middle // 4))
        else:
            draw.polygon([(middle, 0), (side, middle), (middle, side), (0, middle)], fill=WHITE)
            rest = middle // 3
            inner = [(middle, rest), (side - rest, middle), (middle, side - rest), (rest, middle)]
            draw.polygon(inner, fill=YELLOW)


def blur(image: "Image", box: Box) -> None:
    """Smear a box, so that what is there cannot be read."""
    part = image.crop(box).filter(pillow("ImageFilter").GaussianBlur((box[2] - box[0]) / 6))
    image.paste(part, box[:2])


def with_noise(image: "Image", random: Integers, strength: int = 8) -> "Image":
    """A copy with each value off by at most `strength`, as a camera's sensor has it."""
    pixels = np.asarray(image).astype(np.int16)
    noise = random.bytes(pixels.size).reshape(pixels.shape) % (2 * strength + 1)
    return pillow("Image").fromarray((pixels + noise - strength).clip(0, 255).astype(np.uint8))


def _draw_pole(image: "Image", box: Box) -> None:
    left, _, right, bottom = box
    middle, side = (left + right) // 2, right - left
    pillow("ImageDraw").Draw(image).rectangle((middle - side // 16, bottom - 2, middle + side // 16, bottom + side * 2),
                                            fill=(120, 120, 122))  # fmt: skip


@contextmanager
def _finer(image: "Image", box: Box) -> Iterator[tuple[Any, int]]:
    """Draw on an enlarged copy of a square box: yields what to draw with, and the coordinate of its middle."""
    resampling = pillow("Image").Resampling
    side = box[2] - box[0]
    large = image.crop(box).resize((side * _FINER, side * _FINER), resampling.NEAREST)
    yield pillow("ImageDraw").Draw(large), side * _FINER // 2
    image.paste(large.reduce(_FINER), box[:2])


def _ellipse(middle: int, long: int, short: int, angle: float) -> list[tuple[float, float]]:
    turns = [math.tau * step / 24 for step in range(24)]
    return [
        (
            middle + long * math.cos(turn) * math.cos(angle) - short * math.sin(turn) * math.sin(angle),
            middle + long * math.cos(turn) * math.sin(angle) + short * math.sin(turn) * math.cos(angle),
        )
        for turn in turns
    ]


def _shaded(colour: Colour, by: int) -> Colour:
    red, green, blue = (max(0, min(255, value + by)) for value in colour)
    return red, green, blue


def _clouds(random: Integers, size: tuple[int, int], grain: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Smooth noise (height, width), 0 to 255, that varies over `grain` pixels."""
    height, width = size
    coarse = random.bytes((height // grain + 2) * (width // grain + 2)).reshape(height // grain + 2, width // grain + 2)
    image = pillow("Image").fromarray(coarse).resize((width, height), pillow("Image").Resampling.BICUBIC)
    return np.asarray(image)
