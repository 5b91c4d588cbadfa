"""Benchmarks: times, scratch memory and targets; `make bench` runs them all."""

import os

# Before torch is imported. Threads that wait for each other spin by default; where other processes share the cores, a
# spinning thread keeps the one that it waits for from running, and an op takes milliseconds too long. Alone on the
# machine it is sleeping that costs: each operator that is shared out then has to wake a thread.
if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
