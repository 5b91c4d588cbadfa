"""The commands behind ``ats``: their options, and errors as one line rather than a traceback."""

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.table import Table

from ats._files import write_json
from ats.experiments.commands.attention import AttentionOptions, draw_image
from ats.experiments.commands.demo import run_demo
from ats.experiments.commands.predict import PredictOptions, predict_files
from ats.experiments.commands.synthesise import SynthesiseOptions, synthesise
from ats.experiments.config import ExperimentConfig
from ats.experiments.console import printable, say
from ats.experiments.evaluation import Evaluation, evaluate
from ats.experiments.options import parse
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.reproduce.command import ReproduceOptions, reproduce
from ats.experiments.study.commands import run_study
from ats.experiments.trained import load
from ats.experiments.training import InterruptedRunError, LostRankError, train
from ats.version import __version__

_HELP = f"""usage: ats COMMAND [OPTIONS]

Attention sampling: learn from images too large to process whole.

commands:
  train EXPERIMENT      train a model; experiments: {", ".join(EXPERIMENTS)}
  evaluate CHECKPOINT   error and loss on images that were not trained on
  predict RUN IMAGES    what a trained model makes of any images, as a table
  attention RUN IMAGE   where a trained model looks in any image, as a picture, a table or for QuPath
  reproduce TABLE       the paper's tables: table1, table2, mnist, figures or all; runs what is missing
  synthesise DATA TO    write a small synthetic data set, laid out as a real one is
  demo                  attention sampling beside uniform sampling, in minutes on a CPU
  study STUDY           variance: of the estimators; training: by their gradients; inference: with trained models

`ats COMMAND --help` lists a command's options; `ats --version` prints the version.
"""


@dataclass(frozen=True)
class EvaluateOptions:
    """Error and loss of trained models on images that they were not trained on."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Runs' folders, or their checkpoints/last.ckpt, as `ats train` wrote them."""
    method: Literal["sample", "topk", "anytime"] = "sample"
    """Draw the patches, take the most probable ones, or draw as many as each image needs (docs/inference.md)."""
    n_patches: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """sample, topk: patches an image; default: what the model was trained with. Give it again for another number."""
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


@dataclass(frozen=True)
class DemoOptions:
    """Attention sampling beside uniform sampling on Megapixel MNIST, from scratch on the CPU."""

    seed: int = 0
    """Decides images, weights, the order of the data and the draws."""
    output: Path = Path("runs/demo")
    """Folder for the two runs, metrics.json and attention.png. A complete demo there is renamed, not overwritten."""


def run(arguments: Sequence[str]) -> int:
    """Run a command line, without the program's name, and return the exit status."""
    command, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "predict": _predict,
        "attention": _attention,
        "reproduce": _reproduce,
        "synthesise": _synthesise,
        "demo": _demo,
        "study": run_study,
    }
    if command in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in commands:
        say(f"ats: unknown command {command!r}, expected one of {', '.join(commands)}", stderr=True)
        return 2
    rank = os.environ.get("RANK", "0")
    if command != "train" and rank.isdecimal() and int(rank) > 0:  # torchrun starts it as often as there are devices
        return 0
    try:
        commands[command](rest)
    except SystemExit as stop:  # the options' parser has said what is wrong, or helped
        return int(stop.code or 0)
    except (InterruptedRunError, KeyboardInterrupt) as stop:
        say(f"ats: {stop or 'interrupted'}", stderr=True)
        return 130
    except (
        ValueError,
        OSError,
        LostRankError,
        MisconfigurationException,
    ) as error:  # what a user can mend; a defect keeps its traceback
        say(f"ats: {_as_line(error)}", stderr=True)
        return 1
    return 0


def _as_line(error: Exception) -> str:
    """An error as a line. The system's own begin with a number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _train(arguments: list[str]) -> None:
    experiment = arguments[0] if arguments else "--help"
    if experiment in ("-h", "--help"):
        print(f"usage: ats train {{{','.join(EXPERIMENTS)}}} [OPTIONS]\n\nats train EXPERIMENT --help lists them.")
        return
    if experiment not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {experiment!r}, expected one of {', '.join(EXPERIMENTS)}")
    # The preset decides what the other options default to, so it is looked for first.
    first = argparse.ArgumentParser(prog=f"ats train {experiment}", add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=ExperimentConfig.preset)
    preset = first.parse_known_args(arguments[1:])[0].preset
    presets = EXPERIMENTS[experiment].presets
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r} of {experiment}, expected one of {', '.join(presets)}")
    config = parse(
        ExperimentConfig,
        f"ats train {experiment}",
        arguments[1:],
        default=presets[preset],
        config=(tyro.conf.AvoidSubcommands,),  # the preset has the experiment's own kind of data
    )
    checkpoint = train(config)
    say(f"Evaluate with: ats evaluate {shlex.quote(str(checkpoint))}")


def _evaluate(arguments: list[str]) -> None:
    options = parse(EvaluateOptions, "ats evaluate", arguments)
    if options.output is not None and options.output.is_dir():
        raise ValueError(f"--output {options.output} is a folder; name a file")
    if options.output is not None and options.output.exists():
        raise FileExistsError(f"{options.output} is there already; name another file with --output")
    models = [load(checkpoint) for checkpoint in options.checkpoints]  # a bad one is not found an hour later
    found = []
    for checkpoint, trained in zip(options.checkpoints, models, strict=True):
        try:
            trained.to(torch.device(options.device))
        except (RuntimeError, AssertionError) as error:  # torch's for a device that it does not know or have
            raise ValueError(f"--device {options.device} cannot be used here: {error}") from error
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
    table = Table(
        title=f"{printable(checkpoint)}: {result.images} test images of {result.data}, {patches}{result.method}"
    )
    for column in ("", "error", "loss"):
        table.add_column(column, justify="left" if not column else "right")
    spread = f" ± {result.error_spread:.4f}" if result.repeats > 1 else ""
    first = f"one draw (mean of {result.repeats})" if result.n_patches else ""
    table.add_row(first, f"{result.error:.4f}{spread}", f"{result.loss:.4f}")
    if result.repeats > 1:
        averaged = f"{result.averaged_error:.4f}", f"{result.averaged_loss:.4f}"
        table.add_row(f"prediction averaged over {result.repeats} draws", *averaged)
    return table


def _attention(arguments: list[str]) -> None:
    answer = draw_image(parse(AttentionOptions, "ats attention", arguments))
    say(answer)


def _predict(arguments: list[str]) -> None:
    say(predict_files(parse(PredictOptions, "ats predict", arguments)))


def _reproduce(arguments: list[str]) -> None:
    reproduce(parse(ReproduceOptions, "ats reproduce", arguments))


def _synthesise(arguments: list[str]) -> None:
    options = parse(SynthesiseOptions, "ats synthesise", arguments)
    for line in synthesise(options):
        say(line)
    say(f"Train on it with: --data.folder {shlex.quote(str(options.folder))}")


def _demo(arguments: list[str]) -> None:
    options = parse(DemoOptions, "ats demo", arguments)
    run_demo(options.output, options.seed)
