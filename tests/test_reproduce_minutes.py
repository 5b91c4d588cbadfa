"""Tables whose rows are trained for equally long, and whose one model is tested with several numbers of patches."""

import dataclasses
import json
from pathlib import Path

import pytest

from ats.experiments.commands.command_line import run
from ats.experiments.megapixel_mnist import MegapixelMNISTConfig, MegapixelMNISTData
from ats.experiments.registry import EXPERIMENTS, experiment_data, from_dict
from ats.experiments.tables import SHORT
from ats.experiments.trained import load
from tests.test_image_experiments import CPU


def test_minutes_decide_how_long_and_one_model_is_tested_with_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a trial said is kept, so that the same command finds the same run."""
    mnist = EXPERIMENTS["megapixel-mnist"]
    small = MegapixelMNISTConfig(
        digits="bundled", image_size=450, n_noise=5, train_images=64, test_images=8, small_epochs=1, medium_epochs=1
    )
    quick = mnist.presets["quick"]
    quick = dataclasses.replace(
        quick, data=small, optim=dataclasses.replace(quick.optim, epochs=3, batch_size=8), trainer=CPU
    )
    monkeypatch.setitem(mnist.presets, "quick", quick)
    arguments = ["reproduce", "mnist", "--output", str(tmp_path), "--seeds", "1", "--no-cost", "--minutes", "0.03"]
    arguments += ["--methods", "U-10", "ATS-10"]
    assert run(arguments) == 0
    folder = tmp_path / "mnist" / "quick-0.03-minutes"
    stages = json.loads((folder / "ats-10-steps.json").read_text())["stages"]
    assert [(stage["stage"], stage["steps"]) for stage in stages] == [("small", 8), ("medium", 8), ("full size", 8)]
    config = from_dict(json.loads((folder / "ats-10-seed-0" / "config.json").read_text()))
    assert load(folder / "ats-10-seed-0").model.sampling.attention.bound.limit == 10  # twice as wide at the end
    whole = sum(8 * stage["seconds_a_step"] for stage in stages)
    expected = MegapixelMNISTData(quick).lengthened(0.03 * 60 / whole)
    assert (config.data, config.optim) == (dataclasses.replace(expected.data, folder=None), expected.optim)
    tested = json.loads((folder / "ats-10-seed-0" / "tested.json").read_text())
    for method, repeats in (("sample", 5), ("topk", 1)):
        found = tested[method]
        assert [(n, found[n]["method"], found[n]["n_patches"], found[n]["repeats"]) for n in found] == [
            (str(n), method, n, repeats) for n in (5, 10, 25, 50, 100)
        ]
    row = next(row for row in json.loads((tmp_path / "mnist.json").read_text()) if row["method"] == "ATS-10")
    assert row["tested"]["sample"]["10"] == {"test_error": row["test_error"], "test_error_sem": None}
    assert row["tested"]["topk"]["25"] == {"test_error": tested["topk"]["25"]["error"], "test_error_sem": None}
    steps = json.loads((folder / "ats-10-seed-0" / "training.json").read_text())["steps"]
    assert (row["minutes"], row["images_seen"]) == (0.03, 8 * steps)
    text = (tmp_path / "mnist.md").read_text()
    assert "| ATS-10, tested with | 5 patches | 10 patches | 25 patches | 50 patches | 100 patches |" in text
    assert f"| the most probable | {tested['topk']['5']['error']:.3f} | {tested['topk']['10']['error']:.3f} |" in text
    assert "Each method was trained for about 0.03 minutes" in text
    assert "data.train_images: 5000 -> 64;" in " ".join(text.split())  # the preset's, not that of U-10's minutes
    capsys.readouterr()
    before = (folder / "ats-10-steps.json").stat().st_mtime_ns
    assert run(arguments) == 0
    assert "2 runs, 2 of them complete" in capsys.readouterr().out
    assert (folder / "ats-10-steps.json").stat().st_mtime_ns == before
    (folder / "ats-10-seed-0" / "tested.json").write_text(json.dumps(tested["sample"]))  # as it once was
    assert run(arguments) == 0
    assert "2 runs, 1 of them complete" in capsys.readouterr().out
    assert json.loads((folder / "ats-10-seed-0" / "tested.json").read_text()) == tested
    assert run(["reproduce", "table2", "--minutes", "1", "--output", str(tmp_path)]) == 1
    assert "are taught before the training" in " ".join(capsys.readouterr().err.split())


def test_a_training_is_lengthened_in_its_stages() -> None:
    """Shortened by fewer images an epoch, for a few epochs could not have the same stages."""
    config = EXPERIMENTS["megapixel-mnist"].presets["quick"]
    data = dataclasses.replace(config.data, small_epochs=6, medium_epochs=40, train_images=5000)
    config = dataclasses.replace(config, data=data, optim=dataclasses.replace(config.optim, epochs=52))
    for times, expected in ((2.0, (12, 80, 104, 5000)), (0.3, (6, 40, 52, 1500)), (1.0, (6, 40, 52, 5000))):
        found = MegapixelMNISTData(config).lengthened(times)
        lengths = found.data.small_epochs, found.data.medium_epochs, found.optim.epochs, found.data.train_images
        assert lengths == expected
    alone = MegapixelMNISTData(config).alone("small", 96).data
    assert (alone.image_size, alone.n_noise, alone.train_images, alone.small_epochs) == (500, 10, 96, 0)
    longer = experiment_data(EXPERIMENTS["colon-cancer"].presets["quick"])
    assert longer.lengthened(0.5).optim.epochs == round(0.5 * longer.config.optim.epochs)


def test_every_preset_names_its_view_and_its_own_options() -> None:
    """A larger view is said in the table; what rows have of their own reaches the runs."""
    table = EXPERIMENTS["megapixel-mnist"].table
    assert table is not None
    rows = {row.name: row for row in table.rows}
    assert [table.scale(rows["ATS-10"], preset) for preset in ("paper", *SHORT)] == ["0.12/1", "0.12/1", "0.2/1"]
    assert table.scale(rows["CNN 1"], "view-300") == "1"
    kinds = {
        name: table.model(rows[name], "quick").evidence for name in ("U-10", "CNN 1", "Deep MIL", "ATS-10", "ATS-25")
    }
    assert kinds == {"U-10": "none", "CNN 1": "none", "Deep MIL": "none", "ATS-10": "peaks", "ATS-25": "cells"}
    assert [len(table.chosen("quick", (), minutes)) for minutes in (0.0, 60.0)] == [1, len(rows)]
    frames = EXPERIMENTS["speed-limits"].more[0].presets["quick"].data
    assert frames.n_classes == 8
