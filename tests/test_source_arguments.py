"""Sources and paths: numbers of any type, arrays whose axes are swapped, homes that are not known, default devices."""

import numpy as np
import pytest
import torch

import ats
from ats import sources
from ats.experiments.megapixel_mnist import MegapixelMNISTConfig

Image = pytest.importorskip("PIL.Image")
NUMBERS = [np.float32, np.float64, np.array, torch.tensor]


@pytest.fixture
def transparent(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (6, 4), (9, 9, 9, 0)).save(path)
    return path


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers(transparent, number):
    source = ats.open_image(transparent, mpp=number(0.25), background=number(7.0))
    assert source.mpp == (0.25, 0.25)
    assert (source.read(0, 0, 0, 4, 6) == 7).all()
    view = ats.read_view(source, scale=number(0.5))
    assert view.shape == (3, 2, 3)
    assert (view == ats.read_view(source, scale=0.5)).all()
    assert ats.open_image(transparent, mpp=np.array([0.25, 0.5])).mpp == (0.25, 0.5)
    laid = ats.open_image(transparent, background=torch.tensor([1, 2, 3])).read(0, 0, 0, 1, 1)
    assert laid.flatten().tolist() == [1, 2, 3]


def test_what_is_no_number_is_named(transparent):
    for value in ("x", object(), [1.0, 2.0, 3.0], np.array(-1.0)):
        with pytest.raises(ValueError, match=r"mpp must be micrometres a pixel"):
            ats.open_image(transparent, mpp=value)
    for value in (object(), np.array(["a", "b", "c"])):
        with pytest.raises(ValueError, match=r"background must be"):
            ats.open_image(transparent, background=value)
    with pytest.raises(TypeError, match=r"scale must be a number, got str"):
        ats.read_view(ats.open_image(transparent), scale="x")


@pytest.mark.parametrize("bands", [3, 5, 12])
def test_arrays_whose_channels_are_on_the_other_side(bands):
    array = np.zeros((70, 64, bands), np.uint16)
    with pytest.raises(ValueError, match=r"reads as 70 channels of .* pass channels_last=True"):
        sources.from_arrays(array)
    assert sources.from_arrays(array, channels_last=True).channels == bands
    with pytest.raises(ValueError, match=r"reads as 64 channels of .* pass channels_last=False"):
        sources.from_arrays(array.transpose(2, 0, 1), channels_last=True)
    assert sources.from_arrays(array.transpose(2, 0, 1)).channels == bands


def test_views_lie_where_their_images_do(transparent):
    expected = ats.read_view(ats.open_image(transparent), size=2)
    arrays = sources.from_arrays(np.arange(70 * 50, dtype=np.uint8).reshape(1, 70, 50))
    view = ats.read_view(arrays, size=(9, 7))
    torch.set_default_device("meta")
    try:
        assert torch.equal(ats.read_view(ats.open_image(transparent), size=2), expected)
        assert torch.equal(ats.read_view(arrays, size=(9, 7)), view)
    finally:
        torch.set_default_device(None)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path}/run"):
        ats.load("~/run")
    table = ats.sample_patches(torch.rand(1, 1, 8, 8), torch.randn(1, 2, 2), 2, 2).table()
    table.to_csv("~/patches.csv")
    assert (tmp_path / "patches.csv").read_text().startswith("image,draw,")
    monkeypatch.setenv("ATS_DATA", "~/data")
    assert MegapixelMNISTConfig().find_folder() == tmp_path / "data" / "mnist"
    monkeypatch.delenv("ATS_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert MegapixelMNISTConfig().find_folder() == tmp_path / "cache" / "torch-ats" / "mnist"


def test_an_unknown_home_is_a_line():
    table = ats.sample_patches(torch.rand(1, 1, 8, 8), torch.randn(1, 2, 2), 2, 2).table()
    for call in (table.to_csv, ats.load):
        with pytest.raises(ValueError, match=r"~nobody-has-this/x: .*write the path without ~"):
            call("~nobody-has-this/x")
    with pytest.raises(TypeError, match=r"expected a path, as text or a Path, got 3"):
        ats.load(3)
