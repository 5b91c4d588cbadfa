"""`ats synthesise slides`: pyramids that OpenSlide opens, with spots whose kind shows at full resolution only."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ats
from ats.datasets.manifest import read_manifest
from ats.datasets.synthetic import slides as writer
from ats.datasets.synthetic.folder import integers
from ats.datasets.synthetic.scenes import draw_biopsy, draw_tissue
from ats.datasets.synthetic.slides import write_slides
from ats.datasets.synthetic.stain import Spot, nuclei, plant
from ats.experiments.commands import synthesise
from ats.experiments.commands.command_line import run
from ats.sources import slides
from ats.sources.slides import SlideSource
from tests.page_commands import problem, shown
from tests.qupath import check_qupath

SIDES = (440, 464)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn tissue on white, much darker in green in the rows that test slides come from."""
    path = tmp_path_factory.mktemp("tissue") / "tissue.png"
    pixels = np.array(draw_biopsy(integers(2, "slide"), (984, 560)))
    pixels[541:, :, 1] //= 2
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def written(tissue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides") / "data"
    write_slides(folder, 4, 2, seed=1, slide=tissue, sides=SIDES)
    return folder


def test_slides_are_pyramids_that_openslide_reads(written: Path) -> None:
    manifest, sizes = read_manifest(written / "labels.csv"), set()
    assert [row.split for row in manifest.rows] == ["train"] * 4 + ["test"] * 2
    assert sorted(row.label for row in manifest.rows) == ["negative"] * 3 + ["positive"] * 3
    for row in manifest.rows:
        slide = ats.open_image(row.path)
        assert isinstance(slide, SlideSource)
        assert slide.mpp == pytest.approx((0.5, 0.5))
        full = slide.levels[0]
        assert [(level.height * 2**n, level.width * 2**n) for n, level in enumerate(slide.levels)] == [
            (full.height, full.width)
        ] * 4
        assert all(SIDES[0] <= side <= SIDES[1] for side in (full.height, full.width))
        sizes.add((full.height, full.width))
        small = slide.levels[3]
        whole = slide.read(0, 0, 0, full.height, full.width)
        expected = ats.area_downsample(whole[None], (small.height, small.width))[0] * 255
        torch.testing.assert_close(slide.read(3, 0, 0, small.height, small.width).float(), expected, rtol=0, atol=0.51)
    assert len(sizes) > 1


def test_spots_say_what_the_label_is(written: Path) -> None:
    for row in read_manifest(written / "labels.csv").rows:
        full = ats.open_image(row.path).levels[0]
        kinds = {}
        for kind in ("stained", "smeared"):
            path = written / "spots" / f"{row.path.stem}-{kind}.geojson"
            for feature in check_qupath(path.read_bytes(), (full.height, full.width)) if path.exists() else []:
                assert feature["properties"]["objectType"] == "annotation"
                assert feature["properties"]["classification"]["name"] == kind
                kinds[kind] = kinds.get(kind, 0) + 1
        assert list(kinds) == ["stained" if row.label == "positive" else "smeared"]
        assert 1 <= sum(kinds.values()) <= 2


def test_training_and_test_slides_share_no_tissue(written: Path) -> None:
    """The rows that test slides are cut from have half the green."""
    for row in read_manifest(written / "labels.csv").rows:
        slide = ats.open_image(row.path)
        green = slide.read(0, 0, 0, slide.levels[0].height, slide.levels[0].width)[1]
        assert (float(green.float().median()) < 130) == (row.split == "test")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_kind_of_a_spot_shows_at_full_resolution_only(seed: int) -> None:
    """The mean colour of a slide, and of what surrounds a spot, are the same whichever kind the spot is."""
    tissue = np.array(draw_tissue(integers(seed, "slide"), 512, positive=False)[0])
    amount, changed = nuclei(tissue), []
    for smeared in (False, True):
        pixels = tissue.copy()
        plant(pixels, amount, Spot(256, 256, 100, 256, smeared))
        changed.append(pixels.astype(int))
    by_pixel, mean = np.abs(changed[0] - changed[1]).max(), np.abs((changed[0] - changed[1]).mean((0, 1))).max()
    planted = np.abs((changed[0] - tissue).mean((0, 1))).max()
    assert by_pixel > 40
    assert planted > 0.3
    assert mean < 0.1 * planted
    outside = np.hypot(*np.mgrid[-256:256, -256:256]) > 155
    assert (changed[1][outside] == tissue[outside]).all()


def test_a_seed_is_the_same_slides_and_nothing_is_overwritten(tissue: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_slides(tmp_path / name, 2, 2, seed=seed, slide=tissue, sides=SIDES)
    files = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_slides(tmp_path / "a", 2, 2, slide=tissue, sides=SIDES)


def test_what_no_slides_can_be_cut_from_is_refused(tissue: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="slides of 640 pixels and more are cut from at least 1423×640"):
        write_slides(tmp_path / "a", slide=tissue)
    blank = tmp_path / "blank.png"
    Image.new("RGB", (500, 1100), "white").save(blank)
    with pytest.raises(ValueError, match=r"blank.png has too little tissue with nuclei.*choose another slide"):
        write_slides(tmp_path / "a", 2, 2, slide=blank, sides=SIDES)
    with pytest.raises(ValueError, match="a slide of each class, got 1 and 2"):
        write_slides(tmp_path / "a", 1, 2, slide=tissue)
    for sides in ((440, 450), (80, 800), (800, 640)):
        with pytest.raises(ValueError, match="sides must be multiples of 8, from 440 on"):
            write_slides(tmp_path / "a", slide=tissue, sides=sides)
    with pytest.raises(FileNotFoundError, match="is missing"):
        write_slides(tmp_path / "a", slide=tmp_path / "none.svs")
    assert [path.name for path in tmp_path.iterdir()] == ["blank.png"]


def test_no_training_is_named_where_test_images_are_of_a_class_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path, train: int, test: int, **_: object) -> None:
        folder.mkdir()
        (folder / "labels.csv").write_text("path,label,split\na.tif,3,train\nb.tif,7,test\nc.tif,3,test\n")

    monkeypatch.setattr(synthesise, "write_slides", write)
    assert run(["synthesise", "slides", str(tmp_path / "few"), "--images", "1"]) == 0
    said = capsys.readouterr().out
    assert "Too few to train on: no image to train on is of 7, as images to test on are." in said
    assert "ats train" not in said


def test_the_command_draws_tissue_and_what_it_writes_trains_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "_DRAWN", (984, 560))
    monkeypatch.setattr(writer, "_SIDES", SIDES)
    data, folder = tmp_path / "data", tmp_path / "run"
    assert run(["synthesise", "colon-cancer", str(data), "--slide", "x.svs"]) == 1
    assert "colon-cancer has none of" in capsys.readouterr().err
    assert run(["synthesise", "slides", str(data), "--images", "4", "--seed", "2"]) == 0
    said = capsys.readouterr().out
    assert "test: negative: 1, positive: 1" in said
    (advice,) = shown(f"    {said.partition('Train on it with: ')[2].strip()}")
    assert advice.words[:5] == ("ats", "train", "images", "--data.manifest", str(data / "labels.csv"))
    assert not (wrong := problem(advice, monkeypatch)), wrong
    train = ["train", "images", "--data.manifest", str(data / "labels.csv"), "--output", str(folder)]
    train += [
        "--data.storage",
        "disk",
        "--data.tissue",
        "--data.symmetries",
        "--model.view-scale",
        "0.0625",
        "--model.patch-size",
        "24",
    ]
    train += ["--optim.epochs", "1", "--optim.batch-size", "2", "--trainer.accelerator", "cpu"]
    assert run(train) == 0, capsys.readouterr().err
    assert run(["evaluate", str(folder), "--output", str(tmp_path / "found.json")]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 2
    assert found["data"] == "synthetic labels.csv, 6 images"
    (slide, *_) = sorted((data / "slides").iterdir())
    out = tmp_path / "attention.geojson"
    assert run(["attention", str(folder), str(slide), "--format", "geojson", "--output", str(out)]) == 0
    report = tmp_path / "shortcuts.json"
    monkeypatch.setattr(sys, "argv", ["slide_shortcuts.py", str(data), str(folder), "--output", str(report)])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "slide_shortcuts.py"), run_name="__main__")
    shares = json.loads(report.read_text())
    assert len(shares) == 6
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["share of tissue in stained spots"] > 0.01
    full = ats.open_image(slide).levels[0]
    features = check_qupath(out.read_bytes(), (full.height, full.width))
    for feature in features:
        assert feature["properties"]["objectType"] == "detection"
        assert np.ptp(feature["geometry"]["coordinates"][0], 0).max() == 24
    # QuPath crops a slide to what was scanned.
    monkeypatch.setattr(slides, "_named_bounds", lambda properties: (30, 20, 300, 300))
    for name, (right, down) in (("--bounds", (20, 30)), ("--no-bounds", (0, 0))):
        moved = tmp_path / f"{name}.geojson"
        assert run(["attention", str(folder), str(slide), "--format", "geojson", "--output", str(moved), name]) == 0
        for one, other in zip(features, check_qupath(moved.read_bytes()), strict=True):
            difference = np.subtract(one["geometry"]["coordinates"], other["geometry"]["coordinates"])
            assert (difference == (right, down)).all()
