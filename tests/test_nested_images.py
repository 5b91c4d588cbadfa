"""`ats train images --model.levels`: nested attention on images of one's own, and every command on such a run."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

from ats.experiments.commands.command_line import run
from ats.experiments.image_store import ImageStore
from ats.experiments.images import ImagesData
from ats.experiments.level_options import LevelOptions
from ats.experiments.levels import plain_view
from ats.experiments.registry import experiment_data
from ats.experiments.trained import TrainedModel, load
from ats.sources import open_image

LEVELS = "8:3:2", "2:2:2"  # cells of 16 pixels, of which three are drawn, and of 4 in them, two of each
SIZES = (96, 80), (75, 101), (64, 64)  # not all whole cells, or whole pixels of the view


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of three sizes, a third of them with masks, and a run on them from disk."""
    folder = tmp_path_factory.mktemp("slides")
    random = np.random.default_rng(0)
    rows = []
    for index in range(12):
        height, width = SIZES[index % 3]
        pixels = random.integers(100, 140, (height, width, 3)).astype(np.uint8)
        top, left = (int(random.integers(0, side // 2 - 12)) for side in (height, width))
        pixels[top : top + 12, left : left + 12] = (255, 30, 30) if index % 2 else (30, 30, 255)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2, : width // 2] = 255
        Image.fromarray(mask).save(folder / f"mask-{index}.png")
        row = {"path": f"{index}.png", "label": "red" if index % 2 else "blue", "mask": ""}
        rows.append(row | ({"mask": f"mask-{index}.png"} if index % 3 == 0 else {}))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    options = ["--preset", "quick", "--data.manifest", str(folder / "labels.csv"), "--data.folds", "3"]
    options += ["--data.storage", "disk", "--data.cache", str(folder / "views"), "--model.levels", *LEVELS]
    options += ["--data.translation", "0", "--data.zoom", "1", "--data.stretch", "1", "--model.patch-size", "16"]
    options += ["--optim.epochs", "2", "--optim.batch-size", "4", "--trainer.accelerator", "cpu"]
    options += ["--diagnostics.every", "1", "--output", str(folder / "run")]
    assert run(["train", "images", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainedModel:
    return load(folder / "run")


def store_of(trained: TrainedModel) -> ImageStore:
    data = experiment_data(trained.config)
    assert isinstance(data, ImagesData)
    return data.store("train")


def test_a_run_logs_every_level_and_is_evaluated(folder, capsys):
    with next((folder / "run").rglob("metrics.csv")).open() as file:
        names = set(next(csv.reader(file)))
    assert {f"attention/level{number}_covered_mass" for number in (1, 2)} <= names
    assert run(["evaluate", str(folder / "run"), "--output", str(folder / "error.json")]) == 0
    (found,) = json.loads((folder / "error.json").read_text())
    assert found["images"] == 4
    anytime = ["--method", "anytime", "--lead", "2", "--budget", "6"]
    assert run(["evaluate", str(folder / "run"), *anytime]) == 0
    assert "images-quick-ats-3x2" not in capsys.readouterr().err


def test_views_are_means_of_what_the_image_has_of_a_pixel(folder, tmp_path):
    image = open_image(folder / "1.png")  # 75×101
    view = plain_view(image, LevelOptions(8, 3), cache=tmp_path)
    assert view.shape == (3, 10, 13)
    pixels = image.read(0, 0, 0, 75, 101).float() / 255
    torch.testing.assert_close(view[:, :9, :12], F.avg_pool2d(pixels[:, :72, :96], 8))
    torch.testing.assert_close(view[:, 9, 12], pixels[:, 72:, 96:].mean((1, 2)))
    assert len(list(tmp_path.glob("*.npz"))) == 1
    assert torch.equal(plain_view(image, LevelOptions(8, 3), cache=tmp_path), view)
    torch.testing.assert_close(plain_view(image.read(0, 0, 0, 75, 101), LevelOptions(8, 3)), view)


def test_training_sees_what_prediction_sees(trained):
    store = store_of(trained)
    images, views = store.batch(range(len(store.rows)), None)
    assert {tuple(view.shape) for view in views} == {(3, 12, 10), (3, 10, 14), (3, 8, 8)}
    for image, view in zip(images, views, strict=True):
        torch.testing.assert_close(trained.view(image)[0], view)


def test_masks_are_of_pixels_of_the_view_and_turn_with_it(trained):
    store = store_of(trained)
    masks = store.mask(range(len(store.rows)))
    _, views = store.batch(range(len(store.rows)), None)
    for row, mask, view in zip(store.rows, masks, views, strict=True):
        assert mask.shape == view.shape[1:]
        if row.mask is not None:
            assert mask[:5, :4].all()
            assert not mask[7:].any()
    index = next(number for number, row in enumerate(store.rows) if row.mask is not None)
    (image,), (view,) = store.batch([index], 1)
    mask = store.mask([index], 1)
    with torch.no_grad():
        _, logits, sample = trained.model.sampling(view[None], [image], mask=mask)
    assert logits.isneginf().any()
    assert not sample.levels[0].surplus[:, 0].any()


def test_every_command_takes_such_a_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image, where = str(folder / "4.png"), ["--mask", str(folder / "mask-4.png")]
    assert (
        run(
            [
                "predict",
                str(folder / "run"),
                image,
                str(folder / "5.png"),
                "--mask",
                where[1],
                str(folder / "mask-5.png"),
            ]
        )
        == 0
    )
    rows = rows_of("predictions.csv")
    assert [row["patches_used"] for row in rows] == ["6", "6"]
    for format in ("png", "zoom", "csv", "geojson", "tiff"):
        assert run(["attention", str(folder / "run"), image, "--format", format, *where]) == 0
    assert Image.open("attention.png").width > 1000
    assert Image.open("zoom.png").width == 286 * 3
    table = rows_of("attention.csv")
    assert [int(row["region"]) for row in table] == [0, 0, 1, 1, 2, 2]
    assert sum(float(row["weight"]) for row in table) == pytest.approx(1)
    assert all(int(row["top"]) < 48 and int(row["left"]) < 56 for row in table)  # inside of the mask
    boxes = json.loads(Path("attention.geojson").read_text())["features"]
    assert len(boxes) == 6
    with tifffile.TiffFile("attention.tiff") as file:
        pixels = file.series[0].levels[0].asarray()
    assert pixels.shape == SIZES[1]
    assert pixels.mean() == pytest.approx(1, rel=1e-3)
    assert pixels[60:].max() == 0
    assert "where it looked: zoom.png" in capsys.readouterr().out


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_such_a_run_has_no_use_for(folder, tmp_path, capsys):
    image, output = str(folder / "4.png"), ["--output", str(tmp_path / "x.png")]
    for options, message in [
        (["--n-patches", "4"], "--n-patches is for attention on one view"),
        (["--view-scale", "0.5"], "this model's levels have their own scales"),
    ]:
        assert run(["attention", str(folder / "run"), image, *output, *options]) != 0
        assert message in capsys.readouterr().err
