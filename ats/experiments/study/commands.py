"""`ats study` variance, training, inference and attention: their options."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ats.experiments.options import parse
from ats.experiments.study.attention import AttentionOptions
from ats.experiments.study.attention_report import study_attention
from ats.experiments.study.inference import InferenceOptions
from ats.experiments.study.inference_report import study_inference
from ats.experiments.study.training import TrainingOptions
from ats.experiments.study.training_report import study_training
from ats.experiments.study.variance import QUICK, VarianceOptions
from ats.experiments.study.variance_report import study_variance

_HELP = """usage: ats study {variance,training,inference,attention} [OPTIONS]

  variance   variance and bias of every estimator, of one draw
  training   small Megapixel MNIST trained with each formula of the gradient
  inference  what each way to predict with trained models is worth, and what its stated errors cover
  attention  how well trained attention ranks what is to be found, and how much of its gradient is signal

`ats study STUDY --help` lists a study's options.
"""


@dataclass(frozen=True)
class VarianceCommand:
    """Variance and bias of every estimator and its gradient, as attention sharpens and as more patches are drawn."""

    output: Path | None = None
    """Folder for results/variance.json, results/variance.md and variance.png. By default the tables are only shown."""
    quick: bool = False
    """A few settings and draws, in seconds: to see that it works."""
    seed: int = 0
    """Decides attentions, features and draws."""


@dataclass(frozen=True)
class TrainingCommand:
    """Small Megapixel MNIST, trained with each formula of the gradient and everything else the same."""

    options: Annotated[TrainingOptions, tyro.conf.arg(name="")] = field(default_factory=TrainingOptions)
    output: Path | None = None
    """Folder for results/training.json, results/training.md and training.png. By default the table is only shown."""


@dataclass(frozen=True)
class InferenceCommand:
    """Error by patches read, and what the stated intervals cover, of trained models."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    """Runs' folders, or their checkpoints/last.ckpt, as `ats train` wrote them."""
    options: Annotated[InferenceOptions, tyro.conf.arg(name="")] = field(default_factory=InferenceOptions)
    data_folder: Path | None = None
    """Folder of the data set, where it is not the one that the runs were trained with."""
    output: Path | None = None
    """Folder for results/inference.json and results/inference.md. By default the tables are only shown."""


@dataclass(frozen=True)
class AttentionCommand:
    """How well trained attention ranks what is to be found, and how much of its gradient is signal."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Runs' folders, or their checkpoints/last.ckpt, as `ats train` wrote them."""
    options: Annotated[AttentionOptions, tyro.conf.arg(name="")] = field(default_factory=AttentionOptions)
    data_folder: Path | None = None
    """Folder of the data set, where it is not the one that the runs were trained with."""
    device: str = "cpu"
    """cpu, cuda, …"""
    output: Path | None = None
    """A new file, FILE.json or FILE.md. By default the table is only shown."""


def _variance(arguments: list[str]) -> None:
    variance = parse(VarianceCommand, "ats study variance", arguments)
    if variance.seed < 0:
        raise ValueError(f"seed must be at least 0, got {variance.seed}")
    options = QUICK if variance.quick else VarianceOptions()
    study_variance(dataclasses.replace(options, seed=variance.seed), variance.output)


def _training(arguments: list[str]) -> None:
    training = parse(TrainingCommand, "ats study training", arguments)
    study_training(training.options, training.output)


def _inference(arguments: list[str]) -> None:
    inference = parse(InferenceCommand, "ats study inference", arguments)
    study_inference(inference.checkpoints, inference.options, inference.data_folder, inference.output)


def _attention(arguments: list[str]) -> None:
    attention = parse(AttentionCommand, "ats study attention", arguments)
    study_attention(attention.runs, attention.options, attention.data_folder, attention.output, attention.device)


STUDIES = {"variance": _variance, "training": _training, "inference": _inference, "attention": _attention}
"""By name."""


def run_study(arguments: list[str]) -> None:
    """Run the study that the first argument names."""
    study, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if study in ("-h", "--help"):
        print(_HELP, end="")
        return
    if study not in STUDIES:
        raise ValueError(f"unknown study {study!r}, expected one of {', '.join(STUDIES)}")
    STUDIES[study](rest)
