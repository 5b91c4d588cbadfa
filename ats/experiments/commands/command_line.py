"""The commands behind ``ats``: which there are, and errors as one line rather than a traceback.

Each command's module is imported when it is called for: `ats --help` needs neither PyTorch nor an extra.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from ats.version import __version__


class Command(NamedTuple):
    """What a command is called with, what it does, and where: a function that takes its arguments."""

    takes: str
    does: str
    module: str
    function: str

    def load(self) -> Callable[[list[str]], None]:
        """The function.

        Raises:
            ModuleNotFoundError: what the commands need is not installed; says how to get it.
        """
        try:
            function: Callable[[list[str]], None] = getattr(import_module(self.module), self.function)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("ats", "ats_kernels"):
                raise
            raise ModuleNotFoundError(
                f"{error.name} is not installed; the commands need: pip install 'torch-ats[experiments]'",
                name=error.name,
            ) from error
        return function


_HERE = "ats.experiments.commands"
COMMANDS = {
    "train": Command(
        "EXPERIMENT", "train a model; `ats train --help` lists the experiments", f"{_HERE}.train", "run_train"
    ),
    "evaluate": Command(
        "RUN", "error and loss on images that were not trained on", f"{_HERE}.evaluate", "run_evaluate"
    ),
    "predict": Command(
        "RUN IMAGES", "what a trained model makes of any images, as a table", f"{_HERE}.predict", "run_predict"
    ),
    "attention": Command(
        "RUN IMAGE",
        "where a trained model looks in any image, as a picture, a table or for QuPath",
        f"{_HERE}.attention",
        "run_attention",
    ),
    "reproduce": Command(
        "TABLE",
        "the paper's tables: table1, table2, mnist, …, figures or all; runs what is missing",
        "ats.experiments.reproduce.command",
        "run_reproduce",
    ),
    "synthesise": Command(
        "DATA TO",
        "write a small synthetic data set, laid out as a real one is",
        f"{_HERE}.synthesise",
        "run_synthesise",
    ),
    "demo": Command(
        "", "attention sampling beside uniform sampling, in minutes on a CPU", f"{_HERE}.demo", "run_command"
    ),
    "study": Command(
        "STUDY",
        "of the estimators' variance, of training by their gradients, of trained inference and attention",
        "ats.experiments.study.commands",
        "run_study",
    ),
    "completion": Command("SHELL", "let bash or zsh complete all this", f"{_HERE}.completion", "run_completion"),
}
"""By name, in the order in which they are shown."""


def _help() -> str:
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    lines = [f"  {f'{name} {command.takes}':{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "usage: ats COMMAND [OPTIONS]",
            "",
            "Attention sampling: learn from images too large to process whole.",
            "",
            "commands:",
            *lines,
            "",
            "`ats COMMAND --help` lists a command's options; `ats --version` prints the version.",
        )
    )


def run(arguments: Sequence[str]) -> int:
    """Run a command line, without the program's name, and return the exit status."""
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}, expected one of {', '.join(COMMANDS)}", 2)
    rank = os.environ.get("RANK", "0")
    if name != "train" and rank.isdecimal() and int(rank) > 0:  # torchrun starts it as often as there are devices
        return 0
    try:
        command = COMMANDS[name].load()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("ats", "ats_kernels"):
            raise
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return _run(command, rest)


def _run(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    # What the command has imported by now.
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from ats.experiments.options import UsageError
    from ats.experiments.training import InterruptedRunError, LostRankError

    try:
        command(arguments)
    except SystemExit as stop:  # the options' parser has said what is wrong, or helped
        return int(stop.code or 0)
    except UsageError as error:
        return _fail(_as_line(error), 2)
    except (InterruptedRunError, KeyboardInterrupt) as stop:
        return _fail(str(stop) or "interrupted", 130)
    except (
        ValueError,
        OSError,
        LostRankError,
        MisconfigurationException,
    ) as error:  # what a user can mend; a defect keeps its traceback
        return _fail(_as_line(error), 1)
    except ModuleNotFoundError as error:  # an extra that a file or an option needs
        if "pip install" not in str(error):
            raise
        return _fail(str(error), 1)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"ats: {message}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return status


def _as_line(error: Exception) -> str:
    """An error as a line. The system's own begin with a number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
