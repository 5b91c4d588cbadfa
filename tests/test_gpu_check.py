"""The GPU check under a made-up clock and processes: deadlines, kills, failures, and a report whole throughout."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.report import Group, Report
from tools.gpu_check.check import allowed, check, outcomes
from tools.gpu_check.parts import Setting, parts
from tools.gpu_check.processes import GRACE, Command
from tools.gpu_check.record import Files, Record, RefusedError

DEVICE = "NVIDIA H200"
ORDER = ["tests", "ops", "memcheck", "benchmark", "racecheck", "tables", "training", "synccheck"]


@dataclass
class World:
    """Processes that take as long as is said, and a clock that stands still but while somebody waits."""

    seconds: dict[str, float] = field(default_factory=dict)  # of a part's processes; 15 where nothing is said
    status: dict[str, list[int]] = field(default_factory=dict)  # of a part's processes, in the order of their start
    time: float = 0.0
    deaf: bool = False  # processes that do not end when they are asked to
    started: list[str] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)
    watch: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.watch()
        self.time += seconds

    def start(self, command: Command, log: Path) -> "Made":
        name = part_of(command)
        self.started.append(name)
        with log.open("a") as file:
            file.write(f"{name}\n")
        leave_results(name, command, len(self.started))
        statuses = self.status.get(name, [])
        status = statuses.pop(0) if statuses else 0
        return Made(self, self.time + self.seconds.get(name, 15.0), status, len(self.started))


@dataclass
class Made:
    world: World
    until: float
    status: int
    number: int

    def __post_init__(self) -> None:
        self.world.alive.add(self.number)

    def poll(self) -> int | None:
        if self.number in self.world.alive and self.world.time >= self.until:
            self.world.alive.discard(self.number)
        return None if self.number in self.world.alive else self.status

    def end(self, how: signal.Signals) -> None:
        if how == signal.SIGKILL or not self.world.deaf:
            self.world.alive.discard(self.number)


def part_of(command: Command) -> str:
    words = " ".join(command.arguments)
    for tool in ("memcheck", "racecheck", "synccheck"):
        if f"--tool={tool}" in words:
            return tool
    for text, name in {"gpu_check.worker": "tests", "bench_ops": "ops", "bench_tables": "tables"}.items():
        if text in words:
            return name
    return "training" if "gpu_check.mnist" in words else "benchmark"


def leave_results(name: str, command: Command, number: int) -> None:
    """What the process of a part leaves."""
    options = dict(word.split("=", 1) for word in command.arguments if word.startswith("--") and "=" in word)
    if "--queue" in options:
        tests = [f"test_{place}" for place in range(4)]
        notes = [{"what": "collected", "test": test} for test in tests]
        took = tests if number == 1 or name != "tests" else []
        for test in took:
            notes += [{"what": "started", "test": test}, {"what": "passed", "test": test, "seconds": 1}]
        Path(options["--queue"], f"{number}.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    elif name == "training":
        found = {"steps": 20, "ms a step": {"small": 7.5}, "training error": 0.9, "test error": 0.5, "tested on": 64}
        Path(command.arguments[3]).write_text(json.dumps(found | {"finite": True}))
    else:
        group = Group(f"Group of {name}", {"ours": [1e-3] * 3})
        group.at_most(2, 1.5, "of the floor")
        Report(torch.device("cpu"), [group], skipped={"bench_x": "lightning is not installed"}).write(
            Path(options["--output"])
        )


@pytest.fixture
def stem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a report is written some hundred times here
    return tmp_path / "results" / "nvidia-h200"


SETTING = Setting(cores=2, sanitizer="/usr/bin/compute-sanitizer", bytes_per_second=4.3e12)


def run_check(
    world: World, stem: Path, minutes: float = 8, *, setting: Setting = SETTING, stop: Callable[[], str] = lambda: ""
) -> tuple[bool, dict[str, Any], list[str]]:
    """Whether nothing failed, the report, and what was said. The report is whole at every moment."""
    todo, said = parts(setting), []
    files = Files(stem, DEVICE)
    record = Record(DEVICE, {"torch": "2.13"}, 4.3e12, minutes, outcomes(todo))
    seen: list[int] = []

    def watch() -> None:
        changed = Path(f"{files.now}.json").stat().st_mtime_ns
        if seen[-1:] != [changed]:
            seen.append(changed)
            whole(files.now)

    world.watch = watch
    end = world.time + 60 * minutes
    passed = check(
        todo, record, files, end, clock=world, start=world.start, stop=stop, say=lambda line: said.append(line)
    )
    assert world.time <= end
    assert not world.alive
    return passed, whole(files.now), said


def whole(stem: Path) -> dict[str, Any]:
    """The report, which names each part once in JSON and Markdown, and parses."""
    record = json.loads(Path(f"{stem}.json").read_text())
    text = Path(f"{stem}.md").read_text()
    assert [part["name"] for part in record["parts"]] == ORDER
    for part in record["parts"]:
        assert f"| {part['title']} | " in text
    assert text.startswith(f"# {DEVICE}\n")
    assert record["finished"] or "**Not whole:**" in text
    return record


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in record["parts"]}


def test_all_parts_run_in_their_order(stem: Path) -> None:
    world = World()
    passed, record, said = run_check(world, stem)
    assert passed
    assert record["finished"]
    assert [part["status"] for part in record["parts"]] == ["passed"] * 8
    assert list(dict.fromkeys(world.started)) == ORDER
    assert world.started.count("tests") == 2  # a process a core
    text = stem.with_suffix(".md").read_text()
    assert "In 8 minutes at most. Nothing failed." in text
    assert "4 passed, 0 failed, 0 skipped" in text
    assert "20 steps; ms a step: small 7.5; training error 90.0%, test error 50.0% of 64 images" in text
    assert "Not run: bench_x: lightning is not installed" in text
    assert [group["name"] for group in record["groups"]] == [f"Group of {n}" for n in ("ops", "benchmark", "tables")]
    assert len(list(stem.parent.iterdir())) == 6
    assert said[-2].startswith("written to ")


def test_parts_that_hang_are_cut_short_and_the_time_is_kept(stem: Path) -> None:
    world = World(dict.fromkeys(ORDER, 1000000000.0), deaf=True)
    passed, record, _ = run_check(world, stem)
    found = by_name(record)
    assert not passed  # the tests must end
    assert {part["status"] for part in found.values()} == {"cut short", "not run"}
    assert found["tests"]["failed"]
    assert not found["ops"]["failed"]
    assert found["tests"]["allowed"] == pytest.approx((480 - 8) * 0.33)
    assert all(part["seconds"] <= part["allowed"] + GRACE + 1 for part in found.values())
    assert "its time is up" in found["ops"]["summary"]
    assert len(record["groups"]) == 3  # what they had measured
    assert found["synccheck"]["summary"].startswith("too little time is left: ")
    assert record["finished"]


@pytest.mark.parametrize("when", [0.0, 3.0, 38.0, 92.0])
def test_a_check_that_is_ended_leaves_what_it_has(when: float, stem: Path) -> None:
    world = World({"tests": 30.0})
    passed, record, said = run_check(world, stem, stop=lambda: "it was ended by SIGTERM" if world.time >= when else "")
    done = [part for part in record["parts"] if part["status"] == "passed"]
    assert (passed, record["finished"], record["stopped"]) == (False, False, "it was ended by SIGTERM")
    assert len(done) == max(0, int((when - 15) // 15))
    assert all("it was ended by SIGTERM" in part["summary"] for part in record["parts"][len(done) :])
    assert "**Not whole:** it was ended by SIGTERM." in stem.with_suffix(".md").read_text()
    assert said[-1].startswith("NOT WHOLE")


def test_a_killed_process_of_the_tests_is_started_again(stem: Path) -> None:
    world = World(status={"tests": [0, -11, 0]})
    passed, record, _ = run_check(world, stem)
    assert world.started.count("tests") == 3
    assert not passed
    tests = by_name(record)["tests"]
    assert tests["status"] == "failed"
    assert "Processes ended with status -11" in tests["notes"][0]
    assert by_name(record)["synccheck"]["status"] == "passed"


def test_processes_that_always_die_are_not_started_for_ever(stem: Path) -> None:
    world = World(status={"tests": [-9] * 100})
    passed, record, _ = run_check(world, stem)
    assert world.started.count("tests") == 2 + 5
    assert by_name(record)["tests"]["failed"]
    assert not passed


@pytest.mark.parametrize("name", ORDER)
def test_a_part_that_fails_is_a_failure_of_the_check(name: str, stem: Path) -> None:
    status = 99 if "check" in name else 1
    passed, record, said = run_check(World(status={name: [status]}), stem)
    part = by_name(record)[name]
    assert not passed
    assert [other for other in ORDER if by_name(record)[other]["failed"]] == [name]
    assert part["status"] == "failed"
    text = " ".join(stem.with_suffix(".md").read_text().split())
    assert f"**The check fails by:** {part['title']}. What these found is to be doubted." in text
    assert f"FAILED: {part['title']}: {part['summary']}" in said
    if "check" in name:
        assert "the sanitizer found errors" in part["summary"]


def test_what_cannot_run_says_why(stem: Path) -> None:
    passed, record, _ = run_check(World(), stem, setting=Setting(cores=2, sanitizer=None))
    assert passed
    assert by_name(record)["memcheck"]["status"] == "not run"
    assert "compute-sanitizer is not installed" in by_name(record)["racecheck"]["summary"]


def test_a_program_that_cannot_be_started(stem: Path) -> None:
    world = World()

    def refuse(command: Command, log: Path) -> Made:
        if part_of(command) == "memcheck":
            raise FileNotFoundError("no such program")
        return World.start(world, command, log)

    world.start = refuse  # type: ignore[method-assign]
    passed, record, _ = run_check(world, stem)
    assert not passed
    assert by_name(record)["memcheck"]["summary"] == "it could not be started: no such program"
    assert by_name(record)["racecheck"]["status"] == "passed"


def test_time_that_a_part_leaves_goes_to_the_others() -> None:
    todo = parts(SETTING)
    shares = sum(part.share for part in todo)
    assert allowed(todo, shares) == pytest.approx(33)
    assert allowed(todo[1:], shares) == pytest.approx(17 * shares / (shares - 33))
    assert allowed(todo[-2:], 1000) == 125  # a training of two minutes
    assert allowed(todo, -5) == 0


def test_the_sanitizer_ignores_errors_of_the_api(tmp_path: Path) -> None:
    (memcheck,) = [part for part in parts(SETTING) if part.name == "memcheck"]
    commands = memcheck.commands(tmp_path, 50)
    assert not isinstance(commands, str)
    assert list(commands[0].arguments[:4]) == [
        "/usr/bin/compute-sanitizer", "--tool=memcheck", "--report-api-errors=no", "--error-exitcode=99"
    ]  # fmt: skip
    assert "--few=a-test" in commands[0].arguments
    assert commands[0].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


@pytest.mark.parametrize(
    ("cores", "memory", "processes"), [(16, 2**37, 8), (4, 2**37, 4), (16, 8 * 2**30, 2), (1, 0, 1)]
)
def test_processes_fit_the_machine(cores: int, memory: int, processes: int) -> None:
    assert Setting(cores=cores, memory=memory).processes == processes


# Reports that are there already


def test_a_former_report_stays_until_the_new_one_is_whole(stem: Path) -> None:
    run_check(World(), stem)
    former = stem.with_suffix(".json").read_bytes()
    world = World()
    run_check(world, stem, stop=lambda: "it was ended" if world.time > 50 else "")
    assert stem.with_suffix(".json").read_bytes() == former
    assert not whole(stem.with_name("nvidia-h200-unfinished"))["finished"]
    passed, _, said = run_check(World({"ops": 16.0}), stem)
    assert passed
    record = whole(stem)
    assert by_name(record)["ops"]["seconds"] > 16
    assert not list(stem.parent.glob("*unfinished*"))
    assert len(list(stem.parent.iterdir())) == 6
    assert f"written to {stem}.json" in said[-2]


def test_a_poorer_report_replaces_no_richer_one(stem: Path) -> None:
    run_check(World(), stem)
    former = stem.with_suffix(".json").read_bytes()
    _, _, said = run_check(World(), stem, setting=Setting(cores=2, sanitizer=None))
    assert stem.with_suffix(".json").read_bytes() == former
    assert "stays. It has, and this one lacks: memcheck, on a subset, racecheck" in said[-3]
    assert f"written to {stem}-unfinished.json" in said[-2]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("nvidia-h200.json", '{"title": "NVIDIA H100"}', "is a report of NVIDIA H100, and this device is NVIDIA H200"),
        ("nvidia-h200.json", "no json", "is no report"),
        ("nvidia-h200.md", "mine", "is there without its .json"),
    ],
)
def test_what_is_not_this_devices_is_not_overwritten(stem: Path, name: str, content: str, complaint: str) -> None:
    stem.parent.mkdir()
    (stem.parent / name).write_text(content)
    with pytest.raises(RefusedError, match=complaint) as refused:
        Files(stem, DEVICE)
    assert "name another --output" in str(refused.value)
    assert (stem.parent / name).read_text() == content
    assert len(list(stem.parent.iterdir())) == 1
