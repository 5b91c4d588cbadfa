"""The commands that the pages show, and whether what they name is there: nothing is trained, installed or timed."""

import argparse
import dataclasses
import functools
import re
import runpy
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ats.experiments.commands.command_line import COMMANDS
from ats.experiments.commands.completion import options_of
from ats.experiments.config import ExperimentConfig
from ats.experiments.options import UsageError, check_stop
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.study.commands import STUDIES
from ats_kernels import backend

ROOT = Path(__file__).parent.parent
PROGRAMS = (
    *("ats", "make", "python", "python3", "pip", "pytest", "torchrun", "git"),  # which are read below
    *("bash", "cd", "conda", "curl", "docker", "eval", "export", "sbatch", "sh", "source", "srun", "uv", "wget"),
)
"""What a line must begin with, after the environment's variables, to be a command."""
FOREIGN = re.compile(r"OMP_\w+|MALLOC_\w+|TRITON_INTERPRET")
"""Variables of the environment that other programs read."""


class PageCommand(NamedTuple):
    """A command line of a page: where it stands, the variables before it, its words; or a part of a sentence."""

    page: str
    line: int
    variables: tuple[str, ...]
    words: tuple[str, ...]
    inline: bool = False

    @property
    def text(self) -> str:
        """All of it, as one line."""
        return " ".join((*self.variables, *(f'"{word}"' if " " in word else word for word in self.words)))

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[Path]:
    """What users and contributors read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _command(page: str, number: int, line: str, inline: bool = False) -> PageCommand | None:
    text = line.strip().removeprefix("$ ")
    if not re.match(rf"(\w+=\S* +)*({'|'.join(PROGRAMS)})(\s|$)", text):
        return None
    try:
        words = shlex.split(text.split("|")[0] if inline else text, comments=not inline)
    except ValueError:
        assert inline, f"{page}:{number}: a shell cannot read: {text}"
        return None
    count = next(index for index, word in enumerate(words) if word in PROGRAMS)
    return PageCommand(page, number, tuple(words[:count]), tuple(words[count:]), inline)


def shown(text: str, page: str = "page.md") -> list[PageCommand]:
    """The commands of a page's blocks of code, then those in its sentences that have more than a command's name."""
    found, prose, begun, fence = [], [], "", None
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("```"):
            fence = line.strip().strip("`") if fence is None else None
        in_block = fence in ("", "sh", "bash", "shell", "console") or (fence is None and line.startswith("    "))
        prose.append(line if fence is None and not line.lstrip().startswith("```") and not in_block else "")
        if not in_block:
            begun = ""
            continue
        whole = begun + line.strip()
        if whole.endswith("\\") and number < len(lines):
            begun = whole[:-1]
            continue
        begun = ""
        if command := _command(page, number, whole):
            found.append(command)
    rest = "\n".join(prose)
    for span in re.finditer(r"`([^`]+)`", rest):
        command = _command(page, rest[: span.start()].count("\n") + 1, " ".join(span[1].split()), inline=True)
        if command and len(command.words) > 1:
            found.append(command)
    return found


def section(page: str, heading: str) -> str:
    """A page's text from a heading to the next."""
    return (ROOT / page).read_text().partition(f"{heading}\n")[2].partition("\n## ")[0]


@functools.cache
def commands() -> tuple[PageCommand, ...]:
    """Those of all pages."""
    return tuple(each for path in pages() for each in shown(path.read_text(), path.relative_to(ROOT).as_posix()))


# What can be wrong with a command, by its program: a text, or "".


class _Read(BaseException):
    """A parser has read a command line, which goes no further."""


def problem(command: PageCommand, patch: pytest.MonkeyPatch) -> str:
    """What a command names that is not there."""
    for variable in command.variables:
        if text := _variable(*variable.split("=", 1)):
            return text
    program, *rest = (word for word in command.words if word != "…")  # and so on
    if program == "eval":
        inner = _command(command.page, command.line, rest[0].removeprefix("$(").removesuffix(")"))
        return problem(inner, patch) if inner else 'only eval "$(…)" of a command is read'
    if program == "ats":
        return _partial(rest) if command.inline else _ats(rest, patch)
    readers: dict[str, Callable[[list[str], pytest.MonkeyPatch], str]] = {
        "make": _make, "python": _python, "pip": _pip, "pytest": _pytest
    }  # fmt: skip
    return readers[program](rest, patch) if program in readers else f"nothing reads {program} yet: add it here"


def _variable(name: str, value: str) -> str:
    if FOREIGN.fullmatch(name):
        return ""
    if name == "ATS_BACKEND":
        return "" if value in backend._CHOICES else f"ATS_BACKEND is one of {backend._CHOICES}"
    sources = (path.read_text() for folder in ("ats", "ats_kernels") for path in (ROOT / folder).rglob("*.py"))
    return "" if any(f'"{name}"' in source for source in sources) else f"nothing reads the variable {name}"


def _ats(words: list[str], patch: pytest.MonkeyPatch) -> str:
    """Let a command's own parser read its options."""
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    command = COMMANDS[words[0]]
    module = import_module(command.module)
    parse = module.parse

    def read(*arguments: Any, **how: Any) -> None:
        options = parse(*arguments, **how)
        if hasattr(options, "tolerance"):
            check_stop(options)
        raise _Read

    with patch.context() as patched:
        patched.setattr(module, "parse", read)
        try:
            command.load()(words[1:])
        except _Read:
            return ""
        except (UsageError, ValueError) as error:
            return str(error)
        except SystemExit:  # --help
            return ""
    return "" if "--help" in words else "its options were not read"


def _partial(words: list[str]) -> str:
    """A part of a command line in a sentence: commands, subcommands and options that it names."""
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    second = words[1] if words[1:] and re.fullmatch(r"[a-z][\w-]*", words[1]) else ""
    choices = {"train": tuple(EXPERIMENTS), "study": tuple(STUDIES)}.get(words[0])
    if second and choices and second not in choices:
        return f"ats {words[0]} has no {second}"
    known = ats_options(words[0], second if choices else "")
    named = (word.partition("=")[0] for word in words if word.startswith("--"))
    return next((f"there is no option {option}" for option in named if option not in known), "")


@functools.cache
def ats_options(name: str, second: str = "") -> frozenset[str]:
    """The options of a command; of all its experiments or studies where none is named."""
    if name == "train":
        kinds = [EXPERIMENTS[each].presets["modern"] for each in ([second] if second else EXPERIMENTS)]
        return frozenset({"--help"}).union(*(_fields(kind) for kind in kinds))
    seconds = [second] if second else list(STUDIES) if name == "study" else []
    found = [options_of([name, *filter(None, [each])]) for each in seconds or [""]]
    return frozenset({"--help"}).union(*found)


def _fields(values: ExperimentConfig, before: str = "") -> Iterator[str]:
    """Options of a dataclass, with those of its parts."""
    for field in dataclasses.fields(values):
        name, value = field.name.replace("_", "-"), getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(typing.cast("ExperimentConfig", value), f"{before}{name}.")
        else:
            yield f"--{before}{name}"
            if isinstance(value, bool):
                yield f"--{before}no-{name}"


def _make(words: list[str], patch: pytest.MonkeyPatch) -> str:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([\w-]+):(?!=)", makefile, flags=re.MULTILINE)
    if words[0] not in targets:
        return f"there is no target {words[0]}"
    for word in words[1:]:
        name, sign, _ = word.partition("=")
        if sign and f"$({name})" not in makefile:
            return f"the Makefile has no variable {name}"
        if not sign and words[0] != "bench-compare" and word not in targets:
            return f"there is no target {word}"
    return ""


def _python(words: list[str], patch: pytest.MonkeyPatch) -> str:
    """A module of the project, or a file of it, whose parser reads the options; or a program of the user's."""
    if words[0] == "-m":
        path = ROOT / Path(*words[1].split("."))
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        words = words[1:]
    else:
        path = ROOT / words[0]
        if "/" not in words[0]:  # which no page says that we have
            return ""
    if not path.exists():
        return f"there is no {path.relative_to(ROOT)}"
    if "ArgumentParser" not in path.read_text():
        return ""
    parse = argparse.ArgumentParser.parse_args

    def read(self: argparse.ArgumentParser, arguments: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parse(self, arguments, namespace)
        raise _Read

    with patch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", read)
        patched.setattr(sys, "argv", words)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Read:
            return ""
        except SystemExit:
            return "its parser does not take these options"
    return "its parser was not asked"


def _pip(words: list[str], patch: pytest.MonkeyPatch) -> str:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    if words[0] != "install":
        return "only pip install is read"
    rest = words[1:]
    if rest[:1] == ["-c"]:
        if not (ROOT / rest[1]).exists():
            return f"there is no {rest[1]}"
        rest = rest[2:]
    for word in rest:
        found = re.fullmatch(r"(?:\.|torch-ats)(?:\[([\w,…]+)\])?", word)
        if not found:
            return f"what is {word}?"
        for extra in (found[1] or "…").split(","):
            if extra not in (*extras, "…"):
                return f"there is no extra {extra}"
    return ""


def _pytest(words: list[str], patch: pytest.MonkeyPatch) -> str:
    """Files that are there, and markers and names that something has."""
    for before, word in zip(("", *words), words, strict=False):
        if word.startswith("-"):
            continue
        if before == "-m":
            if not any(f"mark.{word}" in path.read_text() for path in (ROOT / "tests").glob("*.py")):
                return f"no test is marked {word}"
        elif before == "-k":
            if not any(word in path.read_text() for path in (ROOT / "bench").glob("bench_*.py")):
                return f"nothing is called {word}"
        elif not (ROOT / word).exists():
            return f"there is no {word}"
    return ""
