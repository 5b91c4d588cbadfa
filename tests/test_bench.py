"""The benchmarks' own arithmetic: what is counted, compared and written. No test looks at a time."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import gpu_check, measure
from bench.report import Group, Report
from tests.conftest import HAS_GPU

CPU = torch.device("cpu")


def test_methods_take_turns_and_inputs_rotate() -> None:
    calls: list[tuple[str, int]] = []

    def method(name: str) -> measure.Method:
        return lambda index: calls.append((name, index))

    timings = measure.compare({"a": method("a"), "b": method("b")}, CPU, seconds=1e-9)
    assert {timing.rounds for timing in timings.values()} == {7}
    assert len({index for name, index in calls if name == "a"}) >= 7
    rounds = [calls[start : start + 200] for start in range(6, len(calls), 200)]  # two methods, 100 calls each
    assert [a_first[0][0] for a_first in rounds] == ["a", "b"] * 3 + ["a"]


def test_timing_is_in_milliseconds() -> None:
    assert measure.timing([0.004, 0.001, 0.002, 0.003, 0.005]) == measure.Timing(3.0, 1.0, 2.0, 4.0, 5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scratch_is_what_a_call_takes_beyond_what_it_returns(device: str) -> None:
    x = torch.zeros(1000, 1024, device=device)
    scratch, returned = measure.scratch_bytes(lambda index: x.cos().exp(), torch.device(device))
    assert (scratch, returned) == (pytest.approx(4_096_000, abs=20_000), 4_096_000)  # Python's objects count too
    scratch, returned = measure.scratch_bytes(lambda index: x.cos().exp_(), torch.device(device))
    assert (scratch, returned) == (pytest.approx(0, abs=20_000), 4_096_000)
    if device == "cpu":
        scratch, returned = measure.scratch_bytes(lambda index: x + float(np.ones(10**6).sum()), torch.device(device))
        assert (scratch, returned) == (pytest.approx(8_000_000, abs=20_000), 4_096_000)


def test_a_report_says_which_targets_are_met(tmp_path: Path) -> None:
    group = Group("Sampling", {"ours": measure.timing([1e-3] * 3), "theirs": measure.timing([5e-3, 8e-3, 8e-3])})
    group.at_least(6, group.ratio("theirs", "ours"), "faster than theirs")
    group.at_most(0.5, group.time("ours"), "a call", "ms")
    group.at_most(5, 3.0, "scratch", "%")
    Report(CPU, [group]).write(tmp_path / "results" / "machine")
    text = (tmp_path / "results" / "machine.md").read_text()
    assert "2 of 3 targets met" in text
    assert "| faster than theirs | ≥ 6 × | 8 × | yes | 5 × |" in text
    assert "| a call | ≤ 0.5 ms | 1 ms | **no** | 1 ms |" in text
    assert "| scratch | ≤ 5 % | 3 % | yes |  |" in text
    record = json.loads((tmp_path / "results" / "machine.json").read_text())
    assert [target["met"] for target in record["groups"][0]["targets"]] == [True, False, True]
    assert record["machine"]["torch"] == torch.__version__


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: make gpu-check checks it")
def test_gpu_check_without_a_gpu_fails_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    message = capsys.readouterr().err
    assert message.startswith("NOTHING WAS CHECKED: there is no GPU")
    assert "torch.cuda.is_available() is False: " in message


def test_gpu_check_puts_its_checks_into_the_benchmarks_report(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h100"
    Report(CPU, [Group("Sampling")]).write(path)
    checks = [gpu_check.Check("tests", False, "1 failed", "the log"), gpu_check.Check("sanitizer", True, "NOT RUN")]
    gpu_check.write(path, checks)
    text = Path(f"{path}.md").read_text()
    assert "## Sampling" in text
    assert "| tests | **no** | 1 failed |" in text
    assert "the log" in text
    assert [check["passed"] for check in json.loads(Path(f"{path}.json").read_text())["checks"]] == [False, True]


def test_gpu_check_counts_what_a_test_run_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_passes(): pass\n@pytest.mark.gpu\ndef test_fails(): assert False\n"
        "@pytest.mark.gpu\n@pytest.mark.skip\ndef test_skipped(): pass\ndef test_other(): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check = gpu_check.run_tests("gpu", "tests on the GPU")
    assert (check.passed, check.summary) == (False, "1 passed, 1 failed, 1 skipped")
    assert "def test_fails(): assert False" in check.output
