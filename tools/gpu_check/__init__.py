"""Everything that needs a GPU, in one command and a given time: `python -m tools.gpu_check --minutes 8`."""
