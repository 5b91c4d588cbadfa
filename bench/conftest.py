"""Runs the benchmarks on the GPU where there is one, else on two threads; writes what they found, and draws it.

Compared methods must take turns, and pytest-benchmark times one function a test. So `measure.compare` does the timing,
and each method's rounds are then played to pytest-benchmark: its table, `--benchmark-json`, `--benchmark-compare` and
`--benchmark-save` have a row for every method.
"""

import copy
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import rehearsal, render
from bench.report import COMPILE_SECONDS, Group, Report, default_path

THREADS = 2
HERE = Path(__file__).parent


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
    group = parser.getgroup("attention sampling's benchmarks", f"-k takes one of {', '.join(render.SECTIONS)}")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure; by default the GPU if there is one, else two threads",
    )
    group.addoption(
        "--output",
        type=Path,
        metavar="PATH",
        help="write PATH.json, PATH.md and plots, and the JSON after each benchmark; by default a whole run goes to "
        "bench/results/<machine>, a part is only printed",
    )
    group.addoption(
        "--compile-seconds",
        type=float,
        default=COMPILE_SECONDS,
        metavar="S",
        help="time that may go to torch.compile, in all",
    )
    group.addoption(
        "--rehearse",
        choices=("all", "first"),
        help="as on a GPU, but on the CPU and with small sizes, all or the first of each module: tries the benchmarks "
        "themselves; its times say nothing",
    )
    group.addoption(
        "--files",
        type=Path,
        metavar="FOLDER",
        help="where large images that are written for a run are kept, 200 MB; by default a folder for temporary files",
    )
    group.addoption("--copy-rate", type=float, metavar="B/S", help="of a large copy on this device, if it is known")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what would fail after minutes of measuring."""
    rehearsal.active = config.getoption("--rehearse") is not None
    if rehearsal.active and config.getoption("--device") != "cpu":
        raise pytest.UsageError("--rehearse stands in for a GPU; add --device=cpu")
    if rehearsal.active and config.getoption("--output") is None:
        raise pytest.UsageError("--rehearse measures nothing that should be kept; name another place by --output")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda, but PyTorch finds no GPU here; leave it out to measure on the CPU")
    path = config.getoption("--output")
    if path is None:
        return
    config.option.output = path = path.with_suffix("") if path.suffix == ".json" else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(f"--output={path}: {error}; name a place that can be written to") from error
    if not os.access(path.parent, os.W_OK):
        raise pytest.UsageError(f"--output={path}: {path.parent} cannot be written to; name another place")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    item.extra_keyword_matches.add(section_of(item))


def section_of(item: pytest.Item) -> str:
    """The section of the report that a benchmark's groups go to: its mark's, or its module's."""
    mark = item.get_closest_marker("section")
    return mark.args[0] if mark else item.getparent(pytest.Module).obj.SECTION


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the sizes that are marked `gpu` where the benchmarks run on a CPU."""
    left_out = [item for item in items if _is_for_a_gpu(item)]
    if config.getoption("--rehearse") == "first":
        own = [item for item in items if item.get_closest_marker("gpu")]  # a GPU's own have targets
        first = {item.path: item for item in [*items[::-1], *own[::-1]]}
        left_out = [item for item in items if item is not first[item.path]]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_for_a_gpu(item: pytest.Item) -> bool:
    """Whether it is a size that only a GPU is given."""
    on_gpu = rehearsal.on_gpu(torch.device(item.config.getoption("--device")))
    return not on_gpu and item.path.is_relative_to(HERE) and item.get_closest_marker("gpu") is not None


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    """End with the headlines, below pytest-benchmark's wide tables."""
    report = config.stash.get(REPORT, None)
    if report is not None and (lines := render.headlines(report.as_dict())):
        terminalreporter.section("headlines")
        for line in lines:
            terminalreporter.write_line(line)
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        known = ", ".join(render.SECTIONS)
        terminalreporter.write_line(f"No such benchmark. -k takes a group ({known}) or a part of a benchmark's name.")


def part_of(session: pytest.Session) -> str:
    """Which part of all benchmarks has run, or "" for all of them."""
    config, wanted = session.config, len(session.items)
    counted: dict[str, list[Any]] = config.pluginmanager.getplugin("terminalreporter").stats
    done = len(counted.get("passed", [])) + len(counted.get("skipped", []))
    if done < wanted:
        return f"{done} of {wanted} benchmarks: it was stopped, or some failed"
    left_out = [item for item in counted.get("deselected", []) if not _is_for_a_gpu(item)]
    places = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    if left_out or config.getoption("lf", default=False) or not places & {HERE, HERE.parent}:
        return f"{done} benchmarks that were selected"
    return ""


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Report]:
    """The groups of the whole run, which are written at its end."""
    start = time.perf_counter()
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cpu":
        torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    report = Report(device, bytes_per_second=request.config.getoption("--copy-rate"))
    report.compile_seconds = request.config.getoption("--compile-seconds")
    report.skipped = dict(LEFT_OUT)
    request.config.stash[REPORT] = report
    yield report
    report.seconds = time.perf_counter() - start
    report.part = part_of(request.session)
    path = request.config.getoption("--output")
    if path is None and not report.part:  # a part must not replace a whole run's results
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
    run.section = section_of(request.node)
    yield run
    hand_over(run.groups[before:], benchmark)
    path = request.config.getoption("--output")
    if path is not None:  # so that a run that is killed leaves what it has measured
        found: dict[str, pytest.TestReport] = request.node.stash.get(REPORTS, {})
        for outcome in found.values():
            if outcome.failed:
                run.failures[request.node.nodeid] = message_of(outcome)
            elif outcome.skipped:
                run.skipped[request.node.nodeid] = message_of(outcome)
        run.part = part_of(request.session)
        run.write(path)


REPORT = pytest.StashKey[Report]()
REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()
LEFT_OUT: dict[str, str] = {}  # modules that cannot be imported here, and why


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    outcome = yield
    item.stash.setdefault(REPORTS, {})[outcome.when] = outcome
    return outcome


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        LEFT_OUT[report.nodeid] = message_of(report)


def message_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why something failed or was skipped, in a line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).partition("\n")[0]


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
