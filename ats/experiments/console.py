"""What commands print. Nothing in it is markup: a folder may be called [/x], or :cat:."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what only reads data imports this, and needs no rich
    from rich.console import Console
    from rich.table import Table


def plain_console(*, stderr: bool = False) -> "Console":
    """A console on which text appears as it is."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(text: "str | Table", *, stderr: bool = False) -> None:
    """Print a text, whose lines are left to the terminal to break, or a table."""
    if isinstance(text, str):
        text = printable(text)
    plain_console(stderr=stderr).print(text, soft_wrap=isinstance(text, str))


def printable(name: object) -> str:
    """A name as text for people: names of files may be any bytes, which no terminal and no font has."""
    return str(name).encode("utf-8", "backslashreplace").decode()
