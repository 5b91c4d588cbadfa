"""Benchmarks: times, memory and targets; `make bench` runs them all."""

import os
import time
from pathlib import Path

_BUSY = 0.25  # of all cores' time


def _others_compute() -> bool:
    """Whether other processes use the cores: by the load of the last minute and, where Linux tells it, right now."""
    cores = os.cpu_count() or 1
    if os.getloadavg()[0] <= 0.5 * cores:
        return False
    try:
        idle, total = _ticks()
        time.sleep(0.3)
        idle_later, total_later = _ticks()
    except OSError:
        return True
    return (idle_later - idle) < (1 - _BUSY) * (total_later - total)


def _ticks() -> tuple[int, int]:
    values = [int(value) for value in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
    return values[3] + values[4], sum(values)


# Before torch is imported. Threads that wait for each other spin by default; where other processes share the cores, a
# spinning thread keeps the one that it waits for from running, and an op takes milliseconds too long. Alone on the
# machine it is sleeping that costs: each operator that is shared out then has to wake a thread.
if _others_compute():
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
