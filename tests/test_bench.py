"""The benchmarks' own arithmetic: what is counted, compared and written. No test looks at a time."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from ats.experiments import cost
from ats.experiments.build import make_view
from ats.experiments.plotting.plots import COLOURS
from bench import bench_tables, changes, render
from bench.bench_training_step import PARTS, SplitStep, channels_last_model
from bench.conftest import part_of
from bench.plots import mark_misfits
from bench.recipes import recipe
from bench.report import Group, Report
from tests.helpers import alone

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def a_report() -> Report:
    """Two groups of each kind, with times that were never measured."""
    ops = Group("Sampling", {"ours": [1e-3] * 3, "theirs": [5e-3, 8e-3, 8e-3]}, floor_bytes=4_000_000)
    ops.at_least(6, ops.ratio("theirs", "ours"), "faster than theirs", headline=True)
    ops.at_most(0.5, ops.time("ours"), "a call", "ms")
    ops.at_most(5, 3.0, "scratch", "%")
    steps = Group("Colon cancer", {"ATS-10": [0.02] * 3, "Deep MIL": [2.0] * 3}, section="table1", per="sample")
    steps.memory = {"ATS-10": 14_000_000, "Deep MIL": 700_000_000}
    steps.published = {"ATS-10": (0.0018, 21_000_000), "Deep MIL": (0.0485, 644_000_000)}
    steps.not_run = {"CNN 1": "does not fit: a step would take about 90.0 GB, and 20.0 GB are free"}
    sizes = Group("By size", {"ATS, 500": [0.02] * 3, "ATS, 1000": [0.02] * 3, "CNN, 500": [0.1] * 3}, "scaling")
    sizes.axis = "pixels"
    sizes.points = {"ATS, 500": ("ATS", 500), "ATS, 1000": ("ATS", 1000), "CNN, 500": ("CNN", 500)}
    sizes.points["CNN, 1000"] = "CNN", 1000
    sizes.not_run = {"CNN, 1000": "it takes too long"}
    return Report(CPU, [ops, steps, sizes], bytes_per_second=16e9)


def test_a_report_says_which_targets_are_met(tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine.json"
    a_report().write(path.with_suffix(""))
    record = json.loads(path.read_text())
    assert [target["met"] for target in record["groups"][0]["targets"]] == [True, False, True]
    assert record["machine"]["torch"] == torch.__version__
    written = render.write(path)
    text = path.with_suffix(".md").read_text()
    assert "2 of 3 targets met" in text
    assert "| Sampling | faster than theirs | ≥ 6 × | 8 × | yes | 5 × |" in text
    assert "| faster than theirs | ≥ 6 × | 8 × | yes | 5 × |" in text
    assert "| a call | ≤ 0.5 ms | 1 ms | **no** | 1 ms |" in text
    assert "| scratch | ≤ 5 % | 3 % | yes |  |" in text
    assert [file.name for file in written] == ["machine.md", "machine-table1.png", "machine-scaling.png"]
    assert all(file.stat().st_size > 1000 for file in written)
    assert all(f"]({file.name})" in text for file in written[1:])


def test_a_plot_marks_the_first_size_that_does_not_fit() -> None:
    """Not a size that would fit, but take too long; in the line's own colour."""
    group = {
        "points": {"a": ("ATS", 500), "b": ("CNN", 500), "c": ("CNN", 1000), "d": ("CNN", 2000), "e": ("CNN", 4000)},
        "not_run": {"c": "a step would take about 9 s", "e": "does not fit: 9 GB", "d": "does not fit: 3 GB"},
    }
    figure, axes = plt.subplots()
    mark_misfits(axes, group, ["ATS", "CNN"])
    crosses = [(list(line.get_xdata()), line.get_color()) for line in axes.lines]
    plt.close(figure)
    assert crosses == [([2000], COLOURS[1]), ([], "black")]


def test_a_table_has_the_ratio_to_each_alternative_beside_the_published_one() -> None:
    text = render.markdown(a_report().as_dict())
    assert "| method | median ms/sample | quartiles | best | rounds | × first | MB | × first | published ms |" in text
    assert "| Deep MIL | 2000 | 2000 – 2000 | 2000 | 3 | 100× | 700 | 50× | 48.5 | 26.9× | 644 | 30.7× |" in text
    assert "| CNN 1 | not run: does not fit: a step would take about 90.0 GB" in text
    assert "| theirs | 8 | 6.5 – 8 | 5 | 3 | 8× | 0.5 | 3.12% |" in text  # 4 MB in 8 ms; a copy does 16 GB/s
    assert "| 1,000 | 20 (20 – 20) | not run: it takes too long |" in text
    assert "| 500 | 20 (20 – 20) | 100 (100 – 100), 5× |" in text


def test_what_does_not_fit_is_told_from_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tables, "available_bytes", lambda device: 10e9)
    assert bench_tables.unaffordable(1, 6.9e9, 3, CPU) is None
    assert "does not fit: a step would take about 7 GB, more than 70% of the 10 free" in str(
        bench_tables.unaffordable(1, 7.1e9, 3, CPU)
    )
    assert "a step would take about 40 s, and a run has 3 s" in str(bench_tables.unaffordable(40, 1e9, 3, CPU))
    assert bench_tables.unaffordable(40, 1e9, 3, torch.device("cuda")) is None


def test_rounds_are_handed_to_pytest_benchmark_whole(tmp_path: Path) -> None:
    """Its JSON, and with it --benchmark-compare, must have the interleaved rounds, a row for every method."""
    (tmp_path / "bench_it.py").write_text(
        "import time\nSECTION = 'ops'\n"
        "def bench_two(report):\n"
        "    report.compare('Two ways', {'ours': lambda i: None, 'theirs': lambda i: time.sleep(0.01)}, seconds=0.01)\n"
        "def bench_skipped(report):\n    import pytest\n    pytest.skip('not here')\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", str(tmp_path / "bench_it.py"), "--device=cpu"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--output={tmp_path / 'ours'}"]
    command += [f"--benchmark-json={tmp_path / 'theirs.json'}"]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    rows = json.loads((tmp_path / "theirs.json").read_text())["benchmarks"]
    assert [row["name"] for row in rows] == ["bench_two: ours", "bench_two: theirs"]
    assert {row["group"] for row in rows} == {"Two ways"}
    timings = json.loads((tmp_path / "ours.json").read_text())["groups"][0]["timings"]
    for row, timing in zip(rows, timings.values(), strict=True):
        assert len(row["stats"]["data"]) == timing["rounds"] >= 7
        assert 1e3 * row["stats"]["median"] == pytest.approx(timing["median"])
    assert timings["theirs"]["best"] >= 10


def test_a_run_on_a_cpu_collects_no_sizes_of_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "--device=cpu"]
    done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_view[8-3-1500-180]" in done.stdout
    assert "bench_view[1-3-40000-1024]" not in done.stdout
    assert "bench_gather_from_host_memory" not in done.stdout


def test_a_comparison_tells_change_from_noise() -> None:
    before, after = a_report().as_dict(), a_report().as_dict()
    assert "None of 7." in "\n".join(changes.changes(before, after))
    time = after["groups"][1]["timings"]["ATS-10"]
    time |= {"median": 30.0, "low": 29.0, "high": 31.0}
    noisy = after["groups"][0]["timings"]["ours"]
    noisy |= {"median": 1.5, "low": 0.9, "high": 2.0}  # its quartiles still hold what was measured before
    after["groups"][0]["targets"][0]["measured"] = 6.0
    after["groups"][1]["memory"]["ATS-10"] = 16_000_000
    after["machine"]["torch"] = "another"
    del after["groups"][2]
    text = "\n".join(changes.changes(before, after))
    assert f"- torch: {torch.__version__} -> another" in text
    assert "| Sampling | faster than theirs | 8 × | 6 × | -25.0% | **yes** | met |" in text
    assert "| Colon cancer | ATS-10 | 20 | 30 | +50.0% | +25.0% |" in text
    assert "| Sampling | ours |" not in text
    assert "| Colon cancer | ATS-10 | 14.0 | 16.0 | +14.3% |" in text
    assert "- Not in the run after: By size" in text


def test_make_takes_the_files_to_compare_as_they_are(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for name in names:
        Path(name).write_text(json.dumps(a_report().as_dict()))
    done = subprocess.run(
        ["make", "-n", "bench-compare", *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"-m bench.changes {names[0]} {names[1]}\n" in done.stdout
    Path(names[1]).write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "bench.changes", *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{names[1]} is no run of `make bench`" in done.stderr


def test_what_all_of_a_group_did_is_no_change() -> None:
    before, after = a_report().as_dict(), a_report().as_dict()
    name = "Three ways"
    for record, factor in ((before, 1.0), (after, 1.5)):
        ways = {way: {"median": factor, "low": factor, "high": factor, "best": factor, "rounds": 9} for way in "abc"}
        record["groups"].append(record["groups"][0] | {"name": name, "timings": ways, "targets": [], "memory": {}})
    assert f"| {name} |" not in "\n".join(changes.changes(before, after))
    slow = after["groups"][-1]["timings"]["b"]
    slow |= {"median": 2.0, "low": 2.0, "high": 2.0}
    text = "\n".join(changes.changes(before, after))
    assert f"| {name} | b | 1 | 2 | +100.0% | +50.0% |" in text
    assert f"| {name} | a |" not in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x89PNG", "cannot be read"),
        (b"{}", "no run of `make bench`"),
        (b'{"machine": {}, "groups": [{"name": "x"}]}', "cannot be compared: KeyError"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, content: bytes, complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["changes", str(path), str(path)])
    assert changes.main() == 1
    assert complaint in capsys.readouterr().err


BENCHES = "SECTION = 'ops'\n" + "".join(
    f"def bench_{name}(report):\n    report.compare('{name}', {{'ours': lambda i: None}}, seconds=0.01)\n    {then}\n"
    for name, then in (("one", ""), ("two", ""), ("bad", "raise KeyboardInterrupt"))
)


def run_benches(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "bench_it.py").write_text(BENCHES)
    command = [sys.executable, "-m", "pytest", "-p", "bench.conftest", "--device=cpu", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (["bench_it.py::bench_one"], "1 benchmarks that were selected"),
        (["bench_it.py", "-k", "one or two"], "2 benchmarks that were selected"),
        (["bench_it.py"], "2 of 3 benchmarks: it was stopped, or some failed"),
    ],
)
def test_a_part_of_a_run_says_so_and_replaces_no_results(tmp_path: Path, selection: list[str], expected: str) -> None:
    selection = [str(tmp_path / selection[0]), *selection[1:]]
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").iterdir()}
    printed = run_benches(tmp_path, *selection).stdout
    assert f"| not a whole run | {expected} |" in printed
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "bench" / "results").iterdir()}
    if expected.startswith("2 of 3"):  # the file has it from where the page has it
        run_benches(tmp_path, *selection, f"--output={tmp_path / 'out.json'}")
        assert json.loads((tmp_path / "out.json").read_text())["machine"]["not a whole run"] == expected


@pytest.mark.parametrize("arguments", [["bench"], ["bench/"], [str(ROOT / "bench")]])
def test_a_whole_run_is_one_of_all_benchmarks_but_the_sizes_of_a_gpu(arguments: list[str]) -> None:
    config = Mock()
    config.args, config.invocation_params.dir = arguments, ROOT
    config.getoption.side_effect = lambda name, default=None: {"--device": "cpu", "lf": False}[name]
    item = Mock(path=ROOT / "bench" / "bench_ops.py", config=config)
    counted = {"passed": [item, item], "skipped": [item], "deselected": [item]}
    config.pluginmanager.getplugin.return_value.stats = counted
    session = Mock(config=config, items=[item] * 3)
    assert part_of(session) == ""
    item.get_closest_marker.return_value = None  # no size of a GPU, hence left out by the user
    assert part_of(session) == "3 benchmarks that were selected"
    counted["passed"].pop()
    assert part_of(session).startswith("2 of 3 benchmarks")


def test_a_run_ends_with_its_headlines_in_80_columns(tmp_path: Path) -> None:
    path = ROOT / "bench" / "results" / "intel-xeon-2-threads.json"
    shown = render.headlines(json.loads(path.read_text()))
    assert max(map(len, shown)) <= 80
    assert "met" in shown[-1]
    assert len(shown) > 10
    (tmp_path / "bench_last.py").write_text(
        "SECTION = 'ops'\ndef bench_it(report):\n"
        "    group = report.compare('a group', {'ours': lambda i: None}, seconds=0.01)\n"
        "    group.at_most(1.5, 1.25, 'of time', headline=True)\n"
        "    group.at_least(3.0, 2.0, 'of speed', headline=True)\n"
    )
    lines = run_benches(tmp_path, str(tmp_path / "bench_last.py")).stdout.splitlines()
    begin = next(index for index, line in enumerate(lines) if "= headlines =" in line)
    assert [" ".join(line.split()) for line in lines[begin + 1 : begin + 5]] == [
        "a group",
        "of time 1.25 × ≤ 1.5 × met",
        "of speed 2 × ≥ 3 × MISSED",
        "1 of 2 targets met.",
    ]


def test_a_step_in_parts_is_a_training_step() -> None:
    """Of a recipe, with several draws: the same gradients as of the model as a whole, part by part timed."""
    config = recipe("colon-cancer", 3)
    image = cost.random_images(config, (60, 60), batch=2)[0]
    torch.manual_seed(0)
    model = channels_last_model(config)
    optimiser = Mock()
    optimiser.zero_grad = model.zero_grad
    found: dict[str, Tensor] = {}
    optimiser.step = lambda: found.update({name: value.grad for name, value in model.named_parameters()})
    torch.manual_seed(1)
    seconds = SplitStep(model, config, image, draws=2)(optimiser)
    assert all(seconds[part] > 0 for part in PARTS)
    torch.manual_seed(1)
    logits, sample = model(make_view(config, image), image, draws=2)
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    (loss - config.optim.entropy_weight * sample.entropy.mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-4, atol=1e-6)


def test_bad_options_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = run_benches(tmp_path, str(tmp_path / "bench_it.py"), f"--output={tmp_path / 'file' / 'x'}")
    assert "name a place that can be written to" in nowhere.stderr
    nothing = run_benches(tmp_path, str(tmp_path / "bench_it.py"), "-k", "nothing")
    assert "-k takes a group (table1, " in nothing.stdout
