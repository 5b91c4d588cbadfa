"""Processes with a deadline: each in a group of its own, its output in a file, ended with all that it started."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tools.gpu_check.worker import CONTEXT_LOST, die_with_parent

GRACE = 3.0  # seconds between asking a process to end and ending it
_TICK = 0.2
_PROGRESS = 5.0
_RESTARTS = 5  # of a part's processes, in all


class Clock(Protocol):
    """Seconds, and waiting for them."""

    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class Process(Protocol):
    """One that runs."""

    def poll(self) -> int | None: ...
    def end(self, how: signal.Signals) -> None: ...


@dataclass(frozen=True)
class Command:
    """What to run."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # beside this process's own
    restarts: bool = False  # it is started again if it dies of a signal, or as the GPU refuses it further work


Start = Callable[[Command, Path], Process]


class MonotonicClock:
    """The system's."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class _Group:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.poll()

    def end(self, how: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, how)
        except ProcessLookupError:
            return
        if how == signal.SIGKILL:
            self.process.wait()


def start(command: Command, log: Path) -> Process:
    """Start a command in the project's folder; what it writes is added to `log`."""
    root = Path(__file__).parents[2]
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command.arguments)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command.arguments,
            cwd=root,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    return _Group(process)


@dataclass(frozen=True)
class Ended:
    """How a part's processes ended."""

    statuses: tuple[int, ...]  # of all, also of those that were started again; negative: a signal
    cut: str = ""  # why they were ended, if they were


def run(
    commands: Sequence[Command],
    log: Path,
    deadline: float,
    *,
    clock: Clock,
    start: Start,
    stopped: Callable[[], str],
    progress: Callable[[], None],
) -> Ended:
    """Run commands at the same time until all have ended, or the deadline, or until `stopped` says why to stop.

    Args:
        commands: to start.
        log: that their output is added to.
        deadline: by the clock.
        clock, start: the system's, or another to test with.
        stopped: "" to go on.
        progress: called every few seconds.
    """
    running = [(command, start(command, log)) for command in commands]
    statuses: list[int] = []
    restarts = _RESTARTS
    reported = clock.now()
    try:
        while running:
            left = []
            for command, process in running:
                status = process.poll()
                if status is None:
                    left.append((command, process))
                    continue
                statuses.append(status)
                process.end(signal.SIGKILL)  # what it left behind
                if command.restarts and restarts and (status < 0 or status == CONTEXT_LOST):
                    restarts -= 1
                    left.append((command, start(command, log)))
            running = left
            if not running:
                break
            reason = stopped() or ("its time is up" if clock.now() >= deadline else "")
            if reason:
                _end([process for _, process in running], clock)
                return Ended(tuple(statuses), reason)
            if clock.now() - reported >= _PROGRESS:
                reported = clock.now()
                progress()
            clock.sleep(_TICK)
    except BaseException:
        for _, process in running:
            process.end(signal.SIGKILL)
        raise
    return Ended(tuple(statuses))


def _end(processes: Sequence[Process], clock: Clock) -> None:
    for process in processes:
        process.end(signal.SIGTERM)
    limit = clock.now() + GRACE
    while clock.now() < limit and any(process.poll() is None for process in processes):
        clock.sleep(_TICK)
    for process in processes:  # those that have ended may have left some of their own
        process.end(signal.SIGKILL)
