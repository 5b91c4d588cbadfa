"""Data sets that the experiments run on."""
