"""`ats predict`: what a trained model makes of images of yours, as a table."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from ats._files import write_whole
from ats.datasets.manifest import read_manifest
from ats.experiments.console import say
from ats.experiments.image_kinds import counted
from ats.experiments.inputs import LookOptions, answer, check_for, load_for, mask_for, open_for, probabilities
from ats.experiments.options import Draws, check_stop, parse
from ats.experiments.trained import TrainedModel
from ats.models import SamplingClassifier
from ats.sources import open_image
from ats.sources.whole import check_whole


@dataclass(frozen=True)
class PredictOptions(LookOptions):
    """Label, probabilities, standard errors and patches used, a row an image file, as CSV."""

    checkpoint: tyro.conf.Positional[Path] = field(kw_only=True)
    """A run's folder, or its checkpoints/last.ckpt, as `ats train` wrote it."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files and slides, each of any size."""
    mask: tuple[Path, ...] = ()
    """Where to look: for each image, in their order, an image file or GeoJSON polygons."""
    manifest: Path | None = None
    """Predict the images that a CSV file lists in its column path, in place of naming them; it may have the columns
    mpp and mask (docs/images.md)."""
    output: Path = Path("predictions.csv")
    """Where the table goes. A file that is there is not overwritten."""
    method: Literal["sample", "topk", "anytime"] = "sample"
    """Draw the patches, take the most probable ones, or draw as many as each image needs (docs/inference.md)."""
    n_patches: Draws | None = None
    """sample, topk: patches an image, of nested attention draws a level (10x3); default: what the model was trained
    with."""
    budget: int = 100
    """anytime: patches an image at most."""
    tolerance: float | None = None
    """anytime: stop once the standard error of every class logit is at most this."""
    lead: float | None = None
    """anytime: stop once the best class leads every other by this many standard errors of their difference."""
    unreadable: Literal["stop", "skip"] = "stop"
    """Files that cannot be read: name them, and then stop or leave them out."""
    seed: int = 0
    """Decides the draws: of each image alone, whatever others there are."""


@dataclass(frozen=True)
class Wanted:
    """An image that is to be predicted: its name in the table, its place, and what is known of it."""

    name: str
    path: Path
    mpp: float | None = None
    mask: Path | None = None
    where: str = ""
    """What messages begin with."""


def wanted_images(options: PredictOptions) -> list[Wanted]:
    """The images named, or listed.

    Raises:
        ValueError: there are none, or both, or another number of masks.
    """
    if not options.images and options.manifest is None:
        raise ValueError("name an image, or more, to predict, or a list of them with --manifest")
    if options.manifest is not None and (options.images or options.mask):
        raise ValueError("--manifest lists the images and their masks: name none beside it")
    if options.mask and len(options.mask) != len(options.images):
        raise ValueError(
            f"--mask names {counted(len(options.mask), 'file')} for {counted(len(options.images), 'image')}; one for "
            "each, in their order, after the images"
        )
    if options.manifest is None:
        masks = options.mask or [None] * len(options.images)
        return [Wanted(str(path), path, options.mpp, mask) for path, mask in zip(options.images, masks, strict=True)]
    manifest = read_manifest(options.manifest, labels=False)
    folder = manifest.path.parent
    found = []
    for row in manifest.rows:
        name = row.path.relative_to(folder) if row.path.is_relative_to(folder) else row.path
        mpp = options.mpp if row.mpp is None else row.mpp
        found.append(Wanted(name.as_posix(), row.path, mpp, row.mask, f"{manifest.where(row)}: "))
    return found


def predict_files(options: PredictOptions) -> str:
    """Write the table, and return what was done.

    Raises:
        FileExistsError: there is a file where the table would go.
        ValueError: a file that cannot be read, unless they are to be left out; options that the model has no use for.
    """
    check_stop(options)
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there already; name another file with --output")
    trained, wanted = load_for(options.checkpoint, options), wanted_images(options)
    unread = _headers(trained, wanted)  # before hours of reading others
    if options.unreadable == "stop":
        _refuse(unread, len(wanted))
    rows = []
    found: dict[str, list[str]] = {}  # what is strange, a line an image of each kind
    for each in wanted:
        try:
            if each in unread:
                raise ValueError(unread[each])
            source, image, strange = open_for(trained, each.path, each.mpp)
            prediction = _predict(options, trained, image, mask_for(trained, source, each.mask, options))
        except (ValueError, OSError) as error:
            text = unread.get(each, f"{each.where}{_named(each, error)}")
            if options.unreadable == "stop":
                raise ValueError(text) from error
            say(f"left out: {text}", stderr=True)
            continue
        if strange is not None:
            found.setdefault(strange.kind, []).append(f"{each.path}: {strange.text}")
        outputs, spread = prediction.logits[0], prediction.standard_error
        row: dict[str, Any] = {"path": each.name, "label": answer(trained, outputs)}
        for name, value in zip(trained.classes, probabilities(trained, outputs), strict=False):
            row[f"probability_{name}"] = f"{value:.6g}"
        for number, name in enumerate(trained.classes):
            row[f"standard_error_{name}"] = "" if spread is None else f"{float(spread[0, number]):.6g}"
        draws = isinstance(trained.model, SamplingClassifier)  # Deep MIL and a CNN read all of an image
        row["patches_used"] = int(prediction.patches_used[0]) if draws else ""
        rows.append(row)
    for texts in found.values():
        also = f" (and so of {counted(len(texts) - 1, 'other')})" if len(texts) > 1 else ""
        say(f"note: {texts[0]}{also}", stderr=True)
    if not rows:
        raise ValueError("none of the images could be read: no table was written")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(options.output, table.getvalue().encode("utf-8", "surrogateescape"))
    return f"{len(rows)} of {counted(len(wanted), 'image')}: {options.output}"


def _headers(trained: TrainedModel, wanted: Sequence[Wanted]) -> dict[Wanted, str]:
    """What is wrong with images, and masks, that are not there, of another kind or cut short; none is decoded."""
    unread = {}
    for each in wanted:
        try:
            check_for(trained, each.path, open_image(each.path, mpp=each.mpp))
            check_whole(each.path)
            if each.mask is not None and not each.mask.exists():
                raise FileNotFoundError(f"{each.path}: its mask {each.mask} is missing; check the path")
        except (ValueError, OSError) as error:
            unread[each] = f"{each.where}{_named(each, error)}"
    return unread


def _named(wanted: Wanted, error: Exception) -> str:
    """What is wrong with an image, which the text names."""
    return str(error) if wanted.path.name in str(error) else f"{wanted.path}: {error}"


def _refuse(unread: dict[Wanted, str], images: int) -> None:
    texts = list(unread.values())
    if len(texts) == 1:
        raise ValueError(texts[0])
    if texts:
        few = "; ".join(texts[:10]) + (f"; and {len(texts) - 10} more" if len(texts) > 10 else "")
        raise ValueError(
            f"{len(texts)} of {images} images cannot be read: {few}. Mend them, or leave them out with --unreadable "
            "skip"
        )


def _predict(options: PredictOptions, trained: TrainedModel, image: Any, mask: Tensor | None) -> Any:
    how: dict[str, Any] = {"n_patches": options.n_patches} if isinstance(trained.model, SamplingClassifier) else {}
    if options.method == "anytime":
        how = {"budget": options.budget, "tolerance": options.tolerance, "lead": options.lead}
    generator = torch.Generator(trained.device).manual_seed(options.seed)
    return trained.predict(image, mask=mask, method=options.method, generator=generator, **how)


def run_predict(arguments: list[str]) -> None:
    """`ats predict`."""
    say(predict_files(parse(PredictOptions, "ats predict", arguments)))
