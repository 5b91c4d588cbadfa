"""The report: what each part found, as JSON and Markdown, written whole each time that anything is new.

A former report of the same device stays where it is until this one is whole: until then it is written beside it, as
<device>-unfinished. A report of another device is never written over.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ats._files import remove_parts, write_json
from bench import render

LOGS = "tests", "sanitizers", "bench", "training"
PASSED, FAILED, CUT, NOT_RUN, RUNNING = "passed", "failed", "cut short", "not run", "running"
_MOST_FAILURES = 50  # in the report; the log has all


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    title: str
    log: str  # one of LOGS
    required: bool  # the check fails unless it passed
    status: str = NOT_RUN
    summary: str = "its turn has not come"
    seconds: float = 0.0
    allowed: float = 0.0  # seconds that it was given
    failures: dict[str, str] = field(default_factory=dict)  # messages, by test
    notes: list[str] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)  # of benchmarks
    lacks: str = ""  # what a rehearsal of it cannot show

    @property
    def failed(self) -> bool:
        """Whether the check fails by it."""
        return self.status == FAILED or (self.required and self.status != PASSED)


@dataclass
class Record:
    """One check of one device."""

    title: str  # the device
    machine: dict[str, str]
    bytes_per_second: float | None
    minutes: float
    parts: list[Outcome]
    finished: bool = False
    stopped: str = ""  # why it ended early
    rehearsal: bool = False  # without a GPU

    def groups(self) -> list[dict[str, Any]]:
        """Those of all benchmarks; of one that ran twice the later."""
        return list({group["name"]: group for part in self.parts for group in part.groups}.values())

    def as_dict(self) -> dict[str, Any]:
        """As `python -m bench.render` and `bench.changes` read it."""
        parts = [asdict(part) | {"failed": part.failed} for part in self.parts]
        for part in parts:
            del part["groups"]
            part["failures"] = dict(list(part["failures"].items())[:_MOST_FAILURES])
        return {
            "title": self.title,
            "rehearsal": self.rehearsal,
            "machine": self.machine,
            "bytes_per_second": self.bytes_per_second,
            "minutes": self.minutes,
            "finished": self.finished,
            "stopped": self.stopped,
            "parts": parts,
            "groups": self.groups(),
        }


class RefusedError(Exception):
    """Writing the report would overwrite what is not ours; says how to go on."""


class Files:
    """Where a device's report and logs lie.

    Args:
        stem: of the report, without a suffix.
        device: its name.

    Raises:
        RefusedError: another device's report is there, or something that is none.
    """

    def __init__(self, stem: Path, device: str) -> None:
        self.stem = stem
        self.former = _read(_named(stem, ".json"), device)
        if self.former is None and _named(stem, ".md").exists():
            raise RefusedError(
                f"{_named(stem, '.md')} is there without its .json; move it away, or name another --output"
            )
        self.now = stem if self.former is None else stem.with_name(f"{stem.name}-unfinished")
        _read(_named(self.now, ".json"), device)
        stem.parent.mkdir(parents=True, exist_ok=True)
        remove_parts(stem.parent)
        for name in LOGS:
            self.log(name).unlink(missing_ok=True)  # of a check that was not whole, or had no report

    def log(self, name: str) -> Path:
        """A log's file."""
        return _named(self.now, f"-{name}.log")

    def write(self, record: Record) -> None:
        """Write JSON and Markdown."""
        write_json(_named(self.now, ".json"), record.as_dict())
        render.write_page(_named(self.now, ".json"))

    def finish(self, record: Record, say: Callable[[str], None]) -> None:
        """Put a whole report in the place of the former."""
        self.write(record)
        if self.former is not None:
            lost = lost_parts(self.former, record)
            if lost:
                say(f"The former report in {self.stem}.json stays. It has, and this one lacks: {', '.join(lost)}.")
            else:
                for suffix in (*(f"-{name}.log" for name in LOGS), ".json", ".md"):
                    if _named(self.now, suffix).exists():
                        os.replace(_named(self.now, suffix), _named(self.stem, suffix))
                    else:
                        _named(self.stem, suffix).unlink(missing_ok=True)
                self.now = self.stem
        _, *plots = render.write(_named(self.now, ".json"))
        say(f"written to {self.now}.json, .md and -*.log")
        if not plots and record.groups():
            say(f"Plots can be drawn where matplotlib is installed: python -m bench.render {self.now}.json")


def lost_parts(former: dict[str, Any], record: Record) -> Sequence[str]:
    """Titles of the parts that a former report has whole, and this one has not."""
    whole = {part.name for part in record.parts if part.status in (PASSED, FAILED)}
    return [
        part["title"]
        for part in former.get("parts", [])
        if part["status"] in (PASSED, FAILED) and part["name"] not in whole
    ]


def _named(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _read(path: Path, device: str) -> dict[str, Any] | None:
    """A report of this device, if there is one."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
        title = record["title"]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path} is no report; move it away, or name another --output") from error
    if title != device:
        raise RefusedError(f"{path} is a report of {title}, and this device is {device}; name another --output")
    return dict(record)
