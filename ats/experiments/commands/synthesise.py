"""`ats synthesise`: a small synthetic data set for those who lack the real one."""

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ats.datasets.colon_cancer import load_colon_cancer
from ats.datasets.image_dataset import ImageDataset
from ats.datasets.manifest import read_manifest
from ats.datasets.speed_limits import load_speed_limits
from ats.datasets.synthetic.gigapixel import write_gigapixel_mnist
from ats.datasets.synthetic.slides import write_slides
from ats.datasets.synthetic.write import write_colon_cancer, write_german, write_swedish
from ats.experiments.console import say
from ats.experiments.options import parse

_TRAINED = {
    "slides": "--preset quick --data.storage disk --data.tissue --data.symmetries --data.tint 0.05 "
    "--model.view-scale 0.0625 --model.patch-size 48 --model.n-patches 20 --model.evidence cells --optim.epochs 60 "
    "--optim.draws 1",
    "gigapixel-mnist": "--data.storage disk --model.levels 128:10:4 8:2:4 --model.patch-size 50",
}
"""Options of `ats train images` for what is written with a manifest, as on the pages about it."""


@dataclass(frozen=True)
class SynthesiseOptions:
    """Write a small synthetic data set, laid out on disk as a real one is. Reports on it say that it is synthetic."""

    data: tyro.conf.Positional[
        Literal["colon-cancer", "speed-limits-german", "speed-limits-swedish", "slides", "gigapixel-mnist"]
    ]
    """Whose task and layout; or slides (docs/slides.md) or Gigapixel MNIST (docs/gigapixel-mnist.md) as tiled pyramids
    with a manifest, for `ats train images`."""
    folder: tyro.conf.Positional[Path]
    """Where to; new or empty. Give it to `ats train` as --data.folder; where it has a labels.csv, that as
    --data.manifest."""
    images: int = 100
    """Images to train on; half as many to test on are written beside them. Of colon-cancer, which is parted by folds:
    images in all."""
    slide: Path | None = None
    """slides: an image of stained tissue that they are cut from. Default: tissue that is drawn."""
    image_size: int | None = None
    """gigapixel-mnist: pixels a side. Default: 8,192, as in the preset demo."""
    seed: int = 0
    """Decides all that is random."""


def synthesise(options: SynthesiseOptions) -> list[str]:
    """Write the data set, read it back and describe it, a line for each split.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: a number of images that the data set cannot have, or a slide where none is of use.
    """
    if options.image_size is not None and options.data != "gigapixel-mnist":
        raise ValueError(f"--image-size is for gigapixel-mnist, and {options.data} has its own; leave it out")
    if options.data == "gigapixel-mnist" and options.slide is None:
        write_gigapixel_mnist(
            options.folder, options.images, options.images // 2, image_size=options.image_size, seed=options.seed
        )
        return _describe_slides(options.folder / "labels.csv")
    if options.data == "slides":
        write_slides(options.folder, options.images, options.images // 2, seed=options.seed, slide=options.slide)
        return _describe_slides(options.folder / "labels.csv")
    if options.slide is not None:
        raise ValueError(f"--slide is for slides, which {options.data} has none of; leave it out")
    if options.data == "colon-cancer":
        write_colon_cancer(options.folder, options.images, seed=options.seed)
        return [_describe("all", load_colon_cancer(options.folder))]
    write: Callable[..., None] = write_german if options.data == "speed-limits-german" else write_swedish
    write(options.folder, options.images, options.images // 2, seed=options.seed)
    return [_describe(split, load_speed_limits(options.folder, split)) for split in ("train", "test")]


def _describe(split: str, data: ImageDataset) -> str:
    counts = ", ".join(f"{name}: {count}" for name, count in zip(data.classes, data.class_counts.tolist(), strict=True))
    height, width = data.image_size
    return f"{data.source}, {split}: {len(data)} images of {height}×{width} pixels ({counts})"


def _describe_slides(path: Path) -> list[str]:
    manifest = read_manifest(path)
    lines = []
    for split in ("train", "test"):
        counts = Counter(row.label for row in manifest.select(split))
        lines.append(f"{path}, {split}: {', '.join(f'{name}: {count}' for name, count in sorted(counts.items()))}")
    return lines


def _unseen(path: Path) -> list[str]:
    """The labels of a manifest's test images that none of those to train on has."""
    labels = {split: {row.label for row in read_manifest(path).select(split)} for split in ("train", "test")}
    return sorted(labels["test"] - labels["train"])


def run_synthesise(arguments: list[str]) -> None:
    """`ats synthesise`."""
    options = parse(SynthesiseOptions, "ats synthesise", arguments)
    for line in synthesise(options):
        say(line)
    way = f"--data.folder {shlex.quote(str(options.folder))}"
    if options.data in _TRAINED:
        table = options.folder / "labels.csv"
        if unseen := _unseen(table):
            say(f"Too few to train on: no image to train on is of {', '.join(unseen)}, as images to test on are.")
            return
        way = f"ats train images --data.manifest {shlex.quote(str(table))} --output RUN {_TRAINED[options.data]}"
    say(f"Train on it with: {way}")
