"""Where and how `ats predict` and `ats attention` look at files: masks, tissue, magnification, lists of images."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ats
from ats.experiments import inputs
from ats.experiments.commands import attention
from ats.experiments.commands.command_line import run
from ats.experiments.evaluation import evaluate
from ats.experiments.live_cells import live_cells, placement_of
from ats.experiments.trained import load
from ats.experiments.training import train
from tests.test_images_experiment import TWO, data_of, refused, tiny, write_images

LEFT = np.tile(np.array([[255] * 24 + [0] * 24], np.uint8), (48, 1))


def slide(path: Path, columns: int = 24) -> None:
    """White, with tissue in the first columns."""
    pixels = np.full((48, 48, 3), 245, np.uint8)
    pixels[:, :columns] = (180, 90, 150)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looking")
    config = tiny(write_images(folder, TWO), folder / "run", epochs=1)
    Image.fromarray(LEFT).save(folder / "left.png")
    ring = [[0, 0], [12, 0], [12, 48], [0, 48], [0, 0]]
    (folder / "quarter.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    slide(folder / "slide.png")
    return train(config).parent.parent


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def columns_drawn(trained: Path, image: str, tmp_path: Path, *options: str) -> set[int]:
    output = tmp_path / "patches.csv"
    output.unlink(missing_ok=True)
    words = ["attention", str(trained), image, "--format", "csv", "--output", str(output), *options]
    assert run(words) == 0
    return {int(row["column"]) for row in rows(output)}


def test_patches_beside_a_smaller_picture_are_of_full_resolution(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "DECODED", 100)
    monkeypatch.setattr(attention, "_SHOWN", 24)
    given = {}
    monkeypatch.setattr(attention, "draw_overlay", lambda image, map_, path, **more: given.update(more, image=image))
    image = trained.parent / "0.png"
    assert run(["attention", str(trained), str(image), "--output", str(tmp_path / "picture.png")]) == 0
    pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).movedim(-1, 0)
    assert given["image"].shape == (3, 24, 24)
    assert 1 <= len(given["best"]) <= 3
    side = load(trained).config.model.patch_size
    for seen in given["best"]:
        assert seen.size == (side // 2, side // 2)
        assert seen.pixels.shape == (3, side, side)
        padded = torch.nn.functional.pad(pixels, [side] * 4)
        tops, lefts = (range(2 * at + side - 1, 2 * at + side + 2) for at in seen.corner)  # its corner was rounded
        cuts = [padded[:, top : top + side, left : left + side] for top in tops for left in lefts]
        assert any(torch.equal(seen.pixels, cut) for cut in cuts)


def test_attention_looks_where_it_may(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained.parent
    many = ("--n-patches", "36")  # of 12 by 12 cells
    image, painted = str(folder / "0.png"), str(folder / "slide.png")
    assert max(columns_drawn(trained, image, tmp_path, *many)) > 6
    assert columns_drawn(trained, image, tmp_path, *many, "--mask", str(folder / "left.png")) <= set(range(6))
    assert columns_drawn(trained, image, tmp_path, *many, "--mask", str(folder / "quarter.geojson")) == {0, 1, 2}
    assert columns_drawn(trained, painted, tmp_path, *many, "--tissue", "True") <= set(range(6))
    both = ("--tissue", "True", "--mask", str(folder / "quarter.geojson"))
    assert columns_drawn(trained, painted, tmp_path, *many, *both) == {0, 1, 2}
    assert columns_drawn(trained, image, tmp_path, "--view-scale", "0.25", *many) == set(range(6))
    for form in ("png", "tiff", "geojson"):
        words = ["attention", str(trained), painted, "--format", form, "--output", str(tmp_path / f"a.{form}"), *both]
        assert run(words) == 0
        assert run(words) == 1
        assert "is there already" in capsys.readouterr().err
    words = ["attention", str(trained), image, "--output", str(tmp_path / "b.png")]
    assert run([*words, "--n-patches", "40", "--mask", str(folder / "quarter.geojson")]) == 1
    assert "has 36 cells to draw, too few for 40 patches" in capsys.readouterr().err
    for options, message in (
        (("--mask", str(folder / "none.geojson")), "none.geojson; name an image file, or GeoJSON polygons"),
        (("--view-scale", "2"), "--view-scale must be in (0, 1], got 2"),
        (("--device", "nowhere"), "--device nowhere cannot be used here"),
    ):
        assert run([*words, *options]) == 1
        text = capsys.readouterr().err
        assert message in text
        assert text.count("\n") == 1
    assert not (tmp_path / "b.png").exists()


def test_patches_have_one_number_in_all_forms(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Picture, table and detections of one draw; numbers are those of Python's tables, from 0."""
    framed: dict[str, tuple[int, int]] = {}

    def recorded(axes: object, corner: tuple[int, int], size: object, text: str, *colour: str) -> None:
        if not colour:  # else one of most attention, which was not drawn
            framed[text] = corner

    monkeypatch.setattr("ats.experiments.plotting.overlay.frame", recorded)
    for form in ("png", "csv", "geojson"):
        words = ["attention", str(trained), str(trained.parent / "0.png"), "--format", form, "--n-patches", "5"]
        assert run([*words, "--output", str(tmp_path / f"a.{form}")]) == 0
    table = {row["draw"]: (int(row["top"]), int(row["left"])) for row in rows(tmp_path / "a.csv")}
    assert list(table) == ["0", "1", "2", "3", "4"]
    assert framed == table
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert [one["properties"]["name"] for one in features] == [f"patch {draw}" for draw in table]
    corners = [one["geometry"]["coordinates"][0][0] for one in features]
    assert corners == [[max(0, left), max(0, top)] for top, left in table.values()]


def test_predictions_with_masks_are_those_of_python(trained: Path, tmp_path: Path) -> None:
    folder, output = trained.parent, tmp_path / "predictions.csv"
    files, masks = ([str(folder / name) for name in names] for names in (("0.png", "7.png"), ("left.png", "left.png")))
    base = ["predict", str(trained), *files, "--output", str(output), "--n-patches", "5"]
    assert run([*base, "--mask", *masks]) == 0
    model = load(trained)
    for row, path in zip(rows(output), files, strict=True):
        source = ats.open_image(path)
        cells = live_cells(model.config, placement_of(model.config), source, mask=folder / "left.png")
        assert cells.tolist() == [[True] * 6 + [False] * 6] * 12
        generator = torch.Generator().manual_seed(0)
        expected = model.predict([source], mask=cells[None], n_patches=5, generator=generator)
        assert float(row["probability_red"]) == pytest.approx(float(expected.logits[0].softmax(-1)[1]), rel=1e-4)
        assert row["patches_used"] == "5"


def test_a_manifest_names_images_masks_and_micrometres(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No labels are needed; names in the table are those of the list."""
    folder = trained.parent
    listed = folder / "wanted.csv"
    listed.write_text("path,mask,mpp\n0.png,left.png,0.5\n7.png,,\n")
    output = tmp_path / "predictions.csv"
    base = ["predict", str(trained), "--output", str(output)]
    assert run([*base, "--manifest", str(listed)]) == 0
    assert [row["path"] for row in rows(output)] == ["0.png", "7.png"]
    assert run([*base, "--manifest", str(listed)]) == 1
    assert "is there already" in capsys.readouterr().err
    output.unlink()
    for words, message in (
        ([str(folder / "0.png"), "--manifest", str(listed)], "--manifest lists the images and their masks"),
        ([], "name an image, or more, to predict, or a list of them with --manifest"),
        ([str(folder / "0.png"), "--mask", "a.png", "b.png"], "--mask names 2 files for 1 image; one for each"),
    ):
        assert run([*base[:2], *words, *base[2:]]) == 1
        assert message in capsys.readouterr().err
    listed.write_text("image,mask\n0.png,\n")
    assert run([*base, "--manifest", str(listed)]) == 1
    assert "there is no column 'path' among 'image', 'mask'; the first line names the columns, at least path," in (
        capsys.readouterr().err
    )


def test_all_files_that_cannot_be_read_are_named_at_once(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = trained.parent, tmp_path / "predictions.csv"
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = [str(tmp_path / "bad.png"), str(folder / "0.png"), str(tmp_path / "gone.png")]
    base = ["predict", str(trained), *files, "--output", str(output)]
    assert run(base) == 1
    text = capsys.readouterr().err
    assert text.startswith("ats: 2 of 3 images cannot be read: ")
    assert all(name in text for name in ("bad.png", "gone.png is missing", "--unreadable skip"))
    assert text.count("\n") == 1
    assert not output.exists()
    assert run([*base, "--unreadable", "skip"]) == 0
    assert [row["path"] for row in rows(output)] == files[1:2]
    said = capsys.readouterr().err
    assert [line.startswith("left out: ") for line in said.splitlines()] == [True, True]


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_training_on_tissue_alone_is_what_commands_go_on_with(tmp_path: Path, storage: str) -> None:
    manifest = write_images(tmp_path, TWO, {"split": ["train"] * 10 + ["test"] * 2})
    for index in range(12):
        slide(tmp_path / f"{index}.png", 12 if index == 10 else 36)
    config = tiny(manifest, tmp_path / "run", epochs=1, tissue=True, storage=storage)
    found = data_of(config).masks("test", torch.tensor([0, 1]))
    assert [int(each.sum()) for each in found] == [12 * 3, 12 * 9]
    run_folder = train(config).parent.parent
    assert evaluate(load(run_folder)).images == 2
    image = str(tmp_path / "10.png")
    assert columns_drawn(run_folder, image, tmp_path, "--n-patches", "36") == {0, 1, 2}
    assert max(columns_drawn(run_folder, image, tmp_path, "--n-patches", "36", "--tissue", "False")) > 2
    Image.fromarray(np.full((48, 48, 3), 245, np.uint8)).save(tmp_path / "3.png")
    assert f"{manifest}, line 5: no tissue was found" in refused(config)
