"""`ats study inference`: its counts against other ways to come to them, its files and errors."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ats.experiments.commands.command_line import run
from ats.experiments.evaluation import evaluate, held_out_data
from ats.experiments.study import inference_report
from ats.experiments.study.inference import InferenceOptions, Row, _Counts, measure, read_model, ways
from ats.experiments.study.inference_report import study_inference
from ats.experiments.trained import load
from ats.experiments.training import train
from ats.models import ATSClassifier
from ats.prediction import Prediction, student_quantile
from tests.test_training import tiny

CELLS = 36
SMALL = InferenceOptions(images=12, draws=2, n_patches=(4, CELLS), lead=(2.0,), tolerance=(1e9, 0.0), budget=11)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("study") / "run"))


@pytest.fixture(scope="module")
def rows(checkpoint: Path) -> dict[tuple[str, float], Row]:
    shares: list[float] = []
    measured = measure(1, load(checkpoint), SMALL, None, shares.append)
    assert sum(shares) == pytest.approx(1)
    return {(row.way, row.value): row for row in measured}


def test_every_way_is_measured(rows: dict[tuple[str, float], Row]) -> None:
    assert list(rows) == ways(SMALL)
    for row in rows.values():
        images = SMALL.images * (1 if row.way in ("full", "topk") else SMALL.draws)
        assert row.error * images == pytest.approx(round(row.error * images))
        assert set(row.coverage) == (set() if row.way in ("full", "ordered", "topk") else {"0.95", "0.8"})


def test_errors_are_those_of_the_model(rows: dict[tuple[str, float], Row], checkpoint: Path) -> None:
    """Against the full model in one batch, `ats evaluate` for the most probable cells, and draws of all cells."""
    task = load(checkpoint)
    assert isinstance(task.model, ATSClassifier)
    view, image, label = held_out_data(task, SMALL.images, None).load("test", torch.arange(12))
    with torch.no_grad():
        said = task.model.classify(task.model.sampling.full(view, image)).argmax(-1)
    error = float((said != label).double().mean())
    full = rows["full", 0]
    assert (full.error, full.other_class, full.patches) == (error, 0, CELLS)
    for way in ("ordered", "unordered", "topk"):
        everything = rows[way, CELLS]
        assert (everything.error, everything.error_spread, everything.other_class) == (error, 0, 0), way
        assert everything.patches == CELLS
        assert rows[way, 4].patches == 4
    assert rows["topk", 4].error == pytest.approx(evaluate(task, method="topk", n_patches=4, images=12).error)


def test_anytime_reads_what_its_criterion_asks_for(rows: dict[tuple[str, float], Row]) -> None:
    """At once where any error will do, and the whole budget where none is small enough."""
    assert rows["tolerance", 1e9].patches == 8
    assert rows["tolerance", 0].patches == 11
    assert 8 <= rows["lead", 2].patches <= 11


def test_coverage_is_the_share_inside_of_the_interval() -> None:
    """Two images of two classes from 5 patches: with t = 2.776 at 95% and 1.533 at 80%, three and one lie inside."""
    assert student_quantile(0.95, 4) == pytest.approx(2.776, abs=1e-3)
    count = _Counts()
    logits, error = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    prediction = Prediction(logits, error, torch.tensor([5, 5]), torch.tensor([True, True]))
    truth = torch.tensor([[2.7, -2.8], [1.5, -1.6]], dtype=torch.float64)
    count.add(prediction, truth, torch.tensor([0, 1]), (0.95, 0.8))
    assert (count.covered, count.logits, count.patches) == ({"0.95": 3, "0.8": 1}, 4, 10)
    assert (count.wrong, count.other) == (1, 0)


def test_command_writes_goes_on_and_replaces_only_its_own(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models; the second run is stopped after the first model, and measures that one only once."""
    other = tmp_path / "other.ckpt"
    shutil.copy(checkpoint, other)
    options = "--images 6 --draws 2 --n-patches 4 --lead 2 --tolerance 0.5 --budget 9"
    command = ["study", "inference", str(checkpoint.parent.parent), str(other), *options.split()]
    assert run([*command, "--output", str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    text = (tmp_path / "whole" / "results" / "inference.md").read_text()
    assert text.strip() in shown
    assert "| anytime, tolerance 0.5 | " in text
    record = json.loads((tmp_path / "whole" / "results" / "inference.json").read_text())
    assert [row["model"] for row in record["rows"]] == [1] * 6 + [2] * 6
    assert record["options"]["models"][0]["sha256"] == record["options"]["models"][1]["sha256"]

    measured, really_measure = [], measure

    def stopping(number: int, *rest: Any) -> list[Row]:
        if number == 2 and len(measured) == 1:
            measured.append(0)
            raise KeyboardInterrupt
        measured.append(number)
        return really_measure(number, *rest)

    monkeypatch.setattr(inference_report, "measure", stopping)
    parts = [*command, "--output", str(tmp_path / "parts")]
    assert run(parts) == 130
    assert run(parts) == 0
    assert measured == [1, 0, 2]
    for name in ("inference.json", "inference.md"):
        assert (tmp_path / "parts/results" / name).read_bytes() == (tmp_path / "whole/results" / name).read_bytes()

    assert run([*parts, "--seed", "1"]) == 1
    assert "is not what `ats study inference` wrote with these options" in capsys.readouterr().err
    content = torch.load(other, weights_only=True)
    content["epoch"] = 99
    torch.save(content, other)
    assert run(parts) == 1, "another model under the same name"


def test_models_that_draw_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "cnn")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, method="cnn", cnn_scale=0.2),
        optim=dataclasses.replace(config.optim, epochs=1),
    )
    assert run(["study", "inference", str(train(config))]) == 1
    assert "is a cnn, which draws no patches" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"n_patches": (10, 1)}, "n_patches must be at least 2, which have a standard error, got 1"),
        ({"confidence": (95.0,)}, r"confidence must be in \(0, 1\), got 95"),
        ({"n_patches": (100,)}, "36"),
        ({"tolerance": (-1.0,)}, "tolerance must be a finite number of at least 0, got -1"),
        ({"images": 0}, "images"),
    ],
)
def test_errors(changes: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        study_inference([checkpoint], dataclasses.replace(SMALL, **changes), None, None)


def test_a_checkpoint_is_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["study", "inference"]) == 1
    assert "name at least one checkpoint" in capsys.readouterr().err
    assert run(["study", "inference", str(tmp_path)]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_what_a_checkpoint_was_trained_as(checkpoint: Path) -> None:
    model, _ = read_model(checkpoint)
    assert (model.experiment, model.preset, model.method, model.seed) == ("megapixel-mnist", "demo", "ats-10", 0)
    assert len(model.sha256) == 64
