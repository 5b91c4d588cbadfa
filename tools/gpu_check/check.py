"""Run the parts, each until its deadline, and write the report after each."""

import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.gpu_check.parts import Part
from tools.gpu_check.processes import GRACE, Clock, Ended, Start, run
from tools.gpu_check.record import CUT, FAILED, NOT_RUN, RUNNING, Files, Outcome, Record

SPARE = 5.0  # seconds before the end of the check's time, for the last report


class Stop:
    """Remembers that the process was asked to end."""

    def __init__(self) -> None:
        self.reason = ""

    def __call__(self) -> str:
        return self.reason

    def listen(self) -> None:
        """Note SIGTERM and SIGINT in place of dying of them; a second SIGINT is Python's again."""
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.reason = f"it was ended by {signal.Signals(number).name}"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def outcomes(parts: Sequence[Part]) -> list[Outcome]:
    """One for each part, none of which has run."""
    return [Outcome(part.name, part.title, part.log, part.required, lacks=part.lacks) for part in parts]


def allowed(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are still to come: its share of what is left."""
    first = parts[0]
    return max(0.0, min(first.most, left * first.share / sum(part.share for part in parts)))


def check(
    parts: Sequence[Part],
    record: Record,
    files: Files,
    end: float,
    *,
    clock: Clock,
    start: Start,
    stop: Callable[[], str],
    say: Callable[[str], None],
) -> bool:
    """Run all parts; whether nothing failed.

    Args:
        parts: in their order.
        record: with an outcome for each.
        files: to write.
        end: of the time, by the clock.
        clock, start: the system's, or others to test with.
        stop: "" to go on, else why not.
        say: is told how it goes.
    """
    files.write(record)
    for index, (part, outcome) in enumerate(zip(parts, record.parts, strict=True)):
        if stop():
            break
        seconds = allowed(parts[index:], end - SPARE - GRACE - clock.now())
        outcome.allowed = seconds
        if seconds < part.least:
            outcome.summary = f"too little time is left: {seconds:.0f} s, it needs {part.least:.0f}"
        else:
            run_part(part, outcome, seconds, files, record, clock, start, stop)
        files.write(record)
        say(f"{'FAILED' if outcome.failed else outcome.status}: {outcome.title}: {outcome.summary}")
    if stop():
        record.stopped = stop()
        for outcome in record.parts:
            if outcome.status == NOT_RUN and outcome.summary == Outcome.summary:
                outcome.summary = record.stopped
        files.write(record)
        say(f"NOT WHOLE: {record.stopped}; what was found is in {files.now}.json and .md")
        return False
    record.finished = True
    files.finish(record, say)
    return not any(outcome.failed for outcome in record.parts)


def run_part(
    part: Part,
    outcome: Outcome,
    seconds: float,
    files: Files,
    record: Record,
    clock: Clock,
    start: Start,
    stop: Callable[[], str],
) -> None:
    """Run one part, and fill in its outcome."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        commands = part.commands(folder, seconds)
        if isinstance(commands, str):
            outcome.summary = commands
            return
        began = clock.now()
        outcome.status, outcome.summary = RUNNING, "just begun"
        files.write(record)

        def progress() -> None:
            outcome.seconds = clock.now() - began
            _read(part, folder, outcome, None)
            files.write(record)

        try:
            ended = run(
                commands,
                files.log(part.log),
                began + seconds,
                clock=clock,
                start=start,
                stopped=stop,
                progress=progress,
            )
        except OSError as error:  # no such program, no memory for a process
            outcome.status, outcome.summary = FAILED, f"it could not be started: {error}"
            return
        outcome.seconds = clock.now() - began
        _read(part, folder, outcome, ended)
        if outcome.status == RUNNING:
            outcome.status = CUT
        if ended.cut:
            outcome.summary += f"; cut short: {ended.cut}"


def _read(part: Part, folder: Path, outcome: Outcome, ended: Ended | None) -> None:
    """Read what a part left; what cannot be read must not keep the others from running."""
    try:
        part.read(folder, outcome, ended)
    except (OSError, ValueError, KeyError, TypeError) as error:
        outcome.summary = f"what it left cannot be read: {type(error).__name__}: {error}"
        if ended is not None:
            outcome.status = FAILED
