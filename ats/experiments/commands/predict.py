"""`ats predict`: what a trained model makes of images of yours, as a table."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from ats._files import write_whole
from ats.experiments.console import say
from ats.experiments.inputs import answer, open_for, probabilities
from ats.experiments.options import parse
from ats.experiments.trained import TrainedModel, load
from ats.models import ATSClassifier


@dataclass(frozen=True)
class PredictOptions:
    """Label, probabilities, standard errors and patches used, a row an image file, as CSV."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, or its checkpoints/last.ckpt, as `ats train` wrote it."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files and slides, each of any size."""
    output: Path = Path("predictions.csv")
    """Where the table goes. A file that is there is not overwritten."""
    method: Literal["sample", "topk", "anytime"] = "sample"
    """Draw the patches, take the most probable ones, or draw as many as each image needs (docs/inference.md)."""
    n_patches: int | None = None
    """sample, topk: patches an image; default: what the model was trained with."""
    budget: int = 100
    """anytime: patches an image at most."""
    tolerance: float | None = None
    """anytime: stop once the standard error of every class logit is at most this."""
    lead: float | None = None
    """anytime: stop once the best class leads every other by this many standard errors of their difference."""
    mpp: float | None = None
    """Micrometres a pixel of the images, in place of what they say."""
    unreadable: Literal["stop", "skip"] = "stop"
    """Files that cannot be read: stop at the first, or name them and leave them out."""
    seed: int = 0
    """Decides the draws: of each image alone, whatever others there are."""
    device: str = "cpu"
    """cpu, cuda, …"""

    def __post_init__(self) -> None:
        """Refuse to predict nothing."""
        if not self.images:
            raise ValueError("name an image, or more, to predict")


def predict_files(options: PredictOptions) -> str:
    """Write the table, and return what was done.

    Raises:
        FileExistsError: there is a file where the table would go.
        ValueError: a file that cannot be read, unless they are to be left out; options that the model has no use for.
    """
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there already; name another file with --output")
    trained = load(options.checkpoint, device=options.device)
    rows = []
    for path in options.images:
        try:
            _, image = open_for(trained, path, options.mpp)
            prediction = _predict(options, trained, image)
        except (ValueError, OSError) as error:
            if options.unreadable == "stop":
                raise
            say(f"left out: {error}", stderr=True)
            continue
        outputs, spread = prediction.logits[0], prediction.standard_error
        row: dict[str, Any] = {"path": str(path), "label": answer(trained, outputs)}
        for name, value in zip(trained.classes, probabilities(trained, outputs), strict=False):
            row[f"probability_{name}"] = f"{value:.6g}"
        for number, name in enumerate(trained.classes):
            row[f"standard_error_{name}"] = "" if spread is None else f"{float(spread[0, number]):.6g}"
        row["patches_used"] = int(prediction.patches_used[0])
        rows.append(row)
    if not rows:
        raise ValueError("none of the images could be read: no table was written")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(options.output, text.getvalue().encode("utf-8", "surrogateescape"))
    return f"{len(rows)} of {len(options.images)} images: {options.output}"


def _predict(options: PredictOptions, trained: TrainedModel, image: Any) -> Any:
    how: dict[str, Any] = {"n_patches": options.n_patches} if isinstance(trained.model, ATSClassifier) else {}
    if options.method == "anytime":
        how = {"budget": options.budget, "tolerance": options.tolerance, "lead": options.lead}
    generator = torch.Generator(trained.device).manual_seed(options.seed)
    return trained.predict(image, method=options.method, generator=generator, **how)


def run_predict(arguments: list[str]) -> None:
    """`ats predict`."""
    say(predict_files(parse(PredictOptions, "ats predict", arguments)))
