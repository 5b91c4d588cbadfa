"""Rehearses the GPU check under a made-up clock: once with its own processes, then with what they left, and killed.

python -m tests.rehearsed_check whole FOLDER    # FOLDER/whole.json …, what parts left in FOLDER/kept
python -m tests.rehearsed_check killed FOLDER   # FOLDER/<moment>/killed.json …, a line of JSON for each
"""

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from tests.test_gpu_check import part_of
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import record
from tools.gpu_check.processes import Command, MonotonicClock, Process, Start, start

OPTIONS = ["--rehearse=first", "--minutes=8"]
EACH = 10.0  # seconds that a part's processes take when they are played again
PLACES = ("at 3 s", "at 12 s", "at 19 s", "at 31 s", "at 48 s", "at 66 s", "at 84 s")
WRITES = ("before page 1", "before page 4", "before page 14")
MOVES = ("before move 1", "before move 4", "before move 6")  # of a whole report to the place of a former one


def folder_of(command: Command) -> Path:
    """Where its part's results lie."""
    found = re.search(r"/\S*?/gpu-check-[^/\s]+", " ".join(command.arguments))
    assert found is not None
    return Path(found[0])


def name_of(command: Command) -> str:
    return "device" if "tools.gpu_check.device" in command.arguments else part_of(command)


class Slow(MonotonicClock):
    """No part comes to its deadline, whatever else this machine does."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.time += seconds / 50


@dataclass
class Keeping:
    """A process whose results are copied once it has ended, with its status."""

    process: Process
    folder: Path
    to: Path

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None and self.folder.exists():
            shutil.copytree(self.folder, self.to, dirs_exist_ok=True)
        return status

    def end(self, how: signal.Signals) -> None:
        self.process.end(how)


class Made(Slow):
    """Time that passes only while somebody waits; at a moment something happens."""

    def __init__(self, moment: float, then: Callable[[], None]) -> None:
        super().__init__()
        self.moment = moment
        self.then = then

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        if self.time >= self.moment:
            self.then()


@dataclass
class Played:
    """A process that leaves what was kept of one: the first half of the files' lines after half its time."""

    clock: Made
    kept: Path
    folder: Path
    began: float
    ended: bool = False

    def poll(self) -> int | None:
        passed = self.clock.now() - self.began
        if self.ended or passed < EACH / 2:
            return 0 if self.ended else None
        if passed >= EACH:
            shutil.copytree(self.kept, self.folder, dirs_exist_ok=True)
            return 0
        for path in self.kept.glob("*.jsonl"):
            lines = path.read_text().splitlines(keepends=True)
            (self.folder / path.name).write_text("".join(lines[: len(lines) // 2]))
        for path in self.kept.glob("*.json"):
            shutil.copy(path, self.folder)
        return None

    def end(self, how: signal.Signals) -> None:
        self.ended = True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def played(kept: Path, clock: Made) -> Start:
    def again(command: Command, log: Path) -> Process:
        with log.open("a") as file:
            file.write(f"{name_of(command)}\n")
        return Played(clock, kept / name_of(command), folder_of(command), clock.now())

    return again


def at(count: int, call: Callable[..., object]) -> Callable[..., object]:
    """The function, but that this process dies where it is called for the `count`-th time."""
    calls = 0

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            die()
        return call(*arguments)

    return counted


def run(folder: Path, kept: Path, moment: str) -> int:
    """One rehearsal in this process, which may not come back from it."""
    kind, number = moment.split()[:2], float(moment.split()[-2] if moment.endswith(" s") else moment.split()[-1])
    clock = Made(number if kind[0] == "at" else float("inf"), die)
    os.fsync = lambda file: None
    tempfile.tempdir = str(folder / "parts")
    Path(tempfile.tempdir).mkdir(parents=True, exist_ok=True)
    arguments = [*OPTIONS, f"--output={folder / 'killed'}"]
    if moment in MOVES:
        assert gpu_check.main(arguments, clock=clock, start=played(kept, clock)) == 0
        clock.time = 0.0
        record.os = type("Counted", (), {"replace": staticmethod(at(int(number), os.replace))})  # type: ignore[assignment]
    if moment in WRITES:
        record.render.write_page = at(int(number), record.render.write_page)  # type: ignore[assignment]
    return gpu_check.main(arguments, clock=clock, start=played(kept, clock))


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "whole":

        def keeping(command: Command, log: Path) -> Process:
            return Keeping(start(command, log), folder_of(command), folder / "kept" / name_of(command))

        return gpu_check.main([*OPTIONS, f"--output={folder / 'whole'}"], clock=Slow(), start=keeping)
    record.render.write = lambda path: [record.render.write_page(path)]  # plots take seconds each
    for moment in [*PLACES, *WRITES, *MOVES, "never at 1e9"]:
        place = folder / moment.replace(" ", "-")
        place.mkdir()
        process = os.fork()
        if process == 0:
            with (place.parent / f"{place.name}.said").open("w") as said, redirect_stdout(said):
                status = run(place, folder / "kept", moment)
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps({"moment": moment, "status": status}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
