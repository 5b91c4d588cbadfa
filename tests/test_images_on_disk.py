"""`ats train images` on files that stay on disk, and what commands make of any file with the run."""

import csv
import dataclasses
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import ats
from ats.experiments.augmentation import Change, apply_change
from ats.experiments.changed_source import ChangedSource, changed_view
from ats.experiments.commands.command_line import run
from ats.experiments.evaluation import evaluate
from ats.experiments.trained import load
from ats.experiments.training import InterruptedRunError, train
from tests.qupath import check_qupath
from tests.test_images_experiment import TWO, data_of, refused, tiny, write_images
from tests.test_training import StopAt, assert_same, weights


def unequal(folder: Path, columns: dict[str, list[str]] | None = None) -> Path:
    """Images whose sizes differ by up to eight pixels."""
    manifest = write_images(folder, TWO, columns)
    for index in range(len(TWO)):
        path = folder / f"{index}.png"
        Image.fromarray(np.array(Image.open(path))[: 48 - index % 5, : 48 - 2 * (index % 3)]).save(path)
    return manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    config = tiny(unequal(folder), folder / "run", storage="disk", cache=folder / "views", symmetries=True)
    return train(config).parent.parent


def test_images_of_different_sizes_train_from_disk_and_a_stopped_run_goes_on(trained: Path, tmp_path: Path) -> None:
    folder = trained.parent
    assert len(list((folder / "views").iterdir())) == 12
    config = tiny(folder / "labels.csv", tmp_path / "run", storage="disk", symmetries=True)  # without the cache
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=3),))
    assert_same(weights(train(config)), weights(trained / "checkpoints" / "last.ckpt"))
    assert evaluate(load(trained), n_patches=4).images == 4


def test_disk_and_memory_are_the_same_images(tmp_path: Path) -> None:
    """Views and patches of both, and so predictions."""
    manifest = unequal(tmp_path)
    indices = torch.tensor([3, 0, 5])
    both = [data_of(tiny(manifest, tmp_path / "run", storage=storage)) for storage in ("memory", "disk")]
    (view, image, label), (far_view, far, far_label) = (data.load("train", indices) for data in both)
    assert torch.equal(label, far_label)
    for one, other, near, source in zip(view, far_view, image, far, strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(near, source.read(0, 0, 0, *near.shape[1:]))
    config = tiny(manifest, tmp_path / "run", storage="disk")
    bags = dataclasses.replace(config, model=dataclasses.replace(config.model, method="mil"))
    assert "model.method=mil reads whole images" in refused(bags)
    assert "cannot be moved or enlarged at random" in refused(
        tiny(manifest, tmp_path / "run", storage="disk", translation=4)
    )


@pytest.mark.parametrize(("turns", "mirror"), list(product(range(4), (False, True))))
def test_boxes_of_a_changed_source_are_those_of_the_changed_image(turns: int, mirror: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20), np.uint8)
    change = Change(scale=1.2, shift=(0.1, -0.2, 0.0), mirror=mirror, quarter_turns=turns)
    whole = apply_change(torch.from_numpy(pixels), change)
    source = ChangedSource(ats.sources.from_arrays([pixels], mpp=(1.0, 2.0)), change)
    for top, left, height, width in ((0, 0, 20, 20), (3, 5, 7, 11), (12, 0, 8, 1)):
        box = source.read(0, top, left, height, width)
        assert torch.equal(box, whole[:, top : top + height, left : left + width])
    assert source.mpp == ((2.0, 1.0) if turns % 2 else (1.0, 2.0))
    oblong = ChangedSource(
        ats.sources.from_arrays([pixels[:, :, :13]]), dataclasses.replace(change, scale=1.0, shift=(0, 0, 0))
    )
    level = oblong.levels[0]
    expected = np.rot90(pixels[:, :, :13][:, :, ::-1] if mirror else pixels[:, :, :13], turns, (1, 2))
    assert torch.equal(oblong.read(0, 0, 0, level.height, level.width), torch.from_numpy(expected.copy()))
    assert torch.equal(oblong.read(0, 2, 1, 4, 6), torch.from_numpy(expected[:, 2:6, 1:7].copy()))
    view = ats.area_downsample(torch.from_numpy(pixels)[None], (10, 10))[0]
    dim = dataclasses.replace(change, scale=0.5, shift=(0.1, 0.2, 0.0))
    exact = ats.area_downsample(apply_change(torch.from_numpy(pixels), dim)[None], (10, 10))[0]
    torch.testing.assert_close(changed_view(view, dim), exact, rtol=0, atol=0.51 / 255)


def test_masks_keep_attention_where_they_say(tmp_path: Path) -> None:
    masks = ["left.png", *[""] * 10, "left.png"]
    manifest = write_images(tmp_path, TWO, {"split": ["train"] * 10 + ["test"] * 2, "mask": masks})
    Image.fromarray(np.tile(np.array([[255] * 24 + [0] * 24], np.uint8), (48, 1))).save(tmp_path / "left.png")
    config = tiny(manifest, tmp_path / "run", epochs=1)
    data = data_of(config)
    found = data.masks("test", torch.tensor([0, 1]))
    assert found.shape == (2, 12, 12)
    assert found[0].all()
    assert found[1, :, :6].all()
    assert not found[1, :, 7:].any()
    model = load(train(config))
    assert evaluate(model).images == 2
    view, image, _ = data.load("test", torch.tensor([1]))
    prediction = model.predict(image, mask=found[1:], n_patches=20)
    assert all(row["column"] <= 6 for row in prediction.table())
    assert view.shape == (1, 3, 24, 24)
    assert "but not moved or enlarged" in refused(tiny(manifest, tmp_path / "run", translation=2))
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "left.png")
    assert f"{manifest}, line 2: {tmp_path / 'left.png'} leaves none of 12×12 cells" in refused(config)


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_masks_turn_with_their_images(tmp_path: Path, storage: str) -> None:
    """Where the image is white, in whichever way an epoch turns it."""
    manifest = write_images(tmp_path, TWO, {"mask": ["0.png", *[""] * 11], "split": ["train"] * 10 + ["test"] * 2})
    pixels = np.zeros((48, 40, 3), np.uint8)
    pixels[:16, :32] = 255
    Image.fromarray(pixels).save(tmp_path / "0.png")
    still = {"contrast": 0.0, "brightness": 0.0, "storage": storage, "symmetries": True}
    data, seen = data_of(tiny(manifest, tmp_path / "run", **still)), set()
    index = torch.tensor([0])
    for epoch in range(20):
        view, image, _ = data.load("train", index, epoch)
        white = (view > 0).all(1)[:, ::2, ::2]  # cells of two pixels of the view
        (size,) = {tuple(one.shape[-2:]) if isinstance(one, torch.Tensor) else one.levels[0] for one in image}
        assert torch.equal(data.masks("train", index, epoch), white)
        seen.add((size, white.sum(1).argmax().item(), white.sum(2).argmax().item()))
    assert len(seen) == 8
    assert int(data.masks("train", index).sum()) == 4 * 8


def test_predictions_of_any_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = trained.parent, tmp_path / "predictions.csv"
    files = [str(folder / f"{index}.png") for index in (0, 1, 7)]
    assert run(["predict", str(trained), *files, "--output", str(output), "--n-patches", "5"]) == 0
    rows = list(csv.DictReader(output.open()))
    assert [row["path"] for row in rows] == files
    assert list(rows[0]) == [
        "path", "label", "probability_blue", "probability_red", "standard_error_blue", "standard_error_red",
        "patches_used",
    ]  # fmt: skip
    model = load(trained)
    for row, path in zip(rows, files, strict=True):
        source = ats.open_image(path)
        expected = model.predict([source], n_patches=5, generator=torch.Generator().manual_seed(0))
        likely = expected.logits[0].softmax(-1)
        assert row["label"] == ("blue", "red")[int(likely.argmax())]
        assert float(row["probability_red"]) == pytest.approx(float(likely[1]), rel=1e-4)
        assert expected.standard_error is not None
        assert float(row["standard_error_red"]) == pytest.approx(
            float(expected.standard_error[0, 1]), rel=1e-3, abs=1e-6
        )
        assert row["patches_used"] == "5"
    assert run(["predict", str(trained), *files, "--output", str(output)]) == 1
    assert "is there already" in capsys.readouterr().err
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    other = tmp_path / "other.csv"
    assert run(["predict", str(trained), str(bad), files[0], "--output", str(other)]) == 1
    assert not other.exists()
    assert run(["predict", str(trained), str(bad), files[0], "--output", str(other), "--unreadable", "skip"]) == 0
    assert [row["path"] for row in csv.DictReader(other.open())] == [files[0]]
    assert f"left out: {bad}" in capsys.readouterr().err


def test_attention_in_every_format(trained: Path, tmp_path: Path) -> None:
    image = str(trained.parent / "3.png")
    for form, name in (("png", "a.png"), ("csv", "a.csv"), ("geojson", "a.geojson"), ("tiff", "a.ome.tiff")):
        assert run(["attention", str(trained), image, "--format", form, "--output", str(tmp_path / name)]) == 0
    assert Image.open(tmp_path / "a.png").size[0] > 100
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    features = check_qupath((tmp_path / "a.geojson").read_bytes())
    assert len(rows) == len(features) == 3
    weights = [feature["properties"]["measurements"]["weight"] for feature in features]
    assert weights == pytest.approx([float(row["weight"]) for row in rows])
    heat = tifffile.imread(tmp_path / "a.ome.tiff")
    assert heat.mean() == pytest.approx(1, rel=1e-3)
    assert json.loads((trained / "config.json").read_text())["data"]["storage"] == "disk"
