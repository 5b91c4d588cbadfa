"""What `ats train images` and `ats predict` say of files that are not as they should be, and what they leave behind."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ats.experiments.commands.command_line import run
from ats.experiments.training import train
from tests.test_images_experiment import TWO, tiny, write_images
from tests.written_images import pyramid, write_tiff

SPLITS = {"split": ["train"] * 10 + ["test"] * 2}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def another_kind(path: Path) -> None:
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(path.with_suffix(".bmp"))
    path.with_suffix(".bmp").rename(path.with_suffix(".svs"))


def command(folder: Path, *more: str) -> list[str]:
    options = ["train", "images", "--preset", "quick", "--data.manifest", str(folder / "labels.csv")]
    options += ["--output", str(folder / "run"), "--data.storage", "disk", "--model.view-scale", "0.5"]
    options += ["--model.patch-size", "16", "--model.n-patches", "3", "--optim.epochs", "1"]
    return [*options, "--trainer.accelerator", "cpu", *more]


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ats: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("damage", "name", "expected"),
    [
        (Path.unlink, "3.png", "3.png is missing"),
        (cut_short, "3.png", "3.png is damaged, cut short or no image"),
        (another_kind, "3.svs", "3.svs is damaged, cut short or no slide"),
    ],
    ids=["missing", "cut short", "of another kind"],
)
def test_training_names_line_and_file_and_leaves_nothing(
    damage, name: str, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = write_images(tmp_path, TWO, SPLITS)
    damage(tmp_path / "3.png")
    manifest.write_text(manifest.read_text().replace("3.png", name))
    assert run(command(tmp_path)) == 1
    error = said(capfd)
    assert f"{manifest}, line 5: {tmp_path / name}" in error
    assert expected in error
    assert "--data.unreadable skip" in error
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    train(tiny(write_images(folder, TWO, SPLITS), folder / "run", epochs=1))
    return folder


def test_a_reader_that_is_not_installed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which extra to install: from both commands, and no traceback. Leaving such files out would leave out all."""
    manifest = write_images(tmp_path, TWO, SPLITS)
    write_tiff(tmp_path / "3.svs", pyramid(64, 64, 1), tile=(32, 32), photometric="rgb")
    manifest.write_text(manifest.read_text().replace("3.png", "3.svs"))
    monkeypatch.setitem(sys.modules, "openslide", None)
    for arguments in (
        command(tmp_path),
        command(tmp_path, "--data.unreadable", "skip"),
        ["predict", str(trained / "run"), str(tmp_path / "3.svs"), "--output", str(tmp_path / "out.csv")],
    ):
        assert run(arguments) == 1
        error = said(capfd)
        assert f"{tmp_path / '3.svs'} needs openslide, which is not installed" in error
        assert error.endswith("pip install 'torch-ats[slides]'")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out.csv").exists()


def test_prediction_names_the_file_and_writes_no_table(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, output = trained / "0.png", tmp_path / "out.csv"
    bad = tmp_path / "bad.png"
    bad.write_bytes(whole.read_bytes())
    cut_short(bad)
    for path, expected in ((bad, "is damaged, cut short or no image"), (tmp_path / "gone.png", "is missing")):
        assert run(["predict", str(trained / "run"), str(whole), str(path), "--output", str(output)]) == 1
        assert f"{path} {expected}" in said(capfd)
        assert not output.exists()


def test_a_mask_of_another_shape(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = write_images(tmp_path, TWO, SPLITS | {"mask": ["", "mask.png", *[""] * 10]})
    Image.fromarray(np.full((48, 20), 255, np.uint8)).save(tmp_path / "mask.png")
    assert run(command(tmp_path)) == 1
    error = said(capfd)
    assert f"{manifest}, line 3: {tmp_path / 'mask.png'} is 48×20, whose shape is not that of the image" in error
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_while_views_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is no fault of the images, which must not be left out for it."""
    write_images(tmp_path, TWO, SPLITS)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(command(tmp_path, "--data.cache", str(tmp_path / "views"), "--data.unreadable", "skip")) == 1
    error = said(capfd)
    assert f"cannot be kept in {tmp_path / 'views'}: its disk is full; free some space" in error
    assert list((tmp_path / "views").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_an_image_that_changes_under_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Once views are read; what is drawn afterwards would be of another image."""
    from ats.experiments import images
    from ats.sources import plain

    write_images(tmp_path, TWO, SPLITS)
    real = images.report_unread

    def then_changed(stores: list[images.ImageStore]) -> None:
        real(stores)
        plain._decoded.clear()  # as where images are too many to be kept
        for path in tmp_path.glob("*.png"):
            os.utime(path, ns=(0, 10**18))

    monkeypatch.setattr(images, "report_unread", then_changed)
    assert run(command(tmp_path)) == 1
    assert ".png has changed since it was opened: it was" in said(capfd)
    assert not (tmp_path / "run" / "checkpoints").exists()
