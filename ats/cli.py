"""The command line: ``ats train``, ``ats evaluate``, ``ats demo``, ``ats study``."""

import io
import os
import sys

from ats.experiments.commands.command_line import run


def main() -> None:
    """Run the command that the arguments name."""
    for stream in (sys.stdout, sys.stderr):  # the names of files may have characters that a terminal has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # its reader has seen enough, as `head` has; nor may Python say so when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
