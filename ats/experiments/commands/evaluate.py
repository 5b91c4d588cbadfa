"""`ats evaluate`: error and loss of trained models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.table import Table

from ats._files import write_json
from ats.experiments.console import printable, say
from ats.experiments.evaluation import Evaluation, evaluate
from ats.experiments.inputs import load_and_say, on_device
from ats.experiments.options import Draws, check_stop, parse


@dataclass(frozen=True)
class EvaluateOptions:
    """Error and loss of trained models on images that they were not trained on."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Runs' folders, or their checkpoints/last.ckpt, as `ats train` wrote them."""
    method: Literal["sample", "topk", "anytime"] = "sample"
    """Draw the patches, take the most probable ones, or draw as many as each image needs (docs/inference.md)."""
    n_patches: tyro.conf.UseAppendAction[tuple[Draws, ...]] = ()
    """sample, topk: patches an image, of nested attention draws a level (10x3); default: what the model was trained
    with. Give it again for another number."""
    budget: int = 100
    """anytime: patches an image at most."""
    tolerance: float | None = None
    """anytime: stop once the standard error of every class logit is at most this."""
    lead: float | None = None
    """anytime: stop once the best class leads every other by this many standard errors of their difference."""
    repeats: int = 1
    """Draws an image. Error and loss are averaged over them; the error of the averaged prediction is given too."""
    data_folder: Path | None = None
    """Folder of the data set, where it is not the one that the run was trained with."""
    images: int | None = None
    """How many test images; default: as configured for the run."""
    seed: int = 0
    """Decides the draws."""
    device: str = "cpu"
    """cpu, cuda, …"""
    output: Path | None = None
    """Also write the numbers to this JSON file, a new one: a list with an object for each model and number of
    patches."""

    def __post_init__(self) -> None:
        """Refuse to evaluate nothing."""
        if not self.checkpoints:
            raise ValueError("name a run, or a checkpoint, to evaluate")


def run_evaluate(arguments: list[str]) -> None:
    """`ats evaluate`: error and loss of runs, as tables and as JSON."""
    options = parse(EvaluateOptions, "ats evaluate", arguments)
    check_stop(options)
    if options.output is not None and options.output.is_dir():
        raise ValueError(f"--output {options.output} is a folder; name a file")
    if options.output is not None and options.output.exists():
        raise FileExistsError(f"{options.output} is there already; name another file with --output")
    models = [load_and_say(checkpoint) for checkpoint in options.checkpoints]  # a bad one is not found an hour later
    found = []
    for checkpoint, trained in zip(options.checkpoints, models, strict=True):
        on_device(trained, options.device)
        for n_patches in options.n_patches or (None,):
            result = evaluate(
                trained,
                method=options.method,
                n_patches=n_patches,
                budget=options.budget,
                tolerance=options.tolerance,
                lead=options.lead,
                repeats=options.repeats,
                images=options.images,
                folder=options.data_folder,
                seed=options.seed,
            )
            say(_evaluation_table(checkpoint, result))
            found.append({"checkpoint": str(checkpoint), "seed": options.seed} | result.to_dict())
    if options.output is not None:
        try:
            write_json(options.output, found, overwrite=False)
        except FileExistsError as error:  # another command was quicker
            raise FileExistsError(
                f"{options.output} is there by now, of another command; what this one found is above"
            ) from error


def _evaluation_table(checkpoint: Path, result: Evaluation) -> Table:
    patches = f"{result.n_patches:.4g} patches, " if result.n_patches else ""
    what = f"{result.images} test images, {patches}{result.method}. Data: {result.data}"
    table = Table(title=f"{printable(checkpoint)}: {what}")
    for column in ("", "error", "loss"):
        table.add_column(column, justify="left" if not column else "right")
    spread = f" ± {result.error_spread:.4f}" if result.repeats > 1 else ""
    first = "the most probable" if result.method == "topk" else "one draw" if result.n_patches else ""
    first += f" (mean ± spread of {result.repeats})" if spread else ""
    table.add_row(first, f"{result.error:.4f}{spread}", f"{result.loss:.4f}")
    if result.repeats > 1:
        averaged = f"{result.averaged_error:.4f}", f"{result.averaged_loss:.4f}"
        table.add_row(f"prediction averaged over {result.repeats} draws", *averaged)
    return table
