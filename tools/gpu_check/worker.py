"""A pytest plugin for one of several processes that share the tests that need a GPU.

Each process goes through all tests, from another place in their list, and runs those that no other has taken. What
becomes of a test is written down at once, a line each: a process that dies leaves all but the test that it died in, and
the one that is started in its place takes up the rest.
"""

import ctypes
import hashlib
import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu_check.marked import MARKS

CONTEXT_LOST = 70  # exit status: the GPU refuses all further work of this process
_SHOWN = 300  # characters of a message in the report; the log has all


def die_with_parent() -> None:
    """Have Linux end this process when the one that started it dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `tools.gpu_check` passes."""
    group = parser.getgroup("one process of the GPU check")
    group.addoption("--queue", type=Path, required=True, help="folder that the processes share")
    group.addoption("--place", type=float, default=0.0, help="where in the list to start, in [0, 1)")
    group.addoption(
        "--few",
        choices=("all", "a-test", "a-file", "first"),
        default="all",
        help="of the kernel tests one case each, one of each file, or but one; none that captures a graph",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start taking tests."""
    die_with_parent()
    config.pluginmanager.register(Worker(config), "gpu-check-worker")


class Worker:
    """Takes tests from the queue and writes down what becomes of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.folder: Path = config.getoption("--queue")
        self.place: float = config.getoption("--place")
        self.few: str = config.getoption("--few")
        self.claims = self.folder / "taken"
        self.claims.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}

    def note(self, what: str, test: str, **more: Any) -> None:
        """Add a line to what this process leaves."""
        line = json.dumps({"what": what, "test": test, **more}) + "\n"
        with (self.folder / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(line)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if any(item.get_closest_marker(mark) for mark in MARKS)]
        if self.few != "all":
            first: dict[str, pytest.Item] = {}
            for item in chosen:
                if item.get_closest_marker("interpreter") and not _captures(item):
                    test = item.nodeid.partition("[")[0]
                    first.setdefault({"a-test": test, "a-file": test.partition("::")[0]}.get(self.few, ""), item)
            chosen = list(first.values())
        start = int(self.place * len(chosen))
        items[:] = chosen[start:] + chosen[:start]
        for item in chosen:
            self.note("collected", item.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note("failed", report.nodeid, message=_short(report.longreprtext))
            _say(f"NOT COLLECTED {report.nodeid}\n{report.longreprtext}\n")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for item in session.items:
            if not self.take(item.nodeid):
                continue
            self.note("started", item.nodeid)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)  # the next may be another process's
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        return True

    def take(self, test: str) -> bool:
        """Whether nobody else has taken it."""
        path = self.claims / hashlib.sha256(test.encode()).hexdigest()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self.seconds[report.nodeid] = time.perf_counter()
        if report.failed:
            text = report.longreprtext
            self.note("failed", report.nodeid, message=_short(text))
            printed = "".join(f"--- {title}\n{content}\n" for title, content in report.sections)
            _say(f"FAILED {report.nodeid} ({report.when})\n{text}\n{printed}")
            if _context_lost():
                _say("The GPU refuses further work of this process; another takes up the rest.\n")
                os._exit(CONTEXT_LOST)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.note("skipped", report.nodeid, message=_short(reason))
        elif report.when == "call":
            took = time.perf_counter() - self.seconds.pop(report.nodeid, time.perf_counter())
            self.note("passed", report.nodeid, seconds=round(took, 3))
            _say(f"passed {report.nodeid} {took:.2f} s\n")


def _captures(item: pytest.Item) -> bool:
    """Whether a test captures a CUDA graph, in which nothing can be allocated without the caching allocator."""
    function = getattr(item, "function", None)
    return function is not None and "CUDAGraph" in inspect.getsource(function)


def _context_lost() -> bool:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _short(text: str) -> str:
    """The line that says what went wrong: of a traceback the first that pytest marks with E."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines or text.strip().splitlines()[-1:] or [""])[0][:_SHOWN]


def _say(text: str) -> None:
    """To the log in one piece, as other processes write to it as well."""
    sys.stdout.flush()
    os.write(1, text.encode(errors="replace"))
