"""``python -m ats``: the command line."""

from ats.cli import main

main()
