"""The command line: ``ats train``, ``ats evaluate``, ``ats demo``, ``ats study``."""

import io
import sys

from ats.experiments.commands.command_line import run


def main() -> None:
    """Run the command that the arguments name."""
    for stream in (sys.stdout, sys.stderr):  # the names of files may have characters that a terminal has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))
