"""Speed limits (paper, section 4.4): which limit does a photograph of a street show, if any?

One task over two sources: the Swedish Traffic Signs set of the paper, and the German Traffic Sign Detection Benchmark,
which can still be had. A far sign of 20 pixels shows in the low-resolution view but cannot be read there.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

from ats.datasets.image_dataset import Example, ImageDataset, Region
from ats.datasets.image_files import check_same_size, default_folder, is_synthetic, read_size
from ats.datasets.traffic_signs import GERMAN_LIMITS, Frame, read_german, read_swedish
from ats.paths import user_path

SOURCES = {"german": "GTSDB", "swedish": "Swedish Traffic Signs"}
LIMITS = {"german": (30, 50, 70), "swedish": (50, 70, 80)}
"""km/h that are classes unless others are asked for: the frequent ones; for the Swedish set the paper's."""
GERMAN_FOLDER = "FullIJCNN2013"
_STANDS_OUT = {"german": 16.0, "swedish": math.inf}
"""Pixels that a box may stand out from its image, which is cut off: boxes are drawn by hand."""
_READ = {"german": read_german, "swedish": read_swedish}


def load_speed_limits(
    folder: str | os.PathLike[str] | None,
    split: str,
    *,
    source: str = "auto",
    limits: Sequence[int] | None = None,
    other_signs_are_none: bool = False,
    cache: bool = False,
) -> ImageDataset:
    """Photographs with one label each: "none", or the speed limit that they show.

    Of several limits the most visible counts, then the largest; the German set says nothing about visibility. A frame
    with no sign at all is "none". Left out are frames that show other signs only, limits which are no class included,
    and frames whose most visible limit is blurred, occluded or in a side road, as in the paper. A region is a sign with
    a limit; the targets are those of the frame's label.

    Args:
        folder: FullIJCNN2013 with gt.txt and 00000.ppm (or .png, .jpg) …, or the folder that holds it; or the folder
            with Set1 and Set2 of the Swedish set. None: speed-limits/ in the folder that ATS_DATA names.
        split: "train" or "test", as the sources have it.
        source: "german", "swedish", or "auto" for what is there.
        limits: km/h that are classes, in their order; default `LIMITS[source]`.
        other_signs_are_none: take frames with other signs only as "none", in place of leaving them out.
        cache: keep decoded images in memory, 3.3 MB each.

    Raises:
        FileNotFoundError: the folder, an annotation or an image is missing.
        ValueError: an unknown split, source or limit; annotations or images that are damaged or don't fit each other.
            Names the file and the line.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}, expected 'train' or 'test'")
    folder = default_folder("speed-limits") if folder is None else user_path(folder)
    source, place = _find(folder, source)
    limits = LIMITS[source] if limits is None else tuple(limits)
    _check_limits(limits, source)
    examples, sizes = [], []
    for frame in _READ[source](place, split):
        label = _label(frame, limits, other_signs_are_none)
        if label is not None:
            if not frame.path.is_file():
                raise FileNotFoundError(
                    f"{frame.annotated}, is about {frame.path}, which is missing; put the image back or remove the line"
                )
            size = read_size(frame.path)
            sizes.append((frame.path, size))
            examples.append(_example(frame, label, limits, size, _STANDS_OUT[source]))
    check_same_size(sizes)
    classes = ("none", *map(str, limits))
    synthetic = "synthetic " if is_synthetic(folder, place) else ""
    data = ImageDataset(classes, examples, f"{synthetic}{SOURCES[source]}", cache=cache)
    if not examples or (split == "train" and not data.class_counts.all()):
        counts = ", ".join(f"{name}: {count}" for name, count in zip(classes, data.class_counts.tolist(), strict=True))
        raise ValueError(
            f"{place} has too few {split} images of some class ({counts}); "
            "choose other limits, or unpack the data set anew"
        )
    return data


def _find(folder: Path, source: str) -> tuple[str, Path]:
    """The source that is in a folder, and its own folder."""
    if source not in ("auto", *SOURCES):
        raise ValueError(f"unknown source {source!r}, expected 'auto', 'german' or 'swedish'")
    places = [("german", place) for place in (folder, folder / GERMAN_FOLDER) if (place / "gt.txt").is_file()][:1]
    places += [("swedish", folder)] if (folder / "Set1").is_dir() or (folder / "Set2").is_dir() else []
    found = [place for place in places if source in ("auto", place[0])]
    if len(found) > 1:
        raise ValueError(f"{folder} holds German and Swedish signs; say which with source='german' or source='swedish'")
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no traffic signs ({source=}). Looked for: gt.txt of the German benchmark, here and in "
            f"{GERMAN_FOLDER}/; Set1/ and Set2/ of the Swedish set. Name their folder, or write "
            "synthetic images with: ats synthesise speed-limits-german FOLDER"
        )
    return found[0]


def _check_limits(limits: tuple[int, ...], source: str) -> None:
    if not limits or len(set(limits)) != len(limits):
        raise ValueError(f"limits must be at least one, each once, got {limits}")
    known = sorted(GERMAN_LIMITS.values())
    unknown = [limit for limit in limits if source == "german" and limit not in known]
    if unknown:
        raise ValueError(f"the German set has no limit of {unknown[0]}; limits are {', '.join(map(str, known))}")


def _label(frame: Frame, limits: tuple[int, ...], other_signs_are_none: bool) -> int | None:
    """The frame's class; None where it is left out."""
    wanted = [sign for sign in frame.signs if sign.limit in limits]
    if not wanted:
        return 0 if not frame.signs or other_signs_are_none else None
    first = min(wanted, key=lambda sign: (sign.visibility, -sign.box.area))
    return None if first.visibility or first.limit is None else 1 + limits.index(first.limit)


def _example(frame: Frame, label: int, limits: tuple[int, ...], size: tuple[int, int], stands_out: float) -> Example:
    regions = []
    for sign in frame.signs:
        if sign.limit is not None:
            target = label > 0 and sign.limit == limits[label - 1]
            regions.append(dataclasses.replace(_within(sign.box, size, frame, stands_out), target=target))
    return Example(frame.path.stem, frame.path, label, tuple(regions))


def _within(box: Region, size: tuple[int, int], frame: Frame, stands_out: float) -> Region:
    """The part of a box that is in the image, from which it may stand out a little."""
    height, width = size
    top, left = max(box.top, 0), max(box.left, 0)
    bottom, right = min(box.bottom, height), min(box.right, width)
    cut = max(top - box.top, left - box.left, box.bottom - bottom, box.right - right)
    if top >= bottom or left >= right or cut > stands_out:
        raise ValueError(
            f"{frame.annotated}: the {box.kind} with left, top, right, bottom = {box.left:g}, {box.top:g}, "
            f"{box.right:g}, {box.bottom:g} is empty or not within {frame.path}, which is {height}×{width} pixels "
            "(height × width); restore the original annotations and image"
        )
    return dataclasses.replace(box, top=top, left=left, bottom=bottom, right=right)
