"""The paper's tables, run and reported: what to run, running it, reporting it."""
