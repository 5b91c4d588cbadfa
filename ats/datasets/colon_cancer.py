"""Colon cancer (paper, section 4.3): H&E images of 500×500, positive where they show an epithelial nucleus.

CRCHistoPhenotypes_2016_04_28 by Sirinukunwattana et al. (IEEE Transactions on Medical Imaging, 2016): 100 images with
the centres of 22,444 nuclei of four kinds. Released for research only: nothing of it may be copied into a repository.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ats.datasets.image_dataset import Example, ImageDataset, Region
from ats.datasets.image_files import check_same_size, default_folder, find_image, is_synthetic, needed, read_size
from ats.datasets.integers import Integers
from ats.paths import user_path

RELEASE = "CRCHistoPhenotypes_2016_04_28"
SOURCE = "CRCHistoPhenotypes"
CLASSES = ("no epithelial nucleus", "epithelial nucleus")
NUCLEI = ("epithelial", "fibroblast", "inflammatory", "others")
SUFFIXES = (".bmp", ".png")
N_IMAGES = 100  # of the release
FIXED_SPLIT_SEEDS = (0, 1, 2, 3, 4)
"""Seeds of `colon_cancer_split` for the paper's five runs."""


def load_colon_cancer(folder: str | os.PathLike[str] | None = None, *, cache: bool = False) -> ImageDataset:
    """All images, with every nucleus as a point: a region of no area. Epithelial nuclei are the targets.

    Args:
        folder: the release's folder, or the one that holds it; below it is Classification/imgN/ with imgN.bmp, or
            imgN.png, and imgN_epithelial.mat, imgN_fibroblast.mat, imgN_inflammatory.mat and imgN_others.mat. None:
            colon-cancer/ in the folder that ATS_DATA names.
        cache: keep decoded images in memory, 0.75 MB each.

    Raises:
        FileNotFoundError: the folder, an image or an annotation is missing.
        ValueError: a file that is damaged or not what its name says, a nucleus outside of its image, a folder like
            img03, images of one class only. Names the file.
    """
    folder = default_folder("colon-cancer") if folder is None else user_path(folder)
    images = _find(folder)
    synthetic = is_synthetic(folder, images, images.parent)
    numbers = _numbers(images)
    if not synthetic:
        _check_complete(images, numbers)
    examples, sizes = [], []
    for number in numbers:
        name = f"img{number}"
        image = find_image(images / name, name, SUFFIXES)
        if image is None:
            raise FileNotFoundError(
                f"{images / name} holds neither {name}.bmp nor {name}.png; put the image back, from the release"
            )
        size = read_size(image)
        sizes.append((image, size))
        regions = tuple(
            region for kind in NUCLEI for region in _read_nuclei(images / name / f"{name}_{kind}.mat", kind, size)
        )
        label = int(any(region.target for region in regions))
        examples.append(Example(name, image, label, regions))
    check_same_size(sizes)
    if len({example.label for example in examples}) < len(CLASSES):
        raise ValueError(
            f"all {len(examples)} images in {images} are of one class, {CLASSES[examples[0].label]!r}; nothing can be "
            "learned from one class: put images of the other beside them, or unpack the release anew"
        )
    return ImageDataset(CLASSES, examples, f"synthetic {SOURCE}" if synthetic else SOURCE, cache=cache)


def colon_cancer_folds(
    labels: Tensor | Sequence[int], folds: int = 10, *, seed: int = 0
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Cross-validation: (train, test) indices of each fold. Every image is tested on once; classes are spread evenly.

    Args:
        labels: (n,) the class of every image.
        folds: how many parts.
        seed: of the order in which images are dealt to the folds.

    Returns:
        A pair of ascending (·,) int64 for each fold. The number of images in two folds' tests, and of each class in
        them, differs by one at most.

    Raises:
        ValueError: fewer than two folds, or more folds than images of a class.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
    fewest = int(labels.unique(return_counts=True)[1].min()) if len(labels) else 0
    if not 2 <= folds <= fewest:
        raise ValueError(
            f"folds must be at least 2, and at most the images of the rarest class, which has {fewest}; got {folds}"
        )
    random = Integers(np.random.Philox(key=seed))
    parts: list[list[int]] = [[] for _ in range(folds)]
    dealt = 0  # the next class goes on where the last one stopped, so that folds end up equally large
    for label in labels.unique().tolist():
        for index in random.shuffled((labels == label).nonzero().flatten().tolist()):
            parts[dealt % folds].append(index)
            dealt += 1
    everything = torch.arange(len(labels), device="cpu")
    return tuple(
        (
            everything[~torch.isin(everything, torch.tensor(part, device="cpu"))],
            torch.tensor(sorted(part), device="cpu"),
        )
        for part in parts
    )


def colon_cancer_split(labels: Tensor | Sequence[int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One split, (train, test) indices: a fifth of each class for testing. `FIXED_SPLIT_SEEDS` has seeds for five.

    Raises:
        ValueError: a class of fewer than five images.
    """
    return colon_cancer_folds(labels, 5, seed=seed)[0]


def _find(folder: Path) -> Path:
    """The folder that holds img1, img2, …"""
    candidates = (folder, folder / "Classification", folder / RELEASE / "Classification")
    for candidate in candidates:
        if candidate.is_dir() and any(path.is_dir() for path in candidate.glob("img[0-9]*")):
            return candidate
    raise FileNotFoundError(
        f"{folder} is not the colon cancer data: there is no Classification/img1/ in it, nor in {RELEASE}/ below it. "
        f"Name the unpacked {RELEASE}, or write synthetic images with: ats synthesise colon-cancer FOLDER"
    )


def _numbers(images: Path) -> list[int]:
    """N of each folder imgN, ascending.

    Raises:
        ValueError: a folder whose number is written in another way, e.g. img03: it would be taken for img3.
    """
    numbers = []
    for path in images.iterdir():
        digits = path.name.removeprefix("img")
        if path.is_dir() and path.name.startswith("img") and digits.isdecimal():
            if digits != str(int(digits)):
                raise ValueError(
                    f"{path}: folders are named img1, img2, …, without zeros in front; rename it to "
                    f"img{int(digits)}, or remove it if that is there already"
                )
            numbers.append(int(digits))
    return sorted(numbers)


def _check_complete(images: Path, numbers: list[int]) -> None:
    missing = sorted(set(range(1, N_IMAGES + 1)) - set(numbers))
    if missing:
        names = ", ".join(f"img{number}" for number in missing[:5]) + (", …" if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{images} lacks {len(missing)} of {N_IMAGES} folders: {names}; unpack the release anew"
        )


def _read_nuclei(path: Path, kind: str, size: tuple[int, int]) -> list[Region]:
    loadmat = needed("scipy.io", "SciPy").loadmat
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; without it the image's label is unknown. Put it back, from the release"
        )
    try:
        content = loadmat(path, variable_names=["detection"])
    except Exception as error:  # SciPy lets out whatever the damaged bytes lead to, of a dozen types
        raise ValueError(f"{path} is damaged or no MATLAB file ({error}); put a whole copy in its place") from error
    if "detection" not in content:
        raise ValueError(f"{path} holds no variable `detection`; it is not an annotation of this data set")
    points = np.asarray(content["detection"])
    if points.size == 0:
        return []
    if points.ndim != 2 or points.shape[1] != 2 or not np.issubdtype(points.dtype, np.number):
        raise ValueError(
            f"{path}: `detection` is {points.dtype} of shape {points.shape}, expected numbers of shape (n, 2): x, y"
        )
    points = points.astype(np.float64)
    height, width = size
    outside = ~((points >= 0) & (points <= (width, height))).all(1)  # true for NaN as well
    if outside.any():
        x, y = points[outside][0]
        raise ValueError(
            f"{path}: the nucleus at x = {x:g}, y = {y:g} is outside of its image of {height}×{width} pixels "
            "(height × width); the file belongs to another image, or the image was resized"
        )
    return [Region(y, x, y, x, kind, target=kind == "epithelial") for x, y in points.tolist()]
