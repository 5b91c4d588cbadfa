"""Tables: what is missing is run, what is done is not, and reports say what was run, on what, and what was not."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ats.datasets.synthetic.write import write_colon_cancer
from ats.experiments import cost
from ats.experiments.colon_cancer import ColonCancerConfig
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig, OptimConfig
from ats.experiments.evaluation import Evaluation, evaluate
from ats.experiments.megapixel_mnist import MegapixelMNISTData
from ats.experiments.registry import EXPERIMENTS, tables
from ats.experiments.reproduce import costs, figures, report, runs
from ats.experiments.tables import Table
from tests.test_image_experiments import CPU
from tests.test_training import StopAt

SMALL = (100, 100)
TABLES = tables()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_colon_cancer(folder / "colon-cancer", 12, size=100)
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset "quick" and the published sizes, small enough for a test."""
    paper = EXPERIMENTS["colon-cancer"].presets["paper"]
    quick = dataclasses.replace(
        paper,
        preset="quick",
        data=ColonCancerConfig(folds=3),
        model=dataclasses.replace(paper.model, grid_step=50),
        optim=OptimConfig(epochs=1, batch_size=4),
        trainer=CPU,
    )
    monkeypatch.setitem(EXPERIMENTS["colon-cancer"].presets, "quick", quick)
    monkeypatch.setattr(costs, "measure_bytes", lambda config, device: round(1e6 * config.model.n_patches))
    monkeypatch.setattr(
        costs,
        "measure_seconds",
        lambda configs, device: cost.measure_seconds(configs, device, rounds=1, image_size=SMALL),
    )


def reproduce(line: str, output: Path, data: Path) -> list[dict]:
    assert run(["reproduce", "table1", "--output", str(output), "--data", str(data), *line.split()]) == 0
    return json.loads((output / "table1.json").read_text())


@pytest.mark.usefixtures("tiny")
def test_a_table_from_nothing_then_again_then_with_another_seed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs"
    rows = reproduce("--seeds 1 --methods ATS-10 U-10", output, data)
    assert [row["method"] for row in rows] == [row.name for row in TABLES["table1"].rows]
    by_name = {row["method"]: row for row in rows}
    ats, mil = by_name["ATS-10"], by_name["Deep MIL"]
    assert (ats["runs"], ats["seeds"], ats["images_tested"], ats["not_run"]) == (1, [0], 4, [])
    assert (ats["preset"], ats["data"]) == ("quick", "synthetic CRCHistoPhenotypes")
    assert ats["test_error_sem"] is None  # of one run there is none
    assert ats["bytes_per_sample"] == 10e6
    assert ats["attention"]["times_uniform"] == pytest.approx(
        ats["attention"]["mass"] / ats["attention"]["uniform_mass"]
    )
    assert by_name["U-10"]["attention"] is None
    assert ats["paper"]["test_error"] == 0.093
    assert (mil["runs"], mil["train_loss"], mil["test_error"]) == (0, None, None)
    assert mil["not_run"] == ["train_loss", "test_error"]
    assert mil["seconds_per_sample"] > 0  # costs are known without a run
    assert ats["versions"]["torch"] == torch.__version__

    folder = output / "table1" / "quick" / "ats-10-seed-0"
    trained = json.loads((folder / "training.json").read_text())
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert ats["train_loss"] == trained["metrics"]["train/loss"]
    assert ats["test_error"] == evaluated["error"]
    assert evaluated["repeats"] == 5

    text = (output / "table1.md").read_text()
    assert "| Deep MIL | 1 | not run | not run |" in text
    assert "Data: synthetic CRCHistoPhenotypes. Preset `quick`; seeds 0." in text
    assert "data.folds: 10 -> 3" in text  # what was shrunk
    assert "model.method:" not in text  # which differs by row
    assert "U-10: optim.batch_size 4, optim.epochs 1, optim.learning_rate 0.001, 1 run" in text
    assert "0.093 ± 0.014" in text  # as published
    assert "| 0.083 ± 0.019 | 0.093 ± 0.014 |" in text
    with (output / "table1.csv").open() as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    assert table["Deep MIL"]["test_error"] == "not run"
    assert float(table["ATS-10"]["test_error"]) == ats["test_error"]
    assert float(table["ATS-10"]["paper_seconds_per_sample"]) == pytest.approx(0.0018)
    assert float(table["ATS-10"]["attention_mass"]) == ats["attention"]["mass"]
    assert [table[name]["seconds_per_sample_quartiles_upper"] for name in ("ATS-10", "Deep MIL")] == [
        str(row["seconds_per_sample_quartiles"][1]) for row in (ats, mil)
    ]
    assert (table["ATS-10"]["seeds"], table["Deep MIL"]["attention_mass"]) == ("0", "")

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    again = reproduce("--seeds 1 --methods ATS-10 U-10", output, data)
    assert "2 runs, 2 of them complete" in capsys.readouterr().out
    assert again == rows
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    more = {row["method"]: row for row in reproduce("--seeds 2 --methods ATS-10", output, data)}
    assert more["ATS-10"]["runs"] == 2
    assert more["ATS-10"]["images_tested"] == 8  # another fold
    assert more["U-10"]["runs"] == 1
    assert more["ATS-10"]["test_error_sem"] is not None

    only = reproduce("--seeds 2 --no-train --no-cost", output, data)  # reports what there is
    assert {row["method"]: row["runs"] for row in only} == {name: row["runs"] for name, row in more.items()}


@pytest.mark.usefixtures("tiny")
def test_a_run_is_tested_in_the_precision_of_its_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def note(*arguments: Any, **options: Any) -> Evaluation:
        found.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return evaluate(*arguments, **options)

    monkeypatch.setattr(runs, "evaluate", note)
    line = "--seeds 1 --methods U-10 --no-cost --precision"
    mixed = {row["method"]: row for row in reproduce(f"{line} bf16-mixed", tmp_path, data)}
    assert "- Trained and tested in `bf16-mixed` precision.\n" in (tmp_path / "table1.md").read_text()
    single = reproduce(f"{line} 32-true", tmp_path, data)
    assert "Trained and tested" not in (tmp_path / "table1.md").read_text()
    assert found == [torch.bfloat16, False]
    assert mixed["U-10"]["precision"] == "bf16-mixed"
    table = TABLES["table1"]
    joined = [mixed["U-10"] | {"method": row["method"]} if row["method"] == "U-50" else row for row in single]
    config = table.config(table.rows[0], "quick", 0, tmp_path, None)
    said = report.markdown(table, "quick", config, joined)
    assert "- Trained and tested in `bf16-mixed` precision: U-50." in said


@pytest.mark.usefixtures("tiny")
def test_a_run_that_was_stopped_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["reproduce", "table1", "--output", str(tmp_path), "--data", str(data), "--seeds", "1", "--no-cost"]
    arguments += ["--methods", "U-10"]
    stop = StopAt(step=1)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", lambda config: train_with(config, stop))
        assert run(arguments) == 130
    folder = tmp_path / "table1" / "quick" / "u-10-seed-0"
    assert (folder / "config.json").exists()
    assert not (folder / "evaluation.json").exists()
    assert run(arguments) == 0
    text = (tmp_path / "table1.md").read_text()
    assert "| not measured | not measured | 1 |" in text
    assert "Costs were measured" not in text
    assert (folder / "evaluation.json").exists()


def train_with(config: ExperimentConfig, callback: StopAt) -> Path:
    from ats.experiments.training import train

    return train(config, callbacks=(callback,))


@pytest.mark.usefixtures("tiny")
def test_runs_on_other_data_or_with_other_options_are_not_mixed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs"
    arguments = ["reproduce", "table1", "--output", str(output), "--data", str(data), "--seeds", "1", "--no-cost"]
    arguments += ["--methods", "U-10"]
    assert run(arguments) == 0
    note = output / "table1" / "quick" / "data.json"
    note.write_text(json.dumps({"source": "CRCHistoPhenotypes"}))
    assert run(arguments) == 1
    assert "holds runs on CRCHistoPhenotypes, not on synthetic" in capsys.readouterr().err
    note.unlink()
    quick = EXPERIMENTS["colon-cancer"].presets["quick"]
    changed = dataclasses.replace(quick, optim=dataclasses.replace(quick.optim, learning_rate=0.5))
    monkeypatch.setitem(EXPERIMENTS["colon-cancer"].presets, "quick", changed)
    assert run(arguments) == 1
    assert "optim.learning_rate: 0.001 -> 0.5" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("tiny")
def test_every_gpu_gets_a_run_at_a_time(data: Path, tmp_path: Path) -> None:
    """Processes of their own, each shown one GPU; here they find none, and train on the CPU. One cannot."""
    good = TABLES["table1"].config(TABLES["table1"].rows[0], "quick", 0, tmp_path, data / "colon-cancer")
    broken = TABLES["table1"].config(TABLES["table1"].rows[0], "quick", 1, tmp_path, tmp_path / "nothing")
    with pytest.raises(RuntimeError, match=r"broken on GPU \d ended with status 1; see .*u-10-seed-1\.log"):
        runs.run_jobs([runs.Job("good", good), runs.Job("broken", broken)], gpus=(0, 1))
    assert runs.result_of(good) is not None
    assert "nothing is not the colon cancer data" in broken.run_folder.with_suffix(".log").read_text()


def test_standard_errors() -> None:
    assert report.mean_and_error([]) == (None, None)
    assert report.mean_and_error([0.25]) == (0.25, None)
    mean, error = report.mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3
    assert error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_name_methods_that_exist(table: Table) -> None:
    assert table.experiment in EXPERIMENTS
    names = [row.name for row in table.rows]
    assert len({row.slug for row in table.rows}) == len(names)
    assert set(table.few) <= set(names)
    folders = {table.config(row, "quick", 0, Path("o"), None).run_folder for row in table.rows}
    mixed = table.config(table.rows[0], "quick", 0, Path("o"), None, "bf16-mixed")
    assert (mixed.run_folder.parent.name, mixed.trainer.precision) == ("quick-bf16-mixed", "bf16-mixed")
    assert len(folders) == len(names)
    with pytest.raises(ValueError, match=r"no method 'ATS-11', expected some of 'U-"):
        table.chosen("quick", ("ATS-11",))


def test_published_rows_are_those_of_the_paper() -> None:
    """Spot checks against tables 1 and 2 of the paper."""
    one = {row.name: row.published for row in TABLES["table1"].rows}
    two = {row.name: row.published for row in TABLES["table2"].rows}
    mil, ats, cnn = one["Deep MIL"], two["ATS-5"], two["CNN 0.5"]
    assert mil is not None
    assert ats is not None
    assert cnn is not None
    assert (mil.test_error, mil.seconds_per_sample, mil.bytes_per_sample) == (0.093, 0.0485, 644_000_000)
    assert (ats.train_loss, ats.train_loss_sem, ats.test_error) == (0.162, 0.124, 0.089)
    assert (cnn.test_error, cnn.test_error_sem, cnn.bytes_per_sample) == (0.295, 0.039, 239_000_000)
    assert sum(published is None for published in (*one.values(), *two.values())) == 2  # the gated attention


def test_the_region_that_is_shown_is_where_most_digits_are() -> None:
    demo = EXPERIMENTS["megapixel-mnist"].presets["demo"]
    data = MegapixelMNISTData(dataclasses.replace(demo, data=dataclasses.replace(demo.data, test_images=2)))
    _, image, _ = data.load("test", torch.tensor([0]))
    rows, columns = data.shown_region((image.shape[2], image.shape[3]))
    assert (rows.stop - rows.start, columns.stop - columns.start) == (250, 250)
    digits = data.split("test").places[0, :5].tolist()

    def shown(top: int, left: int) -> int:
        return sum(top <= y <= top + 250 - 28 and left <= x <= left + 250 - 28 for y, x in digits)

    count = shown(rows.start, columns.start)
    assert count > 1
    assert count == max(shown(*(min(max(place - 111, 0), 250) for place in digit)) for digit in digits)


@pytest.mark.usefixtures("tiny")
def test_figures_of_the_complete_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Curves, maps over the training and over N, a comparison and the sweep; what was not run is named."""
    quick = EXPERIMENTS["colon-cancer"].presets["quick"]
    longer = dataclasses.replace(quick, optim=dataclasses.replace(quick.optim, epochs=3))
    monkeypatch.setitem(EXPERIMENTS["colon-cancer"].presets, "quick", longer)
    monkeypatch.setattr(figures, "ENTROPY_WEIGHTS", (0.0, 0.1))
    output = tmp_path / "runs"
    reproduce("--seeds 1 --no-cost --methods ATS-10 ATS-50", output, data)
    arguments = ["reproduce", "figures", "--seeds", "1", "--output", str(output), "--data", str(data)]
    assert run(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "table2-curves.png: not run" in printed
    names = {path.name for path in (output / "figures").iterdir()}
    assert names == {
        "table1-curves.png", "table1-curves.json", "table1-over-training.png", "table1-over-patches.png",
        "table1-comparison.png",
        "entropy-curves.png", "entropy-curves.json", "entropy-maps.png",
    }  # fmt: skip
    curve = json.loads((output / "table1" / "quick" / "ats-10-seed-0" / "curve.json").read_text())["points"]
    assert [point["step"] for point in curve] == [2, 4, 6]  # three epochs of two steps, each of them kept
    seconds = [point["seconds"] for point in curve]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    summary = json.loads((output / "table1" / "quick" / "ats-10-seed-0" / "training.json").read_text())
    assert curve[-1]["train_loss"] == pytest.approx(summary["metrics"]["train/loss"])
    swept = json.loads((output / "entropy" / "quick" / "weight-0.1" / "config.json").read_text())
    assert swept["optim"]["entropy_weight"] == 0.1
    sweep = json.loads((output / "figures" / "entropy-curves.json").read_text())
    assert [row["entropy_weight"] for row in sweep["rows"]] == [0.0, 0.1]
    evaluated = json.loads((output / "entropy" / "quick" / "weight-0.1" / "evaluation.json").read_text())
    assert sweep["rows"][1]["test_error"] == evaluated["error"]
    assert sweep["rows"][1]["attention"]["mass"] > 0
    assert list(sweep["rows"][1]["entropy"]) == sorted(sweep["rows"][1]["entropy"], key=int)
    assert run(["reproduce", "figures", "--methods", "ATS-10"]) == 1
    assert "methods are those of one table" in capsys.readouterr().err
