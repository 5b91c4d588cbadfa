"""Options from a command line."""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

Options = TypeVar("Options")


def _draws(text: str) -> int | tuple[int, ...]:
    """10, or of nested attention a number a level: 10x3."""
    try:
        numbers = tuple(map(int, text.lower().split("x")))
    except ValueError:
        raise ValueError(f"a number, or of nested attention one a level, as 10x3, is wanted; got {text!r}") from None
    return numbers if len(numbers) > 1 else numbers[0]


Draws = Annotated[
    int | tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="N|NxN",
        instance_from_str=lambda words: _draws(words[0]),
        is_instance=lambda value: isinstance(value, int) or (isinstance(value, tuple) and len(value) > 1),
        str_from_instance=lambda value: ["x".join(map(str, value)) if isinstance(value, tuple) else str(value)],
    ),
]
"""How many patches to draw: a number, or as 10x3 one a level of nested attention."""


class UsageError(ValueError):
    """A command line that names options or values that there are not."""


def parse(kind: type[Options], program: str, arguments: Sequence[str], **how: Any) -> Options:
    """Read a command's options as `tyro.cli` does; in paths, ~ is the user's home, where no shell has seen to it.

    Raises:
        UsageError: options that are not there, or values that they do not take.
        ValueError: a seed that no generator takes, the home of somebody unknown.
    """
    options = expanded(_as_parsed(kind, program, arguments, how))
    seed = getattr(options, "seed", 0)
    if not -(2**63) <= seed < 2**64:  # what generators take
        raise ValueError(f"--seed must be a number of 64 bits, got {seed}")
    return options


def _as_parsed(kind: type[Options], program: str, arguments: Sequence[str], how: dict[str, Any]) -> Options:
    """What tyro reads; what it draws into a box on errors becomes one line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(kind, prog=program, args=list(arguments), **how)
    except SystemExit as stop:
        if not stop.code:  # it has helped
            raise
    said = io.StringIO()
    with contextlib.redirect_stderr(said), _wide(), contextlib.suppress(SystemExit):
        tyro.cli(kind, prog=program, args=list(arguments), **how)
    raise UsageError(unboxed(said.getvalue(), program))


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """A terminal wide enough that no name in a message is broken into lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def unboxed(text: str, program: str) -> str:
    """The message in a box of tyro's as one line: what is wrong, options with like names, and where help is."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    parts: list[list[str]] = [[]]  # which lines part
    for line in lines:
        if line and set(line) <= set("─-"):
            parts.append([])
        elif line and line[0] not in "╭╰":  # where there are no such characters, the title is a part of its own
            parts[-1].append(line)
    parts = (parts if "╭" in text else parts[1:]) or [[]]
    wrong = " ".join(parts[0]).removesuffix(" (required)").rstrip(".") or "the options are not understood"
    wrong = re.sub(r"^Error parsing (?!-)\S+: ", "", wrong)  # of several options, which the text names
    wrong = re.sub(r"invalid literal for int\(\) with base 10: (.*)$", r"\1 is no whole number", wrong)
    wrong = re.sub(r"could not convert string to float: (.*)$", r"\1 is no number", wrong)
    like = [line.split()[0] for part in parts[1:] for line in part if line.startswith("--")]
    also = f"; perhaps {' or '.join(dict.fromkeys(like))}" if like and "Unrecognized" in wrong else ""
    return f"{wrong}{also}; `{program} --help` lists the options"


def check_stop(options: Any) -> None:
    """Raise ValueError where `--method anytime` is not told when an image has been read enough, or another is."""
    criteria = options.tolerance is not None or options.lead is not None
    if options.method != "anytime" and criteria:
        raise ValueError(
            f"--tolerance and --lead are for --method anytime, which stops at them, not for --method {options.method}"
        )
    if options.method == "anytime" and options.n_patches:
        raise ValueError(
            "--n-patches is for --method sample and topk; --method anytime reads what it needs, up to --budget"
        )
    if options.method == "anytime" and not criteria:
        raise ValueError(
            "--method anytime needs --lead or --tolerance to stop at; --method sample reads the same number of every "
            "image"
        )


def expanded(value: Any) -> Any:
    """A dataclass, or a tuple, with ~ in its paths replaced.

    Raises:
        ValueError: the home of somebody unknown.
    """
    if isinstance(value, Path):
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{value}: nobody has that home; for a file of that name, write ./{value}") from error
    if isinstance(value, tuple):
        return tuple(map(expanded, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = {name: expanded(part) for name, part in old.items()}
        return dataclasses.replace(value, **new) if new != old else value
    return value
