"""Stands in for compute-sanitizer in a rehearsal: takes its options, and runs what it would watch.

python -m tools.gpu_check.no_sanitizer --tool=memcheck --report-api-errors=no --error-exitcode=99 COMMAND …
"""

import argparse
import os
from collections.abc import Sequence

TOOLS = "memcheck", "racecheck", "synccheck"


def watched(arguments: Sequence[str] | None = None) -> list[str]:
    """The command after the sanitizer's options."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.no_sanitizer", description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--report-api-errors", choices=("no", "explicit", "all"), required=True)
    parser.add_argument("--error-exitcode", type=int, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("there is no command to run")
    return list(options.command)


if __name__ == "__main__":
    command = watched()
    os.execvp(command[0], command)
