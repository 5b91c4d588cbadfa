"""Runs the benchmarks on the GPU where there is one, else on two threads; writes what they found, and draws it.

Compared methods must take turns, and pytest-benchmark times one function a test. So `measure.compare` does the timing,
and each method's rounds are then played to pytest-benchmark: its table, `--benchmark-json`, `--benchmark-compare` and
`--benchmark-save` have a row for every method.
"""

import copy
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import render
from bench.report import Group, Report, default_path

THREADS = 2


class Replay:
    """A timer for pytest-benchmark, in which seconds pass that were measured before."""

    __name__ = "replay of interleaved rounds"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, benchmark: BenchmarkFixture, seconds: list[float]) -> None:
        """Give a benchmark these rounds."""
        coming = iter(seconds)
        benchmark.pedantic(self._let_pass, setup=lambda: ((self._rewound(next(coming)),), {}), rounds=len(seconds))

    def _rewound(self, seconds: float) -> float:
        self.now = 0.0
        return seconds

    def _let_pass(self, seconds: float) -> None:
        self.now = seconds


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption(
        "--output", type=Path, help="write <output>.json, .md and plots; bench/results/<machine> by default"
    )


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=REPLAY))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the sizes that are marked `gpu` where the benchmarks run on a CPU."""
    if config.getoption("--device") == "cuda":
        return
    here = Path(__file__).parent
    left_out = [item for item in items if item.path.is_relative_to(here) and item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Report]:
    """The groups of the whole run, which are written at its end."""
    start = time.perf_counter()
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cpu":
        torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    report = Report(device)
    yield report
    report.seconds = time.perf_counter() - start
    path = request.config.getoption("--output")
    if path is None and not request.config.getoption("keyword"):  # a part must not replace a whole run's results
        path = default_path(device)
    if path is not None:
        report.write(path)
        render.write(Path(f"{path}.json"))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{render.markdown(report.as_dict()) if path is None else f'written to {path}.json and .md'}")


@pytest.fixture
def report(run: Report, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[Report]:
    """Takes the groups of one test."""
    before = len(run.groups)
    run.section = request.module.SECTION
    yield run
    hand_over(run.groups[before:], benchmark)


def hand_over(groups: list[Group], benchmark: BenchmarkFixture) -> None:
    """Give pytest-benchmark the rounds of every method, each as a benchmark of its own."""
    methods = [(group, method) for group in groups for method in group.rounds]
    # A fixture takes one function; the last method gets the test's own.
    ours = [copy.copy(benchmark) for _ in methods[1:]] + [benchmark] * bool(methods)
    for (group, method), one in zip(methods, ours, strict=True):
        one.group = group.name
        one.name, one.fullname = f"{benchmark.name}: {method}", f"{benchmark.fullname}: {group.name}: {method}"
        one.extra_info = {"device": "cuda"} if torch.cuda.is_available() else {}
        one.extra_info["per"] = group.per
        REPLAY.play(one, group.rounds[method])
