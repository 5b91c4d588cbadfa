"""The demo: attention sampling beside uniform sampling on Megapixel MNIST, from scratch, in minutes on a CPU."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from ats._files import read_object, write_json
from ats.experiments.config import ExperimentConfig
from ats.experiments.console import plain_console
from ats.experiments.evaluation import Evaluation, evaluate
from ats.experiments.experiment import ExperimentData
from ats.experiments.options import parse
from ats.experiments.plotting.figures import draw_attention
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.experiments.trained import load
from ats.experiments.training import train
from ats.models import ATSClassifier

# By the name of the run's folder.
_METHODS: dict[str, Literal["ats", "uniform"]] = {"learned": "ats", "uniform": "uniform"}
_SHOWN = 4  # images in the picture
_REPEATS = 5  # draws an image for the averaged prediction
_TEST_PATCHES = 16  # testing is cheap beside training, and more patches leave less to chance


@dataclass(frozen=True)
class DemoOptions:
    """Attention sampling beside uniform sampling on Megapixel MNIST, from scratch on the CPU."""

    seed: int = 0
    """Decides images, weights, the order of the data and the draws."""
    output: Path = Path("runs/demo")
    """Folder for the two runs, metrics.json and attention.png. A complete demo there is renamed, not overwritten."""


def run_demo(
    folder: Path, seed: int, config: ExperimentConfig = EXPERIMENTS["megapixel-mnist"].presets["demo"]
) -> None:
    """Train both models, print a table, and write metrics.json and attention.png to `folder`.

    A demo that was interrupted goes on; one that is complete is kept beside the new one, under another name.

    Raises:
        ValueError: a folder that cannot be renamed, because it is the current one or holds it, or that is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; name a folder, e.g. --output runs/demo")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--output {folder} is the current folder or one around it; name one for the demo alone, "
            "e.g. --output runs/demo"
        )
    console, config = plain_console(), dataclasses.replace(config, seed=seed)
    if (folder / "metrics.json").exists() and (folder / "learned" / "config.json").exists():
        kept = _set_aside(folder)
        console.print(f"The demo that was in {folder} is now in {kept}.", soft_wrap=True)
    data = experiment_data(config)
    images, size = len(data.labels("train")), data.examples("test", torch.tensor([0], device="cpu"))[0].shape[-1]
    picture = folder / "attention.png"
    results: dict[str, tuple[Evaluation, float]] = {}
    for attention, method in _METHODS.items():
        run = dataclasses.replace(
            config,
            output=folder / attention,
            model=dataclasses.replace(config.model, method=method),
        )
        console.print(
            f"Training with {attention} attention: {images:,} images of {size}×{size}, "
            f"{run.optim.epochs} epochs, {run.model.n_patches} patches an image"
        )
        checkpoint = train(run)
        seconds = read_object(folder / attention / "training.json", "seconds")["seconds"]
        tested = evaluate(load(checkpoint), n_patches=_TEST_PATCHES, repeats=_REPEATS, seed=seed, data=data)
        results[attention] = tested, seconds
        if attention == "learned":  # there to be looked at while the other one trains
            _draw(checkpoint, data, picture)
            console.print(
                f"It errs on {tested.error:.3f} of {tested.images} unseen images. What it looked at: {picture}",
                soft_wrap=True,
            )

    (ours, seconds), (uniform, uniform_seconds) = results["learned"], results["uniform"]
    metrics = {
        "test_error": ours.error,
        "test_error_averaged": ours.averaged_error,
        "test_loss": ours.loss,
        "uniform_test_error": uniform.error,
        "uniform_test_error_averaged": uniform.averaged_error,
        "uniform_test_loss": uniform.loss,
        "seconds": seconds,
        "uniform_seconds": uniform_seconds,
        "n_patches": ours.n_patches,
        "train_n_patches": config.model.n_patches,
        "image_size": size,
        "train_images": images,
        "test_images": ours.images,
        "epochs": config.optim.epochs,
        "repeats": _REPEATS,
        "seed": seed,
    }
    write_json(folder / "metrics.json", metrics)
    console.print(_table(results, config.model.patch_size, size))
    console.print(f"The numbers: {folder / 'metrics.json'}", soft_wrap=True)


def _table(results: dict[str, tuple[Evaluation, float]], patch_size: int, image_size: int) -> Table:
    evaluation = results["learned"][0]
    read = evaluation.n_patches * patch_size**2 / image_size**2
    table = Table(title=f"Megapixel MNIST, {evaluation.images} unseen images, {read:.0%} of the pixels read")
    for column in ("", "test error", "± from draw to draw", f"{_REPEATS} draws averaged", "test loss", "training"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"learned": f"ATS-{evaluation.n_patches}", "uniform": f"uniform-{evaluation.n_patches}"}
    for attention, (result, seconds) in results.items():
        table.add_row(
            names[attention],
            f"{result.error:.3f}",
            f"{result.error_spread:.3f}",
            f"{result.averaged_error:.3f}",
            f"{result.loss:.3f}",
            f"{seconds:.0f} s",
        )
    table.add_row("guessing", "0.900", "", "", "2.303", "")
    return table


def _draw(checkpoint: Path, data: ExperimentData, path: Path) -> None:
    trained = load(checkpoint)
    view, image, label = data.load("test", torch.arange(_SHOWN, device="cpu"))
    assert isinstance(trained.model, ATSClassifier)
    draw_attention(trained.model, view, image, label, path, generator=torch.Generator().manual_seed(data.config.seed))


def _set_aside(folder: Path) -> Path:
    number = 1
    while (kept := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(kept)
    return kept


def run_command(arguments: list[str]) -> None:
    """`ats demo`."""
    options = parse(DemoOptions, "ats demo", arguments)
    run_demo(options.output, options.seed)
