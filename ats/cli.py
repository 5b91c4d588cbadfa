"""The command line: ``ats train``, ``ats evaluate``, ``ats demo``, ``ats study``."""

import sys


def main() -> None:
    """Run the command that the arguments name."""
    try:
        from ats.experiments.commands.command_line import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("ats", "ats_kernels"):
            raise
        sys.exit(f"ats: {error.name} is not installed; the commands need: pip install 'torch-ats[experiments]'")
    sys.exit(run(sys.argv[1:]))
