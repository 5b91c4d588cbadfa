"""Everything that needs a GPU, in a given time: `make gpu-check`, or `python -m tools.gpu_check --minutes 8`.

Needs torch, Triton, NumPy, pytest and pytest-benchmark, and no network. Runs the tests that need a GPU, the ops against
floors from this GPU's own copy rate, compute-sanitizer on a subset, the other benchmarks, the paper's tables, and a
short training. The report is written anew after each part: bench/results/<GPU>.json and .md, with logs beside them.
Exits with 1 where something failed, the tests did not all run, or there is no GPU.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import RESULTS, slug
from tools.gpu_check.check import Stop, check, outcomes
from tools.gpu_check.parts import Setting, parts
from tools.gpu_check.processes import Clock, Command, MonotonicClock, Start, run, start
from tools.gpu_check.record import Files, Record, RefusedError

_DEVICE_SECONDS = 60.0  # at most, of the time, to start torch and measure copies
REHEARSAL = "Rehearsal without a GPU, on "


def main(arguments: list[str] | None = None, *, clock: Clock | None = None, start: Start = start) -> int:
    """Run the check; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description="Check everything that needs a GPU.",
        epilog="Exits with 1 where something failed, the tests did not all run, or there is no GPU.",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="in all; 8 by default")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="write PATH.json, .md and logs; bench/results/<GPU> by default"
    )
    parser.add_argument(
        "--rehearse",
        nargs="?",
        choices=("all", "first"),
        const="all",
        default="",
        help="try the check itself, without a GPU: all parts on the CPU with small sizes, kernels in Triton's "
        "interpreter; or only the first test or benchmark of each",
    )
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    clock = clock or MonotonicClock()
    end = clock.now() + 60 * options.minutes
    stop = Stop()
    stop.listen()
    deadline = min(end, clock.now() + _DEVICE_SECONDS)
    found = find_device("cpu" if options.rehearse else "cuda", deadline, clock, start, stop)
    if isinstance(found, str):
        print(f"NOTHING WAS CHECKED: there is no GPU to check on.\n{found}", file=sys.stderr)
        return 1
    setting = Setting(options.rehearse, memory=found["memory"], bytes_per_second=found["bytes_per_second"])
    name = (REHEARSAL if options.rehearse else "") + found["name"]
    folder = Path(tempfile.gettempdir()) if options.rehearse else RESULTS  # a rehearsal says nothing of a device
    stem = (options.output or folder / slug(name)).resolve()
    stem = stem.with_suffix("") if stem.suffix in (".json", ".md") else stem
    try:
        files = Files(stem, name)
    except (RefusedError, OSError) as error:
        print(f"NOTHING WAS CHECKED: {error}", file=sys.stderr)
        return 1
    todo = parts(setting)
    record = Record(name, found["machine"], found["bytes_per_second"], options.minutes, outcomes(todo))
    record.rehearsal = bool(options.rehearse)
    say = functools.partial(print, flush=True)
    whole = check(todo, record, files, end, clock=clock, start=start, stop=stop, say=say)
    return 0 if whole else 1


def find_device(device: str, deadline: float, clock: Clock, start: Start, stop: Stop) -> dict[str, Any] | str:
    """What `tools.gpu_check.device` finds, in a process of its own; or why there is nothing to check on."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        file, log = Path(name, "device.json"), Path(name, "log")
        command = Command([sys.executable, "-m", "tools.gpu_check.device", str(file), f"--device={device}"])
        ended = run([command], log, deadline, clock=clock, start=start, stopped=stop, progress=lambda: None)
        if file.exists():  # even if copies failed: all else may work
            return dict(json.loads(file.read_bytes()))
        said = log.read_text().strip().splitlines()[1:]
        if ended.cut:
            said.append(f"It was asked for {device}, and {ended.cut}.")
        return os.linesep.join(said) or f"Asking for {device} ended with status {ended.statuses}."


if __name__ == "__main__":
    sys.exit(main())
