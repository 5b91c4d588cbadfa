"""Options from a command line."""

import dataclasses
from collections.abc import Sequence
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


def parse(kind: type[Options], program: str, arguments: Sequence[str], **how: Any) -> Options:
    """Read a command's options as `tyro.cli` does; in paths, ~ is the user's home, where no shell has seen to it.

    Raises:
        ValueError: a seed that no generator takes, the home of somebody unknown.
    """
    options = expanded(tyro.cli(kind, prog=program, args=list(arguments), **how))
    seed = getattr(options, "seed", 0)
    if not -(2**63) <= seed < 2**64:  # what generators take
        raise ValueError(f"--seed must be a number of 64 bits, got {seed}")
    return options


def check_stop(options: Any) -> None:
    """Raise ValueError where `--method anytime` is not told when an image has been read enough."""
    if options.method == "anytime" and options.tolerance is None and options.lead is None:
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
