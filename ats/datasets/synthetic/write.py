"""Small synthetic data sets on disk, laid out as the originals are, for tests and for those who lack the data.

The loaders read them as they read the originals and call their source "synthetic …", which goes on into reports: each
folder holds a `SYNTHETIC_MARKER`. A seed means the same images with the same versions of Pillow and its codecs, and the
same labels and places everywhere.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ats._files import write_whole
from ats.datasets import painting
from ats.datasets.colon_cancer import NUCLEI
from ats.datasets.image_files import needed
from ats.datasets.speed_limits import LIMITS
from ats.datasets.synthetic.folder import integers, new_folder
from ats.datasets.synthetic.scenes import OTHERS_SHARE, draw_street, draw_tissue, plan_streets
from ats.datasets.traffic_signs import FIRST_TEST_FRAME, GERMAN_DUPLICATES, GERMAN_FRAMES, GERMAN_LIMITS

if TYPE_CHECKING:
    from PIL.Image import Image

_GERMAN_OTHERS = {"triangle": 18, "disc": 38, "diamond": 12}  # class ids


def write_colon_cancer(
    folder: str | os.PathLike[str], n_images: int = 100, *, seed: int = 0, size: int = 500, suffix: str = ".png"
) -> None:
    """Tissue with nuclei of four kinds, laid out as the release: Classification/imgN/ with imgN.png and four .mat.

    Half of the images hold epithelial nuclei, near each other. Nuclei of the kind "others" look like them from afar.

    Args:
        folder: where to; new or empty.
        n_images: images, at least 2.
        seed: of everything random.
        size: pixels a side, at least 64.
        suffix: ".png", or ".bmp" as the release has it.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: sizes, or a suffix, that the data set cannot have.
    """
    if n_images < 2 or size < 64:
        raise ValueError(f"n_images must be at least 2 and size at least 64 pixels, got {n_images} and {size}")
    _check_suffix(suffix, (".png", ".bmp"))
    save_mat = needed("scipy.io", "SciPy").savemat
    positive = integers(seed, "labels").shuffled([index < n_images // 2 for index in range(n_images)])
    with new_folder(folder, f"{n_images} of tissue, {size}×{size}, seed {seed}") as place:
        for index in range(n_images):
            name = f"img{index + 1}"
            image, nuclei = draw_tissue(integers(seed, "image", index), size, positive[index])
            for kind in NUCLEI:
                file = io.BytesIO()
                # As in the release: 0×2 bytes where there are none, and compressed, so that damage shows.
                points = np.array(nuclei[kind], float) if kind in nuclei else np.zeros((0, 2), np.uint8)
                save_mat(file, {"detection": points}, do_compression=True)
                write_whole(place / "Classification" / name / f"{name}_{kind}.mat", file.getvalue())
            _save(image, place / "Classification" / name / f"{name}{suffix}")


def write_german(
    folder: str | os.PathLike[str],
    n_train: int = 96,
    n_test: int = 64,
    *,
    seed: int = 0,
    size: tuple[int, int] = (800, 1360),
    limits: Sequence[int] = LIMITS["german"],
    sign_size: tuple[int, int] = (12, 24),
    suffix: str = ".jpg",
) -> None:
    """Streets with speed limits, laid out as the German benchmark: gt.txt and 00000.jpg …, tests from 00600.jpg.

    As many frames of each class, one of them without signs, as the number allows; an eighth more show other signs only.

    Args:
        folder: where to; new or empty.
        n_train, n_test: frames with a label, at least one for each class; at most 534 and 266.
        seed: of everything random.
        size: height and width in pixels.
        limits: km/h.
        sign_size: smallest and largest side of a sign, in pixels; digits want 12 to be read.
        suffix: ".jpg", or ".ppm" as the benchmark has it. gt.txt says .ppm in any case, as the benchmark's does.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: sizes, limits, numbers or a suffix that the data set cannot have.
    """
    _check_suffix(suffix, (".jpg", ".ppm"))
    ids = {limit: number for number, limit in GERMAN_LIMITS.items()}
    if not set(limits) <= ids.keys():
        raise ValueError(f"limits must be of {', '.join(map(str, sorted(ids)))}, got {tuple(limits)}")
    frames = [f"{number:05d}" for number in range(GERMAN_FRAMES) if f"{number:05d}" not in GERMAN_DUPLICATES]
    names = {"train": frames[:FIRST_TEST_FRAME], "test": frames[FIRST_TEST_FRAME:]}
    counts = {"train": n_train, "test": n_test}
    for split, count in counts.items():
        _check_streets(count, limits, size, sign_size)
        if count + count // OTHERS_SHARE > len(names[split]):
            raise ValueError(f"n_{split} must leave room for others within {len(names[split])} frames, got {count}")
    with new_folder(folder, f"{n_train} and {n_test} streets, {size[0]}×{size[1]}, seed {seed}") as place:
        lines = []
        for split, count in counts.items():
            plan = plan_streets(integers(seed, split), count, limits)
            for index, (name, shown) in enumerate(zip(names[split], plan, strict=False)):
                scene = draw_street(integers(seed, split, index), size, shown, sign_size, painting.WHITE)
                for sign in scene.signs:
                    kind = _GERMAN_OTHERS[sign.other] if sign.limit is None else ids[sign.limit]
                    lines.append(f"{name}.ppm;{';'.join(map(str, sign.box))};{kind}\n")
                _save(scene.image, place / f"{name}{suffix}")
        write_whole(place / "gt.txt", "".join(lines).encode())


def write_swedish(
    folder: str | os.PathLike[str],
    n_train: int = 96,
    n_test: int = 64,
    *,
    seed: int = 0,
    size: tuple[int, int] = (960, 1280),
    limits: Sequence[int] = LIMITS["swedish"],
    sign_size: tuple[int, int] = (12, 24),
) -> None:
    """Streets with speed limits, laid out as the Swedish set: Set1 and Set2, each with annotations.txt and .jpg files.

    As many frames of each class, one of them without signs, as the number allows; an eighth more show other signs only,
    or a limit too blurred to read, in turn.

    Args:
        folder: where to; new or empty.
        n_train, n_test: frames with a label in Set1 and Set2, at least one for each class.
        seed: of everything random.
        size: height and width in pixels.
        limits: km/h.
        sign_size: smallest and largest side of a sign, in pixels; digits want 12 to be read.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: sizes or numbers that the data set cannot have.
    """
    for count in (n_train, n_test):
        _check_streets(count, limits, size, sign_size)
    with new_folder(folder, f"{n_train} and {n_test} streets, {size[0]}×{size[1]}, seed {seed}") as place:
        for split, inner, count in (("train", "Set1", n_train), ("test", "Set2", n_test)):
            lines = []
            plan = plan_streets(integers(seed, split), count, limits, blurred=True)
            for index, shown in enumerate(plan):
                name = f"{split}Image{index:06d}.jpg"
                scene = draw_street(integers(seed, split, index), size, shown, sign_size, painting.YELLOW)
                signs = "".join(f"{sign.swedish()};" for sign in scene.signs)
                # The original says of some frames that they show signs which it does not list.
                misc = "MISC_SIGNS;" if index % 5 == 4 else ""
                lines.append(f"{name}:{signs}{misc}\n")
                _save(scene.image, place / inner / name)
            write_whole(place / inner / "annotations.txt", "".join(lines).encode())


def _check_suffix(suffix: str, known: tuple[str, ...]) -> None:
    if suffix not in known:
        raise ValueError(f"unknown suffix {suffix!r}, expected one of {', '.join(map(repr, known))}")


def _check_streets(count: int, limits: Sequence[int], size: tuple[int, int], sign_size: tuple[int, int]) -> None:
    if not limits or count < len(limits) + 1:
        raise ValueError(f"a split needs limits and at least one frame a class, got {count} frames of {tuple(limits)}")
    smallest, largest = sign_size
    if not 8 <= smallest <= largest or min(size[0] * 2 // 5, size[1] // 2) <= largest:
        raise ValueError(
            "sign_size must be the smallest and the largest side, at least 8 pixels, and the largest below two "
            f"fifths of the height and half of the width, got {sign_size} for {size[0]}×{size[1]}"
        )


def _save(image: "Image", path: Path) -> None:
    file = io.BytesIO()
    format_name = {".jpg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".ppm": "PPM"}[path.suffix]
    image.save(file, format_name, **({"quality": 92} if format_name == "JPEG" else {}))
    write_whole(path, file.getvalue())
