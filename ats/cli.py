"""The command line: ``ats train``, ``ats evaluate``, ``ats demo``, ``ats study``."""

import io
import sys

from ats.version import __version__


def main() -> None:
    """Run the command that the arguments name."""
    for stream in (sys.stdout, sys.stderr):  # the names of files may have characters that a terminal has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.argv[1:] == ["--version"]:  # which needs none of the packages that the commands do
        print(__version__)
        return
    try:
        from ats.experiments.commands.command_line import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("ats", "ats_kernels"):
            raise
        sys.exit(f"ats: {error.name} is not installed; the commands need: pip install 'torch-ats[experiments]'")
    sys.exit(run(sys.argv[1:]))
