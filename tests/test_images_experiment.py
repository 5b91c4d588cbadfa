"""`ats train images`: classes, labels and values from a manifest, whose images are made here."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig, OptimConfig, TrainerConfig
from ats.experiments.evaluation import evaluate
from ats.experiments.images import PRESETS, ImagesConfig, ImagesData
from ats.experiments.objectives import Classes, Labels, Value
from ats.experiments.registry import experiment_data
from ats.experiments.trained import load
from ats.experiments.training import InterruptedRunError, train
from tests.test_training import StopAt, assert_same, weights

SIDE = 48
COLOURS = {"red": (255, 30, 30), "blue": (30, 30, 255)}


def write_images(folder: Path, labels: Sequence[str], columns: dict[str, Sequence[str]] | None = None) -> Path:
    """Grey noise with a square: red for the label "red" or where it is among several; as bright as a number says."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = []
    for index, label in enumerate(labels):
        pixels = random.integers(100, 140, (SIDE, SIDE, 3)).astype(np.uint8)
        for name in label.split(";"):
            if not name:
                continue
            grey = (int(name),) * 3 if name.isdigit() else None
            top, left = random.integers(0, SIDE - 12, 2)
            pixels[top : top + 12, left : left + 12] = grey or COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append(
            {"path": f"{index}.png", "label": label} | {name: values[index] for name, values in (columns or {}).items()}
        )
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "labels.csv"


def tiny(manifest: Path, output: Path, epochs: int = 3, **data: object) -> ExperimentConfig:
    preset = PRESETS["quick"]
    return dataclasses.replace(
        preset,
        output=output,
        data=ImagesConfig(manifest=manifest, folds=3, **data),  # type: ignore[arg-type]
        model=dataclasses.replace(preset.model, n_patches=3, patch_size=16, view_scale=0.5),
        optim=OptimConfig(epochs=epochs, batch_size=4, learning_rate=1e-2),
        trainer=TrainerConfig(accelerator="cpu", devices="1", checkpoint_seconds=60.0 if epochs > 5 else 0.0),
    )


TWO = ["red", "blue"] * 6


def data_of(config: ExperimentConfig) -> ImagesData:
    data = experiment_data(dataclasses.replace(config, data=config.data.resolved(config.seed)))
    assert isinstance(data, ImagesData)
    return data


def test_a_run_that_was_interrupted_ends_with_the_same_weights(tmp_path: Path) -> None:
    manifest = write_images(tmp_path / "data", TWO)
    whole = train(tiny(manifest, tmp_path / "whole"))
    stopped = tiny(manifest, tmp_path / "stopped")
    with pytest.raises(InterruptedRunError):
        train(stopped, callbacks=(StopAt(step=3),))
    assert_same(weights(train(stopped)), weights(whole))
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    trained = load(tmp_path / "whole")  # without data
    assert trained.classes == ("blue", "red")
    assert evaluate(trained, folder=moved).images == 4
    with pytest.raises(FileNotFoundError, match=r"there is no manifest .*data/labels\.csv"):
        evaluate(trained)
    (moved / "labels.csv").write_text((moved / "labels.csv").read_text().replace("0.png,red", "0.png,blue"))
    with pytest.raises(ValueError, match=r"holds a run on labels\.csv, 12 images"):
        train(tiny(moved / "labels.csv", tmp_path / "stopped", epochs=3, folder=moved))


def test_classes_are_learned_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, TWO * 2, {"group": [f"p{i // 2}" for i in range(24)]})
    options = ["--preset", "quick", "--data.manifest", str(tmp_path / "labels.csv"), "--data.folds", "3"]
    options += [
        "--model.patch-size",
        "16",
        "--model.n-patches",
        "6",
        "--model.view-scale",
        "0.5",
        "--optim.epochs",
        "15",
    ]
    options += ["--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu", "--optim.class-weights"]
    assert run(["train", "images", *options]) == 0
    assert run(["evaluate", str(tmp_path / "run"), "--output", str(tmp_path / "error.json")]) == 0
    (found,) = json.loads((tmp_path / "error.json").read_text())
    assert found["error"] <= 1 / 8  # guessing errs in a half
    assert found["images"] == 8
    config = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (config["classes"], config["bands"]) == (["blue", "red"], 3)
    capfd.readouterr()


def test_several_labels_are_learned(tmp_path: Path) -> None:
    labels = ["red;blue", "red", "blue", ""] * 6
    config = tiny(write_images(tmp_path, labels), tmp_path / "run", epochs=15, task="labels")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, class_weights=True))
    trained = load(train(config))
    found = evaluate(trained, n_patches=10, repeats=2)
    assert found.error <= 0.15  # guessing errs in a half
    assert trained.classes == ("blue", "red")


def test_a_value_is_learned_in_its_own_unit(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    values = [f"{value:.0f}" for value in random.choice([0, 90, 250], 24)]
    numbers = torch.tensor([float(value) for value in values])
    config = tiny(write_images(tmp_path, values), tmp_path / "run", epochs=20, task="value")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=3e-3, draws=2))
    data = data_of(config)
    assert data.options.spread == pytest.approx(float(data.labels("train").std(correction=0)))
    found = evaluate(load(train(config)), n_patches=10)
    assert found.error < 0.5 * float((numbers - numbers.median()).abs().mean())


def test_objectives_by_hand() -> None:
    logits, truth = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    assert Classes().errors(logits, truth).tolist() == [0, 1]
    weighted = Classes().losses(logits, truth, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(weighted, 3 * -logits.log_softmax(-1)[:, 0])
    marked = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert Labels().errors(logits, marked).tolist() == [0, 0.5]
    weights = Labels().class_weights(torch.tensor([[1.0], [0.0], [0.0], [0.0]]), 1, torch.ones(1))
    assert weights.tolist() == [[4 / 6], [2.0]]
    torch.testing.assert_close(
        Labels().losses(logits[:, :1], torch.tensor([[1.0], [0.0]]), weights.float()),
        torch.tensor([2 * np.log1p(np.exp(-2)), 4 / 6 * np.log(2)], dtype=torch.float32),
    )
    value = Value(centre=10.0, spread=5.0)
    assert value.losses(torch.tensor([[20.0]]), torch.tensor([[10.0]])).tolist() == [4.0]
    assert value.errors(torch.tensor([[20.0]]), torch.tensor([[10.0]])).tolist() == [10.0]
    draws = torch.tensor([[[0.0, 2.0]], [[1.0, -1.0]]], dtype=torch.float64)
    torch.testing.assert_close(Classes().averaged(draws).exp(), draws.softmax(-1).mean(0))
    torch.testing.assert_close(Labels().averaged(draws).sigmoid(), draws.sigmoid().mean(0))
    for objective, labels in ((Classes(), truth), (Labels(), marked), (value, marked[:, :1])):
        counted = torch.tensor([True, False])
        assert objective.counts(objective.uncounted(labels, counted)).tolist() == [True, False]


def test_folds_test_each_patient_once(tmp_path: Path) -> None:
    groups = [f"p{index // 3}" for index in range(24)]
    manifest = write_images(tmp_path, TWO * 2, {"group": groups})
    tested: list[str] = []
    for seed in range(3):
        data = data_of(dataclasses.replace(tiny(manifest, tmp_path / "run", validation=True), seed=seed))
        parts = {name: {row.group for row in data.splits.rows(name)} for name in ("train", "validation", "test")}
        assert all(parts.values())
        assert (
            not parts["train"] & parts["test"]
            | parts["train"] & parts["validation"]
            | parts["test"] & parts["validation"]
        )
        tested += [row.path.name for row in data.splits.rows("test")]
    assert sorted(tested) == sorted(f"{index}.png" for index in range(24))


def test_given_splits_are_kept(tmp_path: Path) -> None:
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    data = data_of(tiny(write_images(tmp_path, TWO, {"split": splits}), tmp_path / "run"))
    assert [len(data.labels(name)) for name in ("train", "validation", "test")] == [6, 2, 4]
    view, image, label = data.load("test", torch.tensor([1, 0]))
    assert (image.shape, view.shape) == ((2, 3, SIDE, SIDE), (2, 3, 24, 24))
    assert label.tolist() == [0, 1]
    assert torch.equal(image[1], torch.from_numpy(np.array(Image.open(tmp_path / "8.png"))).permute(2, 0, 1))


def refused(config: ExperimentConfig) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        data_of(config).labels("train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_that_cannot_be_read_are_named_and_left_out_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_images(tmp_path, TWO, {"split": ["train"] * 8 + ["test"] * 4})
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").unlink()
    text = refused(tiny(manifest, tmp_path / "run"))
    assert text.startswith(f"2 of 8 train images cannot be read: {manifest}, line 3: ")
    assert f"{manifest}, line 4: {tmp_path / '2.png'} is missing" in text
    assert text.endswith("leave them out with --data.unreadable skip")
    data = data_of(tiny(manifest, tmp_path / "run", unreadable="skip"))
    assert data.labels("train").tolist() == [1, 0, 1, 0, 1, 0]
    said = capsys.readouterr().err
    assert f"left out: {manifest}, line 3: " in said
    assert f"left out: {manifest}, line 4: " in said
    for index in (3, 5, 7):
        (tmp_path / f"{index}.png").unlink()
    assert "no training image has the label 'blue', which line" in refused(
        tiny(manifest, tmp_path / "run", unreadable="skip")
    )


def test_what_labels_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    manifest = write_images(tmp_path / "a", [*TWO[:-1], ""])
    assert f"{manifest}, line 13: has no label" in refused(tiny(manifest, output))
    assert "line 2: the label 'red' is no number" in refused(tiny(manifest, output, task="value"))
    manifest = write_images(tmp_path / "b", TWO, {"split": ["train"] * 10 + ["test"] * 2})
    text = refused(tiny(manifest, output, classes=("red", "green")))
    assert f"{manifest}, line 3: the label 'blue' is none of --data.classes red green" in text
    text = refused(tiny(manifest, output, classes=("red", "blue", "green")))
    assert "no training image has the label 'green', which is on no line" in text
    manifest = write_images(tmp_path / "c", ["red"] * 8 + ["blue"] * 4, {"split": ["train"] * 8 + ["test"] * 4})
    assert "no training image has the label 'blue', which line 10 has" in refused(tiny(manifest, output))
    manifest = write_images(tmp_path / "d", ["red"] * 6)
    assert "all images are of class 'red'; there is nothing to tell apart" in refused(tiny(manifest, output))
    manifest = write_images(tmp_path / "e", TWO, {"group": ["p1"] * 6 + ["p2"] * 6})
    assert "2 groups (or images, without a column group) cannot be parted into 3 folds" in refused(
        tiny(manifest, output)
    )
    splits = ["train"] * 12
    manifest = write_images(tmp_path / "f", TWO, {"split": splits})
    assert data_of(tiny(manifest, output, classes=("red", "blue"))).labels("train").tolist() == [0, 1] * 6


def test_images_of_other_channels_and_depths_are_named(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, TWO, {"split": ["train"] * 12})
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(tmp_path / "1.png")  # grey is read as colours
    assert data_of(tiny(manifest, tmp_path / "run")).load("train", torch.tensor([1]))[1].shape[1] == 3
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(tmp_path / "5.png")
    assert "line 7: " in (text := refused(tiny(manifest, tmp_path / "run")))
    assert "5.png holds uint16, expected uint8 as in the first image" in text


def test_sixteen_bits_are_trained_on_in_their_own_unit(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, TWO)
    for index in range(12):
        values = np.full((SIDE, SIDE), 1000 + 500 * (index % 2), np.uint16)
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    plain = {"contrast": 0.0, "brightness": 0.0, "mean": (1200.0,), "std": (300.0,)}
    config = tiny(manifest, tmp_path / "run", **plain)
    view, image, _ = data_of(config).load("train", torch.tensor([0]), epoch=0)
    assert image.dtype == torch.uint16
    assert view.unique().tolist() in ([pytest.approx((value - 1200) / 300)] for value in (1000, 1500))
    assert evaluate(load(train(config))).images == 4


def test_no_manifest_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "images"]) == 1
    assert "needs --data.manifest FILE" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["mil", "cnn"])
def test_what_reads_all_takes_images_of_different_sizes(method: str, tmp_path: Path) -> None:
    """From the command line to a table, in which what draws nothing has used no number of patches."""
    write_images(tmp_path, TWO)
    for index in range(0, 12, 2):
        with Image.open(tmp_path / f"{index}.png") as image:
            image.resize((SIDE + 8, SIDE - 4)).save(tmp_path / f"{index}.png")
    options = ["--preset", "quick", "--data.manifest", str(tmp_path / "labels.csv"), "--data.folds", "3"]
    options += ["--model.method", method, "--model.patch-size", "16", "--optim.epochs", "1"]
    options += ["--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    assert run(["train", "images", *options]) == 0
    assert run(["evaluate", str(tmp_path / "run")]) == 0
    table = tmp_path / "table.csv"
    assert (
        run(["predict", str(tmp_path / "run"), *(str(tmp_path / f"{n}.png") for n in (0, 1)), "--output", str(table)])
        == 0
    )
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["patches_used"] for row in rows] == ["", ""]


def test_anytime_says_what_it_stops_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["evaluate", "run"], ["predict", "run", "a.png"]):
        assert run([*command, "--method", "anytime"]) == 1
        assert "--method anytime needs --lead or --tolerance to stop at" in capsys.readouterr().err
