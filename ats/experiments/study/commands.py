"""`ats study variance` and `ats study training`: their options."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ats.experiments.study.training import TrainingOptions
from ats.experiments.study.training_report import study_training
from ats.experiments.study.variance import QUICK, VarianceOptions
from ats.experiments.study.variance_report import study_variance

_HELP = """usage: ats study {variance,training} [OPTIONS]

  variance   variance and bias of every estimator, of one draw
  training   small Megapixel MNIST trained with each formula of the gradient

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
    """Of the attentions, the features and the draws."""


@dataclass(frozen=True)
class TrainingCommand:
    """Small Megapixel MNIST, trained with each formula of the gradient and everything else the same."""

    options: Annotated[TrainingOptions, tyro.conf.arg(name="")] = field(default_factory=TrainingOptions)
    output: Path | None = None
    """Folder for results/training.json, results/training.md and training.png. By default the table is only shown."""


def run_study(arguments: list[str]) -> None:
    """Run the study that the first argument names."""
    study, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if study in ("-h", "--help"):
        print(_HELP, end="")
    elif study == "variance":
        variance = tyro.cli(VarianceCommand, prog="ats study variance", args=rest)
        if variance.seed < 0:
            raise ValueError(f"seed must be at least 0, got {variance.seed}")
        options = QUICK if variance.quick else VarianceOptions()
        study_variance(dataclasses.replace(options, seed=variance.seed), variance.output)
    elif study == "training":
        training = tyro.cli(TrainingCommand, prog="ats study training", args=rest)
        study_training(training.options, training.output)
    else:
        raise ValueError(f"unknown study {study!r}, expected 'variance' or 'training'")
