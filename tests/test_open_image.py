"""`ats.open_image`: which reader, background and mpp, and what is wrong with files that it refuses."""

import os
import pickle
import sys

import numpy as np
import pytest
import rasterio
from PIL import Image

import ats
from ats.sources import Box, Level, handles
from tests.written_images import assert_exact, pixels, write_geotiff, written


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return list(written(tmp_path_factory.mktemp("written")))


def test_background_of_a_slide(tmp_path):
    """Where no pixels were scanned a slide is transparent: white, or what is asked for, and never black."""
    from ats.sources import slides

    scan = np.zeros((32, 32, 4), np.uint8)
    scan[:16] = (200, 100, 50, 255)
    scan[16] = (100, 100, 100, 51)

    class Slide:
        level_dimensions, level_downsamples = ((32, 32),), (1.0,)

        def __init__(self, path):
            self.properties = {"openslide.background-color": "F0E0D0"}
            self.properties.update({"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.25"})

        def read_region(self, place, level, size):
            box = (*place, place[0] + size[0], place[1] + size[1])
            return Image.fromarray(scan, "RGBA").crop(box)

        def close(self):
            pass

    path = tmp_path / "x.svs"
    path.write_bytes(b"slide")
    for background, expected in (
        ("auto", [(200, 100, 50), (212, 199, 186), (240, 224, 208)]),
        (0, [(200, 100, 50), (20, 20, 20), (0, 0, 0)]),
        ((0, 0, 255), [(200, 100, 50), (20, 20, 224), (0, 0, 255)]),
        (None, [(200, 100, 50, 255), (100, 100, 100, 51), (0, 0, 0, 0)]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slides, "_open", Slide)
            source = ats.open_image(path, background=background)
            assert source.mpp == (0.25, 0.5)
            column = source.read(0, 0, 3, 32, 1)[:, [0, 16, 31], 0].T
            handles.discard((type(source), source.fingerprint))
        assert [tuple(row) for row in column.tolist()] == expected
    with pytest.raises(ValueError, match=r"background must be 'auto', None, or a colour"):
        ats.open_image(path, background="white")


def test_transparency_of_rasters_and_image_files(tmp_path):
    rgba = np.dstack([pixels(40, 50), np.zeros((40, 50), np.uint8)])
    rgba[5:9, 5:9, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "x.png")
    write_geotiff(tmp_path / "x.tif", rgba, crs="EPSG:32618", transform=rasterio.Affine(1, 0, 0, 0, -1, 0), alpha="YES")
    on_white = np.where(rgba[..., 3:] == 255, rgba[..., :3], 255)
    for name in ("x.png", "x.tif"):
        source = ats.open_image(tmp_path / name)
        assert source.channels == 3
        np.testing.assert_array_equal(source.read(0, 0, 0, 40, 50).permute(1, 2, 0).numpy(), on_white)
        kept = ats.open_image(tmp_path / name, background=None)
        np.testing.assert_array_equal(kept.read(0, 0, 0, 40, 50).permute(1, 2, 0).numpy(), rgba)


def test_mpp_is_the_files_or_the_users(files):
    by_name = {path.name: path for path, *_ in files}
    assert ats.open_image(by_name["geo.tif"], mpp=2).mpp == (2, 2)
    assert ats.open_image(by_name["x.png"], mpp=(0.5, 0.25)).mpp == (0.5, 0.25)
    for wrong in (0, -1, float("nan"), (1, 2, 3), "a"):
        with pytest.raises(ValueError, match="mpp must be micrometres a pixel"):
            ats.open_image(by_name["x.png"], mpp=wrong)


def test_files_that_cannot_be_opened(tmp_path, files, monkeypatch):
    """One line that names the file and what to do, whatever the reader would have said."""
    by_name = {path.name: path for path, *_ in files}
    with pytest.raises(FileNotFoundError, match=r"gone\.svs is missing"):
        ats.open_image(tmp_path / "gone.svs")
    with pytest.raises(ValueError, match="is a folder; name a file"):
        ats.open_image(tmp_path)
    with pytest.raises(ValueError, match="unknown backend 'gdal', expected None, 'openslide', 'rasterio', 'pillow'"):
        ats.open_image(by_name["x.png"], backend="gdal")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"numpy\.load\(path, mmap_mode='r'\)"):
        ats.open_image(tmp_path / "x.npy")

    (tmp_path / "png.svs").write_bytes(by_name["x.png"].read_bytes())
    with pytest.raises(ValueError, match=r"png\.svs is .*no slide .*it begins as a PNG does.*backend='pillow'"):
        ats.open_image(tmp_path / "png.svs")
    assert ats.open_image(tmp_path / "png.svs", backend="pillow").levels == (Level(60, 80),)
    (tmp_path / "text.tif").write_text("II*\0 but no TIFF")
    (tmp_path / "text.vrt").write_text("nothing")
    for name in ("text.tif", "text.vrt"):
        with pytest.raises(ValueError, match=rf"{name} is damaged, cut short or no"):
            ats.open_image(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"deep\.tif holds 16 bits a channel, of which OpenSlide gives 8; read it with r"
    ):
        ats.open_image(by_name["deep.tif"], backend="openslide")
    write_geotiff(tmp_path / "int32.tif", np.zeros((8, 8, 2), np.int32))
    with pytest.raises(ValueError, match=r"int32\.tif holds bands of int32, expected all of one of uint8, uint16"):
        ats.open_image(tmp_path / "int32.tif")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9])
def test_a_file_that_was_cut_short(share, tmp_path, files):
    """An interrupted copy: an error on opening or reading, never pixels of nothing."""
    for path, *_ in files:
        whole, place = path.read_bytes(), tmp_path / path.name
        place.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=path.name):
            read_whole(place)


def read_whole(path):
    source = ats.open_image(path)
    for level, size in enumerate(source.levels):
        source.read(level, 0, 0, size.height, size.width)


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("x.svs", ["openslide"], r"x\.svs needs openslide, .*pip install 'torch-ats\[slides\]'$"),
        ("geo.tif", ["rasterio"], r"geo\.tif needs rasterio, .*pip install 'torch-ats\[satellite\]'$"),
        ("even.tif", ["rasterio", "openslide"], r"needs openslide or rasterio, .*\[slides\]' or pip .*\[satellite\]'$"),
        ("x.png", ["PIL"], r"x\.png needs pillow, .*pip install 'torch-ats\[data\]'$"),
    ],
)  # fmt: skip
def test_a_reader_that_is_not_installed(name, missing, message, tmp_path, files, monkeypatch):
    path = {path.name: path for path, *_ in files}.get(name, tmp_path / name)
    if not path.exists():
        path.write_bytes(b"slide")
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=message):
        ats.open_image(path)
    if name == "even.tif":
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "openslide", None)
        assert type(ats.open_image(path)).__name__ == "RasterSource"
        with pytest.raises(ModuleNotFoundError, match=r"openslide-python is not installed; slides need it"):
            ats.open_image(path, backend="openslide")


def test_a_deep_colour_image_is_read_by_the_reader_that_the_error_names(tmp_path):
    deep = pixels(20, 30, 3, np.uint16)
    with rasterio.open(tmp_path / "x.png", "w", driver="PNG", height=20, width=30, count=3, dtype="uint16") as file:
        file.write(deep.transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"mode RGB holds 16 bits a channel.*backend='rasterio'"):
        ats.open_image(tmp_path / "x.png")
    source = ats.open_image(tmp_path / "x.png", backend="rasterio")
    assert_exact([Box(source, 0, 0, 0, 20, 30)], [source.read(0, 0, 0, 20, 30)], [deep])


def test_a_file_that_changes_under_a_run(tmp_path, files):
    """Pixels of two images in one epoch: found whenever a file is opened, in a worker as well."""
    for name in ("even.tif", "geo.tif", "x.png"):
        path = tmp_path / name
        path.write_bytes(next(p for p, *_ in files if p.name == name).read_bytes())
        source = ats.open_image(path)
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
        with pytest.raises(ValueError, match=rf"{name} has changed since it was opened: it was .* bytes of time"):
            source.read(0, 0, 0, 4, 4)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is gone since it was opened"):
            pickle.loads(pickle.dumps(source)).read(0, 0, 0, 4, 4)


def test_paths_may_be_relative_and_begin_with_a_tilde(tmp_path, monkeypatch):
    Image.fromarray(pixels(6, 7)).save(tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sources = [ats.open_image("x.png"), ats.open_image("~/x.png")]
    monkeypatch.chdir("/")
    for source in sources:
        assert source.read(0, 0, 0, 6, 7).shape == (3, 6, 7)
