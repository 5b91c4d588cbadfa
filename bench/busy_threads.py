"""One thread or two on a machine that is busy: `python -m bench.busy_threads`.

A training step of ATS-10 on colon cancer, batch 1, as published, each setting in a process of its own, with and without
another process that keeps one core busy. The settings take turns. It prints a short table, and writes nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from ats.experiments import cost
from ats.experiments.config import ModelConfig
from bench.render import table

SETTINGS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
}
_KNOWN = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
_BUSY = (
    "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"  # no longer than this one
)


def measure(seconds: float) -> list[float]:
    """Milliseconds of each step, for so many seconds after two steps that are not counted."""
    torch.manual_seed(0)
    step = cost.training_step(cost.published("colon-cancer", ModelConfig(n_patches=10)))
    taken = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        taken.append(1000 * (time.perf_counter() - start))
    return taken[2:]


def compare(seconds: float, rounds: int) -> list[tuple[str, ...]]:
    """A row a setting: the median step's milliseconds on an otherwise idle machine, and beside a busy process."""
    taken: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in SETTINGS for busy in (False, True)}
    for _ in range(rounds):
        for (name, busy), steps in taken.items():
            other = subprocess.Popen([sys.executable, "-c", _BUSY]) if busy else None
            try:
                steps += _in_a_process(SETTINGS[name], seconds)
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
    medians = {key: statistics.median(steps) for key, steps in taken.items()}
    return [(name, *(f"{medians[name, busy]:.1f}" for busy in (False, True))) for name in SETTINGS]


def _in_a_process(setting: dict[str, str], seconds: float) -> list[float]:
    environment = {name: value for name, value in os.environ.items() if name not in _KNOWN} | setting
    command = [sys.executable, "-m", "bench.busy_threads", "--measure", str(seconds)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table, or for its own processes the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each setting, in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    print(f"ms a step, ATS-10 on colon cancer, batch 1; {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    print("\n".join(table(("", "alone", "beside a busy process"), compare(options.seconds, options.rounds))))


if __name__ == "__main__":
    main()
