"""Any of Lightning's loggers, by its name."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from ats.experiments.console import printable


def known_loggers() -> dict[str, type[Logger]]:
    """Lightning's loggers, by names such as "tensorboard" and "wandb"."""
    found = [each for each in vars(loggers).values() if inspect.isclass(each) and issubclass(each, Logger)]
    return {each.__name__.removesuffix("Logger").lower(): each for each in found if each is not Logger}


def make_loggers(names: Sequence[str], folder: Path) -> list[Logger]:
    """The loggers of a run in `folder`, which is the run's name to them.

    Raises:
        ValueError: a name that Lightning does not know, or a logger whose package is not installed.
    """
    known, made = known_loggers(), []
    for name in names:
        if name.lower() not in known:
            raise ValueError(f"unknown logger {name!r} in trainer.loggers, expected some of {', '.join(sorted(known))}")
        if name.lower() == "tensorboard" and printable(folder) != str(folder):  # it takes no names but Unicode's
            continue
        kind = known[name.lower()]
        named = folder.name if name.lower() not in ("tensorboard", "csv") else f"{name.lower()}-log"
        offered = {
            "save_dir": str(folder),
            "name": "tensorboard" if name.lower() == "tensorboard" else named,
            "run_name": folder.name,
            "experiment_name": "ats",
            "project": "ats",
        }
        taken = inspect.signature(kind).parameters
        try:
            made.append(kind(**{option: value for option, value in offered.items() if option in taken}))
        except ImportError as error:
            raise ValueError(f"trainer.loggers {name} needs a package that is not installed: {error}") from error
    return made
