"""Small slides with a planted change of stain, cut from a slide of yours or from drawn tissue, and their manifest."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ats._files import write_whole
from ats.datasets.integers import Integers
from ats.datasets.synthetic.folder import integers, new_folder
from ats.datasets.synthetic.pyramid import MULTIPLE, write_pyramid
from ats.datasets.synthetic.scenes import draw_biopsy
from ats.datasets.synthetic.stain import Spot, contrast, is_tissue, nuclei, plant, shade
from ats.sources import open_image

CLASSES = ("negative", "positive")

_DRAWN = (2400, 2400)  # pixels of the tissue that is drawn where no slide is given
_MPP = 0.5  # micrometres a pixel, where the slide does not say
_TRAIN = 55  # percent of the rows from which training slides are cut; test slides come from the others
_SIDES = (640, 1152)
_RADII = (60, 110)
_LARGEST = 1 << 26  # pixels of a slide that is read whole
_CONTRAST = 36  # of 255, by which the kinds of a spot must differ
_TISSUE = 0.3  # share of a slide that is not background, at least
_DENSITY = (45, 128)  # of 255, nucleus in the mean of a spot: enough to be seen, and single ones
_WITHIN = 0.85  # and of a spot
_COLOURS = {"stained": [200, 30, 30], "smeared": [120, 120, 120]}


def write_slides(
    folder: str | os.PathLike[str],
    n_train: int = 160,
    n_test: int = 80,
    *,
    seed: int = 0,
    slide: str | os.PathLike[str] | None = None,
    sides: tuple[int, int] | None = None,
) -> None:
    """Slides of unequal sizes with spots of changed stain: labels.csv, slides/NNNN.tif, spots/NNNN-KIND.geojson.

    Each slide shows one or two brown spots in its tissue. In a positive one the nuclei of the spots are brown, in a
    negative one the spots are smeared (`ats.datasets.synthetic.stain`). Slides are cut at random from one, turned,
    mirrored and shaded: training slides from its upper part, test slides from the rest, so that no pixel is in both.

    Args:
        folder: where to; new or empty.
        n_train, n_test: slides, at least 2 of each; half of them positive.
        seed: of everything random.
        slide: any image of at least 3·sides[0] rows that shows stained tissue on a bright background, e.g. OpenSlide's
            CMU-1-Small-Region.svs; None: tissue that is drawn.
        sides: least and largest side in pixels, multiples of 8; 640 and 1152 where None.

    Raises:
        FileExistsError: the folder is not empty.
        FileNotFoundError: there is no such slide.
        ModuleNotFoundError: tifffile, or the slide's reader, is not installed.
        ValueError: sizes that the data set cannot have, or a slide with too little tissue.
    """
    smallest, largest = sides = sides or _SIDES
    if n_train < 2 or n_test < 2:
        raise ValueError(f"n_train and n_test must be at least 2, a slide of each class, got {n_train} and {n_test}")
    if not 4 * _RADII[1] <= smallest <= largest or smallest % MULTIPLE or largest % MULTIPLE:
        raise ValueError(f"sides must be multiples of {MULTIPLE}, from {4 * _RADII[1]} on and in order, got {sides}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer of 0 to 2⁶⁴ − 1, got {seed}")
    whole, mpp, name = _tissue(slide, seed, sides)
    middle = whole.shape[0] * _TRAIN // 100
    parts = {"train": whole[:middle], "test": whole[middle:]}
    content = f"{n_train} and {n_test} slides, seed {seed}, cut from {name}, with spots planted"
    lines, number = ["path,label,split\n"], 0
    with new_folder(folder, content, real=f"Of {name} is the tissue.") as place:
        for split, count in (("train", n_train), ("test", n_test)):
            positive = integers(seed, split).shuffled([index % 2 == 1 for index in range(count)])
            for index in range(count):
                number += 1
                path = f"slides/{number:04d}.tif"
                random = integers(seed, split, index)
                pixels, spots = _slide(random, parts[split], positive[index], sides, name)
                write_pyramid(place / path, pixels, mpp)
                for kind in _COLOURS:
                    if chosen := [spot for spot in spots if spot.smeared == (kind == "smeared")]:
                        write_whole(place / "spots" / f"{number:04d}-{kind}.geojson", _annotations(kind, chosen))
                lines.append(f"{path},{CLASSES[positive[index]]},{split}\n")
        write_whole(place / "labels.csv", "".join(lines).encode())


def _tissue(
    slide: str | os.PathLike[str] | None, seed: int, sides: tuple[int, int]
) -> tuple[NDArray[np.uint8], float, str]:
    """The image that slides are cut from (H, W, 3), its micrometres a pixel, and its name."""
    if slide is None:
        return np.asarray(draw_biopsy(integers(seed, "slide"), _DRAWN)), _MPP, "drawn tissue"
    source = open_image(slide)
    full = source.levels[0]
    if source.channels != 3 or str(source.dtype) != "torch.uint8":
        raise ValueError(f"{slide} has {source.channels} channels of {source.dtype}, expected colours in bytes")
    least = sides[0] * 100 // (100 - _TRAIN) + 1
    if full.height < least or full.width < sides[0] or full.height * full.width > _LARGEST:
        raise ValueError(
            f"{slide} is {full.height}×{full.width} pixels; slides of {sides[0]} pixels and more are cut from at least "
            f"{least}×{sides[0]} and at most {_LARGEST:,} pixels: choose another slide, or cut a part of it"
        )
    pixels = source.read(0, 0, 0, full.height, full.width).permute(1, 2, 0).contiguous().numpy()
    mpp = _MPP if source.mpp is None else (source.mpp[0] + source.mpp[1]) / 2
    return pixels, mpp, Path(slide).name


def _slide(
    random: Integers, part: NDArray[np.uint8], positive: bool, sides: tuple[int, int], name: str
) -> tuple[NDArray[np.uint8], list[Spot]]:
    """A slide cut from a part of the tissue, with spots planted in it."""
    n_spots = random.between(1, 2)
    for _ in range(100):
        size = [
            min(random.between(sides[0] // MULTIPLE, sides[1] // MULTIPLE), side // MULTIPLE) * MULTIPLE
            for side in part.shape[:2]
        ]
        top, left = (random.below(side - own + 1) for side, own in zip(part.shape[:2], size, strict=True))
        cut = np.rot90(part[top : top + size[0], left : left + size[1]], random.below(4))
        cut = np.ascontiguousarray(cut[:, ::-1] if random.below(2) else cut)
        amount, tissue = nuclei(cut), is_tissue(cut)
        if tissue.mean() < _TISSUE:
            continue
        spots = list(_places(random, amount, tissue, n_spots, smeared=not positive))
        if len(spots) < n_spots:
            continue
        pixels = shade(cut, random)
        for spot in spots:
            plant(pixels, amount, spot)
        return pixels, spots
    raise ValueError(
        f"{name} has too little tissue with nuclei in its {'upper' if positive else 'upper or lower'} part for spots; "
        "choose another slide"
    )


def _places(
    random: Integers, amount: NDArray[np.int32], tissue: NDArray[np.bool_], count: int, *, smeared: bool
) -> Iterator[Spot]:
    """Spots apart from each other where there are nuclei; fewer where there is no room."""
    found: list[Spot] = []
    for _ in range(200):
        if len(found) == count:
            return
        radius = random.between(*_RADII)
        row, column = (random.between(radius, side - radius) for side in amount.shape)
        spot = Spot(row, column, radius, random.between(218, 294), smeared)
        apart = all(
            (row - other.row) ** 2 + (column - other.column) ** 2 > (radius + other.radius + 60) ** 2 for other in found
        )
        if not apart or not _DENSITY[0] <= amount[spot.box()].mean() <= _DENSITY[1]:
            continue
        if tissue[spot.box()].mean() >= _WITHIN and contrast(amount, spot) >= _CONTRAST:
            found.append(spot)
            yield spot


def _annotations(kind: str, spots: list[Spot]) -> bytes:
    """Outlines for QuPath, which `ats.mask_cells` reads, too."""
    features: list[dict[str, Any]] = []
    for spot in spots:
        turns = [(spot.column + spot.radius * x, spot.row + spot.radius * y) for x, y in _CIRCLE]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [[[round(x, 1), round(y, 1)] for x, y in turns]]},
                "properties": {"objectType": "annotation", "classification": {"name": kind, "color": _COLOURS[kind]}},
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


_ANGLES = np.linspace(0, 2 * np.pi, 25)
_CIRCLE = [*zip(np.cos(_ANGLES[:-1]).tolist(), np.sin(_ANGLES[:-1]).tolist(), strict=True), (1.0, 0.0)]
