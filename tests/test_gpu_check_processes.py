"""The GPU check's own processes: real ones that hang, die and are killed, and its training."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu_check import mnist
from tools.gpu_check.device import missing
from tools.gpu_check.parts import ROOT, read_tests, share_of_tests
from tools.gpu_check.processes import Command, Ended, MonotonicClock, run, start
from tools.gpu_check.record import Outcome


def run_now(commands: list[Command], log: Path, seconds: float = 900.0) -> Ended:
    clock = MonotonicClock()
    end = clock.now() + seconds
    return run(commands, log, end, clock=clock, start=start, stopped=lambda: "", progress=lambda: None)


def until(holds: Callable[[], bool], seconds: float = 300.0) -> bool:
    limit = time.monotonic() + seconds
    while not holds() and time.monotonic() < limit:
        time.sleep(0.05)
    return holds()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def numbers(log: Path) -> list[int]:
    """Lines that are a whole number."""
    return [int(line) for line in log.read_text().splitlines() if line.isdigit()] if log.exists() else []


# Deadlines and kills


@pytest.mark.parametrize("deaf", ["", "trap '' TERM; "])
def test_a_deadline_ends_a_process_and_all_that_it_started(deaf: str, tmp_path: Path) -> None:
    log = tmp_path / "log"

    class Clock(MonotonicClock):
        """It is late as soon as both processes run."""

        def now(self) -> float:
            return super().now() + (1e6 if len(numbers(log)) == 2 else 0)

    clock = Clock()
    commands = [Command(["sh", "-c", f"{deaf}sleep 600 & echo $!; echo $$; wait; sleep 600"])]
    end = clock.now() + 900
    ended = run(commands, log, end, clock=clock, start=start, stopped=lambda: "", progress=lambda: None)
    processes = numbers(log)
    assert ended.cut == "its time is up"
    assert len(processes) == 2
    assert until(lambda: not any(map(is_running, processes)))


def test_output_is_in_the_log_while_a_process_runs(tmp_path: Path) -> None:
    log, seen = tmp_path / "log", []
    clock = MonotonicClock()
    commands = [Command(["sh", "-c", "echo first; sleep 600"])]

    def stopped() -> str:
        seen.append(log.read_text())
        return "seen" if "first\n" in seen[-1] else ""

    ended = run(commands, log, clock.now() + 60, clock=clock, start=start, stopped=stopped, progress=lambda: None)
    assert ended.cut == "seen"
    assert seen[-1].startswith("\n$ sh -c echo first")


# Stands in for the device, and has parts whose processes say who they are and hang.
DRIVER = """
import sys
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check.processes import Command, start

def quick(command, log):
    words = list(command.arguments)
    if "tools.gpu_check.device" in words:
        code = f"import json; json.dump({DEVICE}, open({words[3]!r}, 'w'))"
        return start(Command([sys.executable, "-c", code]), log)
    script = "exit 0" if "--few=a-test" in words else "echo pid $$; sleep 600"
    return start(Command(["sh", "-c", script]), log)

DEVICE = {"name": "a GPU", "machine": {"torch": "2.13"}, "memory": 0, "bytes_per_second": 1e12}
sys.exit(gpu_check.main(["--minutes", MINUTES, "--output", sys.argv[1]], start=quick))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_check_leaves_a_whole_report_and_no_process(how: signal.Signals, tmp_path: Path) -> None:
    stem = tmp_path / "a-gpu"
    command = [sys.executable, "-c", DRIVER.replace("MINUTES", "'5'"), str(stem)]
    check = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = Path(f"{stem}-tests.log")
    assert until(lambda: log.exists() and "pid " in log.read_text()), check.communicate()[0]
    processes = [int(number) for number in re.findall(r"^pid (\d+)$", log.read_text(), re.MULTILINE)]
    check.send_signal(how)
    said = check.communicate(timeout=300)[0]
    assert check.returncode == (-how if how == signal.SIGKILL else 1), said
    assert until(lambda: not any(map(is_running, processes)))
    record = json.loads(Path(f"{stem}.json").read_text())
    page = Path(f"{stem}.md").read_text()
    assert record["finished"] is False
    assert "**Not whole:**" in page
    reason = "just begun" if how == signal.SIGKILL else f"it was ended by {how.name}"
    assert f"{reason} |" in page
    assert not list(tmp_path.glob(".*"))


def test_a_part_that_is_killed_is_a_failure_and_the_others_go_on(tmp_path: Path) -> None:
    stem = tmp_path / "a-gpu"
    driver = DRIVER.replace("MINUTES", "'5'").replace("echo pid $$; sleep 600", "kill -9 $$")
    done = subprocess.run(
        [sys.executable, "-c", driver, str(stem)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    record = json.loads(Path(f"{stem}.json").read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    assert record["finished"] is True
    assert [part["status"] for part in record["parts"] if "check" not in part["name"]].count("failed") >= 1
    assert "status -9" in Path(f"{stem}.md").read_text()


# The processes that share the tests

SOME_TESTS = """
import os, sys, pytest
pytestmark = pytest.mark.interpreter

@pytest.mark.parametrize("case", range(6))
def test_many(case): pass

def test_fails(): raise ValueError("that is wrong")

@pytest.mark.skip(reason="not here")
def test_skipped(): pass

def test_kills_its_process(): os.kill(os.getpid(), 9)

def test_captures():
    "CUDAGraph"
"""


@pytest.fixture
def some_tests(tmp_path: Path) -> Path:
    path = tmp_path / "test_some.py"
    path.write_text(SOME_TESTS)
    (tmp_path / "conftest.py").write_text(
        "def pytest_configure(config): config.addinivalue_line('markers', 'interpreter: runs kernels')\n"
    )
    return path


def test_two_processes_share_the_tests_and_one_dies(some_tests: Path, tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    commands = [Command(share_of_tests(queue, place, files=[some_tests]), restarts=True) for place in (0.0, 0.5)]
    ended = run_now(commands, tmp_path / "log")
    outcome = Outcome("tests", "Tests", "tests", True)
    read_tests(queue, outcome, ended)
    log = (tmp_path / "log").read_text()
    assert outcome.status == "failed"
    assert outcome.summary == "7 passed, 2 failed, 1 skipped", log
    assert {test.rpartition("::")[2]: message for test, message in outcome.failures.items()} == {
        "test_fails": "ValueError: that is wrong",
        "test_kills_its_process": "its process died in it",
    }
    assert -9 in ended.statuses
    assert log.count("passed ") == 7
    assert 'def test_fails(): raise ValueError("that is wrong")' in log


def test_a_subset_has_one_case_of_each_kernel_test_and_no_graphs(some_tests: Path, tmp_path: Path) -> None:
    some_tests.write_text(SOME_TESTS.replace("os.kill(os.getpid(), 9)", "pass"))
    queue = tmp_path / "queue"
    queue.mkdir()
    run_now([Command(share_of_tests(queue, 0.0, "--few=a-test", files=[some_tests]))], tmp_path / "log")
    outcome = Outcome("memcheck", "memcheck", "sanitizers", False)
    read_tests(queue, outcome, Ended((99,)))
    assert outcome.summary == "2 passed, 1 failed, 1 skipped; the sanitizer found errors"


def test_a_file_that_cannot_be_imported_is_a_failure(some_tests: Path, tmp_path: Path) -> None:
    some_tests.write_text("import no_such_package\n# pytest.mark.gpu\n")
    queue = tmp_path / "queue"
    queue.mkdir()
    ended = run_now([Command(share_of_tests(queue, 0.0, files=[some_tests]))], tmp_path / "log")
    outcome = Outcome("tests", "Tests", "tests", True)
    read_tests(queue, outcome, ended)
    assert outcome.status == "failed"
    assert "No module named 'no_such_package'" in next(iter(outcome.failures.values()))


# Alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the check can check it")
def test_without_a_gpu_it_fails_and_says_what_is_missing() -> None:
    command = [sys.executable, "-m", "tools.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("NOTHING WAS CHECKED: there is no GPU to check on.\n")
    assert str(missing()) in done.stderr


def test_training_by_the_clock() -> None:
    written: list[dict[str, Any]] = []
    config = mnist.squeezed(images=8, test_images=10, image_size=330)
    config = replace(config, optim=replace(config.optim, batch_size=4), model=replace(config.model, n_patches=3))
    found = mnist.train(
        config,
        torch.device("cpu"),
        6.0,
        lambda found: written.append(dict(found)),
        clock=lambda: (0.0, 3.0, 5.0, 5.5)[len(written)],
    )
    assert found["steps"] == 10 * (len(written) - 1) == 30
    assert list(found["ms a step"]) == ["small", "medium"]
    assert found["bound"] > 9  # it widens as in `ats train`
    assert found["finite"]
    assert 0 <= found["test error"] <= 1
    assert found["tested on"] == 10
    assert written[0]["test error"] is None


def test_images_grow_as_the_presets_do() -> None:
    quick = mnist.PRESETS["quick"]
    kinds = [mnist.kind_of_images(epoch / quick.optim.epochs + 1e-9) for epoch in range(quick.optim.epochs)]
    assert [kinds.count(kind) for kind in range(3)] == [6, 58, 0]
    assert kinds == sorted(kinds)
