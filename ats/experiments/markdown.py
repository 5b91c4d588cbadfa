"""Markdown that commands write, in lines that fit a page."""

import textwrap

WIDTH = 100
"""Characters a line; tables, headings, pictures and code keep theirs."""


def wrap(text: str) -> str:
    """Break the paragraphs of `text` that have a line of more than `WIDTH` characters."""
    return "\n".join(_wrap_line(line) for line in text.split("\n"))


def _wrap_line(line: str) -> str:
    if len(line) <= WIDTH or line.startswith(("|", "#", "![", "    ", "```")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
