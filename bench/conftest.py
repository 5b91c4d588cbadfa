"""Runs the benchmarks on the GPU where there is one, else on two threads, and writes what they found."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.report import Report, default_path

THREADS = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.addoption("--output", type=Path, help="write <output>.json and .md; bench/results/<machine> by default")


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    """Collects the groups of a run; prints and writes them at its end."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cpu":
        torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    report = Report(device)
    yield report
    path = request.config.getoption("--output")
    if path is None and not request.config.getoption("keyword"):  # a part must not replace a whole run's results
        path = default_path(device)
    if path is not None:
        report.write(path)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{report.markdown()}\n{'not written' if path is None else f'written to {path}.json and .md'}")
