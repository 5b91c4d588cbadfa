"""Reading two benchmarks of traffic signs in photographs of streets: frames, and the signs in them.

The Swedish Traffic Signs data set (Larsson and Felsberg, 2011) and the German Traffic Sign Detection Benchmark (Houben
et al., 2013), each as it comes unpacked. `ats.datasets.speed_limits` makes a task of either.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ats.datasets.image_dataset import Region
from ats.datasets.image_files import find_image

VISIBILITIES = ("VISIBLE", "BLURRED", "SIDE_ROAD", "OCCLUDED")
"""From clear to hidden, as the Swedish annotations name them."""

GERMAN_LIMITS = {0: 20, 1: 30, 2: 50, 3: 60, 4: 70, 5: 80, 7: 100, 8: 120}
"""km/h by class id. Class 6, the end of a limit of 80, is no limit."""
_GERMAN_CLASSES = 43
GERMAN_FRAMES = 900
FIRST_TEST_FRAME = 600
GERMAN_DUPLICATES = {"00881": "00613"}
"""A frame that is the same picture as an earlier one, by that one."""
GERMAN_SUFFIXES = (".ppm", ".png", ".jpg")


@dataclass(frozen=True)
class Sign:
    """A sign: its speed limit in km/h, None for any other sign; its box in pixels; an index into `VISIBILITIES`."""

    limit: int | None
    box: Region
    visibility: int = 0


@dataclass(frozen=True)
class Frame:
    """A photograph, which may be missing; the signs in it; and where they are written down, for messages."""

    path: Path
    signs: tuple[Sign, ...]
    annotated: str


def read_german(folder: Path, split: str) -> list[Frame]:
    """The frames of the German benchmark: 00000 to 00599 for "train", 00600 to 00899 for "test".

    Reads gt.txt, with lines `00000.ppm;left;top;right;bottom;class`. Frames that it does not name show no sign. A
    second copy of a picture is left out (`GERMAN_DUPLICATES`).

    Raises:
        FileNotFoundError: gt.txt is missing.
        ValueError: a line that cannot be read.
    """
    truth = folder / "gt.txt"
    signs: dict[str, list[Sign]] = {}
    lines: dict[str, int] = {}
    for number, line in _lines(truth):
        fields = re.fullmatch(r"(\d{5})\.\w+;(-?\d+);(-?\d+);(-?\d+);(-?\d+);(\d+)", line)
        if fields is None or int(fields[6]) >= _GERMAN_CLASSES:
            raise ValueError(
                f"{truth}, line {number}: {line!r} cannot be read; expected NNNNN.ppm;left;top;right;bottom;class with "
                f"class 0 to {_GERMAN_CLASSES - 1}. Restore the original file"
            )
        left, top, right, bottom, kind = map(int, fields.groups()[1:])
        limit = GERMAN_LIMITS.get(kind)
        signs.setdefault(fields[1], []).append(Sign(limit, _box(top, left, bottom, right, limit)))
        lines.setdefault(fields[1], number)
    stems = {path.stem for path in folder.iterdir() if path.suffix.lower() in GERMAN_SUFFIXES}
    stems = {stem for stem in stems if re.fullmatch(r"\d{5}", stem)} | signs.keys()
    stems -= {later for later, earlier in GERMAN_DUPLICATES.items() if earlier in stems}
    frames = []
    for stem in sorted(stems):
        if (int(stem) < FIRST_TEST_FRAME) == (split == "train"):
            path = find_image(folder, stem, GERMAN_SUFFIXES) or folder / f"{stem}{GERMAN_SUFFIXES[0]}"
            where = f"{truth}, line {lines[stem]}" if stem in lines else str(truth)
            frames.append(Frame(path, tuple(signs.get(stem, ())), where))
    return frames


def read_swedish(folder: Path, split: str) -> list[Frame]:
    """The annotated frames of the Swedish set: Set1 for "train", Set2 for "test", as in the authors' release.

    Reads annotations.txt, with lines `name.jpg:` that end there where no sign was seen, or go on with signs of the form
    `VISIBLE, right, bottom, left, top, PROHIBITORY, 50_SIGN;`. MISC_SIGNS, which comes without box and name, counts for
    nothing, as in the authors' release. Frames lie beside annotations.txt or in SetNPart0/ below.

    Raises:
        FileNotFoundError: annotations.txt is missing.
        ValueError: a line that cannot be read.
    """
    inner = folder / {"train": "Set1", "test": "Set2"}[split]
    annotations = inner / "annotations.txt"
    frames = []
    lines = list(_lines(annotations))
    for number, line in lines:
        where = f"{annotations}, line {number}"
        name, colon, rest = line.partition(":")
        name = name.strip()
        if not colon or not name:
            raise ValueError(f"{where}: {line!r} cannot be read; expected NAME.jpg:SIGN;SIGN;… {_RESTORE}")
        if name in (".", "..") or not set(name).isdisjoint("/\\:\0"):
            raise ValueError(
                f"{where}: {name!r} is no image's name in {inner}; names have no folders in them. {_RESTORE}"
            )
        described = [sign.strip() for sign in rest.split(";")]
        if described[-1] and number == lines[-1][0]:
            raise ValueError(
                f"{where}: {described[-1]!r} has no semicolon after it, the file was cut short. {_RESTORE}"
            )
        signs = [_swedish_sign(sign, where) for sign in described if sign not in ("", "MISC_SIGNS")]
        places = (inner / name, inner / f"{inner.name}Part0" / name)
        path = next((place for place in places if place.is_file()), places[0])
        frames.append(Frame(path, tuple(signs), where))
    return frames


_RESTORE = "Restore the original file"


def _swedish_sign(text: str, where: str) -> Sign:
    fields = [field.strip() for field in text.split(",")]
    # Some numbers of the published file end in a stray letter.
    numbers = [re.fullmatch(r"(-?\d+(?:\.\d*)?)[A-Za-z]*", field) for field in fields[1:5]]
    if len(fields) < 7 or not all(numbers) or fields[0] not in VISIBILITIES:
        raise ValueError(
            f"{where}: {text!r} cannot be read; expected VISIBILITY, right, bottom, left, top, KIND, NAME with "
            f"VISIBILITY one of {', '.join(VISIBILITIES)}. {_RESTORE}"
        )
    x, y, other_x, other_y = (float(number[1]) for number in numbers if number is not None)
    name = re.fullmatch(r"(\d+)_SIGN", fields[6])
    if name is None and re.match(r"\d", fields[6]):
        raise ValueError(f"{where}: {fields[6]!r} is no sign's name; a limit's is like 50_SIGN. {_RESTORE}")
    limit = int(name[1]) if name else None
    box = _box(min(y, other_y), min(x, other_x), max(y, other_y), max(x, other_x), limit)
    return Sign(limit, box, VISIBILITIES.index(fields[0]))


def _box(top: float, left: float, bottom: float, right: float, limit: int | None) -> Region:
    return Region(top, left, bottom, right, "other-sign" if limit is None else f"speed-limit-{limit}", target=False)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, without white space around them, numbered from 1."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it says which signs the frames show. Put it back")
    try:
        text = path.read_text(encoding="ascii")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file of annotations ({error}); restore the original file") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()
