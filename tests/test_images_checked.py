"""What is looked at before a training or a prediction begins: whether files are whole, and of the model's kind."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
import torch
from PIL import Image

import ats
from ats.experiments.commands.command_line import run
from ats.experiments.training import train
from ats.sources.tiff_header import stored_until
from ats.sources.whole import check_whole
from tests.test_images_experiment import TWO, data_of, refused, tiny, write_images
from tests.written_images import pixels, write_geotiff, written

SPLITS = {"split": ["train"] * 8 + ["test"] * 4}
PLACE = rasterio.Affine(30, 0, 5e5, 0, -30, 4e6)
DEEP = {"contrast": 0.0, "brightness": 0.0, "mean": (1000.0,) * 5, "std": (300.0,) * 5}


def cut(path: Path, share: float = 0.9) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def raster(path: Path, bands: int, dtype: type = np.uint16, scale: float = 1.0) -> None:
    """That lies somewhere on Earth, which is what makes it one."""
    values = np.random.default_rng(0).integers(400, 1600, (48, 48, bands)) * scale
    values = np.minimum(values, 255 if dtype is np.uint8 else 1e9).astype(dtype)
    write_geotiff(path, values, crs="EPSG:32618", transform=PLACE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    return train(tiny(write_images(folder, TWO), folder / "run", epochs=1)).parent.parent


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on rasters of five bands of 16 bits."""
    folder = tmp_path_factory.mktemp("deep")
    manifest = write_images(folder, TWO)
    for index in range(len(TWO)):
        raster(folder / f"{index}.tif", 5)
    manifest.write_text(manifest.read_text().replace(".png", ".tif"))
    return train(tiny(manifest, folder / "run", epochs=1, **DEEP)).parent.parent


def predicted(run_folder: Path, *files: Path, output: Path) -> list[dict[str, str]]:
    output.unlink(missing_ok=True)
    assert run(["predict", str(run_folder), *map(str, files), "--output", str(output)]) == 0
    return list(csv.DictReader(output.open()))


def test_one_band_is_no_picture_but_grey_is(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A raster's band is refused by all commands and nothing is written; a grey picture is read, and it is said."""
    raster(tmp_path / "band.tif", 1, np.uint8)
    grey = np.array(Image.open(trained.parent / "0.png").convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "three.png")
    raster(tmp_path / "five.tif", 5, np.uint8)
    for name, bands in (("band.tif", "1 channel"), ("five.tif", "5 channels")):
        for command, output in (("predict", "p.csv"), ("attention", "a.png")):
            assert run([command, str(trained), str(tmp_path / name), "--output", str(tmp_path / output)]) == 1
            text = capfd.readouterr().err
            assert f"{name} has {bands}, expected 3 as the model was trained on" in text
            assert text.count("\n") == 1
            assert not (tmp_path / output).exists()
    first, second = predicted(trained, tmp_path / "grey.png", tmp_path / "three.png", output=tmp_path / "p.csv")
    assert first["probability_red"] == second["probability_red"]
    assert capfd.readouterr().err == f"note: {tmp_path / 'grey.png'}: it is grey, and read as three equal channels\n"

    manifest = write_images(tmp_path / "data", TWO, SPLITS)
    raster(tmp_path / "data" / "5.tif", 1, np.uint8)
    manifest.write_text(manifest.read_text().replace("5.png", "5.tif"))
    text = refused(tiny(manifest, tmp_path / "run"))
    assert f"{manifest}, line 7: {tmp_path / 'data' / '5.tif'} has 1 channel, expected 3 as in the first image" in text
    for index in (2, 5, 6):
        Image.fromarray(grey).save(tmp_path / "data" / f"{index}.png")
    manifest.write_text(manifest.read_text().replace("5.tif", "5.png"))
    capfd.readouterr()
    assert data_of(tiny(manifest, tmp_path / "run")).labels("train").shape == (8,)
    assert f"note: {manifest}, line 4: {tmp_path / 'data' / '2.png'} is grey, and so are 2 others: read as three" in (
        capfd.readouterr().err
    )


def test_other_bands_numbers_and_units_than_in_training(
    deep: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, bands, dtype, expected in (
        ("four.tif", 4, np.uint16, "has 4 channels, expected 5 as the model was trained on"),
        ("bytes.tif", 5, np.uint8, "holds uint8, expected uint16 as the model was trained on"),
        ("float.tif", 5, np.float32, "holds float32, expected uint16 as the model was trained on"),
    ):
        raster(tmp_path / name, bands, dtype)
        assert run(["predict", str(deep), str(tmp_path / name), "--output", str(tmp_path / "p.csv")]) == 1
        text = capfd.readouterr().err
        assert f"{tmp_path / name} {expected}" in text
        assert text.count("\n") == 1
    raster(tmp_path / "same.tif", 5)
    raster(tmp_path / "ten.tif", 5, scale=10)
    raster(tmp_path / "also.tif", 5, scale=12)
    predicted(deep, tmp_path / "same.tif", output=tmp_path / "p.csv")
    assert capfd.readouterr().err == ""
    rows = predicted(deep, *(tmp_path / f"{name}.tif" for name in ("same", "ten", "also")), output=tmp_path / "p.csv")
    assert len(rows) == 3
    text = capfd.readouterr().err
    assert text.startswith(f"note: {tmp_path / 'ten.tif'}: half of the numbers of band ")
    assert "standard deviations or more from the mean that the model knows, 1000 ± 300; their median is " in text
    assert text.endswith("are they in another unit? (and so of 1 other)\n")

    manifest = deep.parent / "labels.csv"
    config = tiny(manifest, tmp_path / "run", **DEEP | {"mean": (0.1,) * 5, "std": (0.2,) * 5})
    data_of(config).labels("train")
    assert f"warning: {manifest}, line 2: {deep.parent / '0.tif'}: half of the numbers" in capfd.readouterr().err
    text = refused(tiny(manifest, tmp_path / "run"))
    assert "0.tif holds torch.uint16 and not bytes, whose range is not known; say with --data.mean" in text
    raster(deep.parent / "3.tif", 5, np.float32)
    text = refused(tiny(manifest, tmp_path / "run", **DEEP))
    assert f"{manifest}, line 5: {deep.parent / '3.tif'} holds float32, expected uint16 as in the first image" in text
    raster(deep.parent / "3.tif", 5)


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_all_that_is_missing_or_cut_short_is_named_before_a_run(
    storage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files of both splits, and masks, in one line; then they are left out, if that is asked for."""
    masks = {"mask": ["", "gone-mask.png", *[""] * 8, "small.png", ""]}
    manifest = write_images(tmp_path, TWO, SPLITS | masks)
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "crs": "EPSG:32618", "transform": PLACE}
    write_geotiff(
        tmp_path / "4.tif", pixels(256, 192), (2,), **tiles
    )  # of which the view is read from a level of its own
    manifest.write_text(manifest.read_text().replace("4.png", "4.tif"))
    Image.fromarray(np.full((48, 20), 255, np.uint8)).save(tmp_path / "small.png")
    cut(tmp_path / "4.tif")
    cut(tmp_path / "9.png")
    (tmp_path / "2.png").unlink()
    (tmp_path / "8.png").unlink()
    options = ["train", "images", "--data.manifest", str(manifest), "--output", str(tmp_path / "run")]
    options += ["--preset", "quick", "--model.view-scale", "0.5", "--model.patch-size", "16", "--model.n-patches", "3"]
    options += ["--optim.epochs", "1", "--trainer.accelerator", "cpu", "--data.storage", storage]
    assert run(options) == 1
    (text,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ats: ")]
    assert text.startswith("ats: 6 of 12 train and test images cannot be read: ")
    lines = [part.partition(":")[0] for part in text.split(f"{manifest}, ")[1:]]
    assert lines == ["line 3", "line 4", "line 6", "line 10", "line 11", "line 12"]
    for part in ("gone-mask.png", "2.png is missing", "4.tif is cut short", "8.png is missing", "9.png is damaged"):
        assert part in text
    assert "small.png is 48×20, whose shape is not that of the image" in text
    assert not (tmp_path / "run").exists()
    assert run([*options, "--data.unreadable", "skip"]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(said) == 6


def test_readers_write_no_lines_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """GDAL's beside what is raised: whoever reads a log would look for two faults."""
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64, "crs": "EPSG:32618", "transform": PLACE}
    write_geotiff(tmp_path / "x.tif", pixels(256, 256, 4, np.int16), **tiles)
    cut(tmp_path / "x.tif", 0.5)
    source = ats.open_image(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif: the box of 64×64 pixels at \(192, 192\) of level 0 cannot be read"):
        source.read(0, 192, 192, 64, 64)
    with pytest.raises(ValueError, match=r"x\.tif: the box"):
        ats.sources.read_boxes([(source, 0, 192, left, 64, 64) for left in (128, 192)], threads=2)
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_read_is_not_to_be_read_by_rasterio(tmp_path: Path) -> None:
    """It is here, and cannot read it either; of what it reads, the advice works."""
    tifffile.imwrite(tmp_path / "int32.tif", np.zeros((8, 8), np.int32))
    (tmp_path / "text.png").write_text("no picture")
    for name in ("int32.tif", "text.png"):
        with pytest.raises(ValueError, match=rf"{name} .*rasterio, which is here, cannot read it either") as caught:
            ats.open_image(tmp_path / name)
        assert "pip install" not in str(caught.value)
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((8, 8, 3), np.uint16), photometric="rgb")
    with pytest.raises(
        ValueError, match=r"read it with rasterio: ats\.open_image\(path, backend='rasterio'\), or"
    ) as caught:
        ats.open_image(tmp_path / "deep.tif", backend="pillow")
    assert "pip install" not in str(caught.value)
    assert ats.open_image(tmp_path / "deep.tif", backend="rasterio").dtype == torch.uint16


COMMANDS = {
    "ats predict run x.png --ouput p.csv": "Unrecognized options: --ouput, p.csv; perhaps --output",
    "ats predict run x.png --seed one": "Error parsing --seed: 'one' is no whole number",
    "ats attention run": "Missing from ats attention: PATH An image file, or a slide",
    "ats attention run x.png --format jpg": "invalid choice 'jpg' for argument '--format'. Expected one of ('png'",
    "ats train images --optim.learning-rate fast": "Error parsing --optim.learning-rate: 'fast' is no number",
    "ats train images --optim.epochs 0": "optim.epochs must be at least 1, got 0",
    "ats predict run x.png --lead 2": "--tolerance and --lead are for --method anytime",
    "ats predict run x.png --method anytime --lead 2 --n-patches 5": "--n-patches is for --method sample and topk",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("capture", ["capfd", "capsys"])  # a terminal of UTF-8, and what has no encoding
def test_options_that_there_are_not_are_told_in_one_line(
    command: str, capture: str, request: pytest.FixtureRequest
) -> None:
    captured = request.getfixturevalue(capture)
    usage = "--method anytime" not in COMMANDS[command] and "topk" not in COMMANDS[command]
    assert run(command.split()[1:]) == (2 if usage else 1)
    out, err = captured.readouterr()
    assert out == ""
    assert err.startswith(f"ats: {COMMANDS[command]}")
    assert err.count("\n") == 1
    program = " ".join(command.split()[: 3 if "train" in command else 2])
    assert not usage or err.endswith(f"; `{program} --help` lists the options\n")


def test_a_mask_that_changed_is_noticed(tmp_path: Path) -> None:
    manifest = write_images(tmp_path, TWO, SPLITS | {"mask": ["left.png", *[""] * 11]})
    left = np.tile(np.array([[255] * 24 + [0] * 24], np.uint8), (48, 1))
    Image.fromarray(left).save(tmp_path / "left.png")
    config = tiny(manifest, tmp_path / "run", epochs=1)
    train(config)
    Image.fromarray(left[:, ::-1].copy()).save(tmp_path / "left.png")
    longer = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, epochs=2),
        trainer=dataclasses.replace(config.trainer, extend=True),
    )
    with pytest.raises(ValueError, match=r"holds a run on .*of which labels, splits, groups, mpp or masks were others"):
        train(longer)
    Image.fromarray(left).save(tmp_path / "left.png")
    train(longer)


def test_whole_files_of_every_kind_are_whole_and_cut_ones_are_not(tmp_path: Path) -> None:
    for path, *_ in written(tmp_path):
        check_whole(path)
        if path.suffix == ".tif":
            until = stored_until(path)
            assert until is not None
            assert 0 < until <= path.stat().st_size
        short = tmp_path / f"short-{path.name}"
        short.write_bytes(path.read_bytes()[: 9 * path.stat().st_size // 10])
        if path.suffix in (".tif", ".png") and (path.suffix == ".png" or stored_until(short)):
            with pytest.raises(ValueError, match=rf"{short.name} is .*cut short"):
                check_whole(short)
    Image.fromarray(pixels(60, 80)).save(tmp_path / "x.jpg")
    data = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "more.jpg").write_bytes(data + bytes(5000))
    check_whole(tmp_path / "more.jpg")
    (tmp_path / "less.jpg").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=r"less\.jpg is damaged, cut short"):
        check_whole(tmp_path / "less.jpg")


def test_tables_have_the_columns_that_the_page_names(tmp_path: Path) -> None:
    """Of a value: no probability, and a standard error in its own unit."""
    manifest = write_images(tmp_path, ["10", "90", "200"] * 4)
    run_folder = train(tiny(manifest, tmp_path / "run", epochs=1, task="value")).parent.parent
    (row,) = predicted(run_folder, tmp_path / "1.png", output=tmp_path / "p.csv")
    assert list(row) == ["path", "label", "standard_error_value", "patches_used"]
    assert float(row["standard_error_value"]) > 0
    assert abs(float(row["label"])) < 1000
