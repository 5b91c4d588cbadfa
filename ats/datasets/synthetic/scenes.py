"""What the images of synthetic data sets show, and where."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ats.datasets import painting
from ats.datasets.colon_cancer import NUCLEI
from ats.datasets.integers import Integers

if TYPE_CHECKING:
    from PIL.Image import Image

OTHERS_SHARE = 8  # one frame more, with other signs only, for so many with a label

_PIXELS_A_NUCLEUS = 1250  # as in the release: some 200 in 500×500
_DENSER = 4  # nuclei of a biopsy, whose kinds lie over each other
_NUCLEUS_DISTANCE = 20  # pixels between centres
_SWEDISH_OTHERS = {
    "triangle": "WARNING, OTHER",
    "disc": "MANDATORY, PASS_RIGHT_SIDE",
    "diamond": "INFORMATION, PRIORITY_ROAD",
}


@dataclass(frozen=True)
class Shown:
    """What a frame is to show: a limit, or another sign, or neither."""

    limit: int | None = None
    blurred: bool = False
    other: bool = False


@dataclass(frozen=True)
class DrawnSign:
    """A sign in a street: its box in pixels and its limit in km/h, or which of `painting.OTHER_SIGNS` it is."""

    box: painting.Box
    limit: int | None
    other: str = ""
    blurred: bool = False

    def swedish(self) -> str:
        """As annotations.txt of the Swedish set describes it."""
        left, top, right, bottom = self.box
        kind = _SWEDISH_OTHERS[self.other] if self.limit is None else f"PROHIBITORY, {self.limit}_SIGN"
        visibility = "BLURRED" if self.blurred else "VISIBLE"
        return f"{visibility}, {right:.2f}, {bottom:.2f}, {left:.2f}, {top:.2f}, {kind}"


@dataclass(frozen=True)
class Street:
    """A drawn frame and the signs in it."""

    image: "Image"
    signs: tuple[DrawnSign, ...]


def plan_streets(random: Integers, count: int, limits: Sequence[int], *, blurred: bool = False) -> list[Shown]:
    """What each frame shows: `count` with a label, as many of each class; then those that the loader leaves out.

    Args:
        blurred: whether every other one of these shows a limit that cannot be read, in place of another sign.
    """
    classes = [None, *limits]
    shown = [Shown(limit=classes[index % len(classes)]) for index in range(count)]
    for index in range(count // OTHERS_SHARE):
        blur = blurred and index % 2 == 1
        shown.append(Shown(limit=limits[index % len(limits)], blurred=True) if blur else Shown(other=True))
    return random.shuffled(shown)


def draw_street(
    random: Integers, size: tuple[int, int], shown: Shown, sign_size: tuple[int, int], inside: painting.Colour
) -> Street:
    """A street of `size` (height, width) with signs of `sign_size` (smallest, largest) and limits on `inside`."""
    height, width = size
    image = painting.street(random, size)
    signs = []
    # A limit is often put up on both sides; another sign may stand beside it.
    halves = random.shuffled([0, 1])
    n_signs = 0 if shown.limit is None and not shown.other else 1 + (random.below(3) == 0)
    for order, half in enumerate(halves[:n_signs]):
        side = random.between(*sign_size)
        left = half * width // 2 + random.below(width // 2 - side)
        top = random.between(height // 5, height * 3 // 5 - side)
        box = (left, top, left + side, top + side)
        if shown.limit is not None and (order == 0 or random.below(2)):
            painting.draw_limit(image, box, shown.limit, inside=inside)
            signs.append(DrawnSign(box, shown.limit, blurred=shown.blurred))
        else:
            other = painting.OTHER_SIGNS[random.below(len(painting.OTHER_SIGNS))]
            painting.draw_other_sign(image, box, other)
            signs.append(DrawnSign(box, None, other))
        if shown.blurred:
            painting.blur(image, box)
    return Street(painting.with_noise(image, random), tuple(signs))


def draw_tissue(random: Integers, size: int, positive: bool) -> tuple["Image", dict[str, list[tuple[int, int]]]]:
    """Tissue (size, size), and the centres (x, y) of nuclei by kind; if `positive`, epithelial ones near each other."""
    image = painting.tissue(random, size)
    low, high = painting.NUCLEUS_MARGIN, size - painting.NUCLEUS_MARGIN
    count = max(4, size * size // _PIXELS_A_NUCLEUS)
    glands = random.between(max(1, count // 8), max(2, count // 3)) if positive else 0
    gland, spread = (random.between(low, high), random.between(low, high)), max(32, size // 4)
    places: list[tuple[int, int]] = []
    nuclei: dict[str, list[tuple[int, int]]] = {}
    for index in range(count * 4):
        if len(places) == count:
            break
        in_gland = len(places) < glands and index < count * 2
        if in_gland:
            x, y = (min(high, max(low, at + random.between(-spread, spread))) for at in gland)
        else:
            x, y = random.between(low, high), random.between(low, high)
        if any((x - other[0]) ** 2 + (y - other[1]) ** 2 < _NUCLEUS_DISTANCE**2 for other in places):
            continue
        kind = "epithelial" if in_gland else NUCLEI[1 + random.below(3)]
        places.append((x, y))
        nuclei.setdefault(kind, []).append((x, y))
        painting.draw_nucleus(image, random, kind, x, y)
    return painting.with_noise(image, random), nuclei


def draw_biopsy(random: Integers, size: tuple[int, int]) -> "Image":
    """Islands of tissue with nuclei of the kinds that are not epithelial, on a bright background, (height, width)."""
    image, inside = painting.islands(random, size)
    height, width = size
    for _ in range(height * width * _DENSER // _PIXELS_A_NUCLEUS):
        x = random.between(painting.NUCLEUS_MARGIN, width - painting.NUCLEUS_MARGIN)
        y = random.between(painting.NUCLEUS_MARGIN, height - painting.NUCLEUS_MARGIN)
        kind = NUCLEI[1 + random.below(3)]
        if inside[y, x]:
            painting.draw_nucleus(image, random, kind, x, y)
    return painting.with_noise(image, random, strength=4)
