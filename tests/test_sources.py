"""`ats.sources`: boxes of slides, rasters and image files are the very pixels that the files hold, in any worker."""

import multiprocessing
import os
import pickle
import sys
import threading

import numpy as np
import openslide
import pytest
import rasterio
import torch
from PIL import Image
from torch.utils.data import DataLoader

import ats
from ats.sources import Box, ImageSource, Level, clip_box, from_arrays, handles, plain, read_boxes
from tests.written_images import assert_exact, boxes_of, cut, pixels, pyramid, write_tiff, written


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return list(written(tmp_path_factory.mktemp("written")))


def test_every_reader_gives_the_pixels_of_the_file(files):
    for path, backend, levels, mpp in files:
        source = ats.open_image(path)
        assert isinstance(source, ImageSource)
        assert type(source) is type(ats.open_image(path, backend=backend)), path
        assert [(level.height, level.width) for level in source.levels] == [level.shape[:2] for level in levels]
        assert source.channels == levels[0].shape[2]
        assert source.mpp == (pytest.approx(mpp) if mpp else None)
        boxes = list(boxes_of(source))
        assert_exact(boxes, [source.read(*box[1:]) for box in boxes], levels)


def test_both_readers_of_tiles_agree(files):
    """Which one is used depends on what is installed; the pixels must not."""
    for path, backend, levels, _ in files:
        if backend == "openslide":
            source = ats.open_image(path, backend="rasterio")
            for box in boxes_of(source):
                read, expected = source.read(*box[1:]), cut(levels, box)
                if path.name == "jpeg.tif":  # decoders spread colours over pixels, and round, in ways of their own
                    difference = (read.int() - expected.int()).abs()
                    assert difference.max() <= 8
                    assert difference.float().mean() < 0.5
                else:
                    assert torch.equal(read, expected)


def test_eight_threads(files):
    """One handle that threads share crashes or mixes up rows with some readers."""
    sources = [(ats.open_image(path), levels) for path, _, levels, _ in files]
    boxes = [(box, levels) for source, levels in sources for box in boxes_of(source, 6)] * 2
    for (box, levels), tensor in zip(boxes, read_boxes([box for box, _ in boxes], threads=8), strict=True):
        assert_exact([box], [tensor], levels)


def read_all(given):
    """In a worker: boxes of each source, many times, as bytes."""
    return [[box.source.read(*box[1:]).numpy() for box in boxes] for boxes in pickle.loads(given)]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_after_a_fork(files):
    """Children of a parent with open files must open their own: a shared one reads elsewhere, in silence."""
    sources = [(ats.open_image(path), levels) for path, _, levels, _ in files]
    boxes = [list(boxes_of(source, 12)) for source, _ in sources]
    for wanted in boxes:
        read_boxes(wanted, threads=0)  # opened here, and left open
        read_boxes(wanted, threads=2)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        answers = pool.map(read_all, [pickle.dumps(boxes)] * 4, chunksize=1)
    for answer in answers:
        for (_, levels), wanted, arrays in zip(sources, boxes, answer, strict=True):
            assert_exact(wanted, map(torch.from_numpy, arrays), levels)
    for (_, levels), wanted in zip(sources, boxes, strict=True):  # and the parent's are as they were
        assert_exact(wanted, read_boxes(wanted, threads=0), levels)


class Opened:
    """A handle that knows where it was opened."""

    def __init__(self):
        self.place = os.getpid(), threading.get_ident()
        self.closed = False

    def close(self):
        self.closed = True


def place_of_handle(key):
    return handles.handle(key, Opened).place


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_handle_is_of_one_process_and_thread():
    """Readers are not asked: whether they read wrongly through a shared handle is a matter of chance."""
    here = os.getpid(), threading.get_ident()
    assert place_of_handle("x") == place_of_handle("x") == here
    mine = handles.handle("x", Opened)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        child = pool.apply(place_of_handle, ["x"])
        assert child[0] != here[0]
        assert pool.apply(place_of_handle, ["x"]) == child
    found = []
    thread = threading.Thread(target=lambda: found.append(place_of_handle("x")))
    thread.start()
    thread.join()
    assert found[0][1] != here[1]
    assert handles.handle("x", Opened) is mine
    handles.discard("x")
    assert mine.closed


def test_workers_of_a_data_loader(files):
    """The way that views are read ahead: `DataLoader` forks after the parent has read, and has threads."""
    path, _, _, _ = files[0]
    source = ats.open_image(path)
    read_boxes(boxes_of(source), threads=4)
    views = DataLoader([source] * 6, batch_size=None, num_workers=2, collate_fn=lambda one: ats.read_view(one, size=32))
    for view in views:
        torch.testing.assert_close(view, ats.read_view(source, size=32), rtol=0, atol=0)


def test_handles_are_few(files, monkeypatch):
    """A data set of a thousand slides must not run out of file descriptors."""
    monkeypatch.setattr(handles, "MOST_OPEN", 2)
    closed = []

    class Named:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)

    def in_a_thread():
        for name in "abcab":
            assert handles.handle(name, lambda name=name: Named(name)).name == name

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert closed == ["a", "b", "c"]


def test_slides_leave_out_levels_that_only_resampling_gives(tmp_path, monkeypatch):
    """OpenSlide takes level-0 pixels: at a ratio of 2.0067 no box but one from the corner is exact."""
    from ats.sources import slides

    levels = pyramid(301, 259, 3)
    write_tiff(tmp_path / "x.tif", levels, tile=(64, 64), photometric="rgb")
    monkeypatch.setattr(slides, "_AT_ONCE", 100)
    source = ats.open_image(tmp_path / "x.tif", backend="openslide")
    assert source.levels == (Level(301, 259), Level(75, 64))
    boxes = list(boxes_of(source))
    assert_exact(boxes, [source.read(*box[1:]) for box in boxes], [levels[0], levels[2]])


def test_threads_and_slides_share_one_cache(tmp_path, monkeypatch):
    """OpenSlide keeps 32 MB a handle by itself: 16 slides in 4 threads would keep 2 GB."""
    given = []
    real = openslide.OpenSlide.set_cache
    monkeypatch.setattr(openslide.OpenSlide, "set_cache", lambda self, cache: given.append(cache) or real(self, cache))
    levels = [pixels(300, 300)]
    for name in ("a.tif", "b.tif"):
        write_tiff(tmp_path / name, levels, tile=(64, 64), photometric="rgb")
        boxes = list(boxes_of(ats.open_image(tmp_path / name)))
        assert_exact(boxes, read_boxes(boxes, threads=3), levels)
    assert len(given) >= 4
    assert len({id(cache) for cache in given}) == 1


def test_what_gdal_keeps_is_limited_once(files, monkeypatch):
    """By itself it keeps a twentieth of the machine's memory; of a few bytes' cache each block is decoded anew."""
    from ats.sources import rasters

    path = next(path for path, backend, *_ in files if backend == "rasterio")
    before = rasterio.env.get_gdal_config("GDAL_CACHEMAX")
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    monkeypatch.setattr(rasters, "_limited", False)
    try:
        ats.open_image(path)
        assert rasterio.env.get_gdal_config("GDAL_CACHEMAX") == 32 << 20
        rasterio.env.set_gdal_config("GDAL_CACHEMAX", 5 << 20)  # a user's own
        ats.open_image(path).read(0, 0, 0, 2, 2)
        assert rasterio.env.get_gdal_config("GDAL_CACHEMAX") == 5 << 20
    finally:
        rasterio.env.set_gdal_config("GDAL_CACHEMAX", before)


def test_large_boxes_of_slides_are_read_in_parts(files, monkeypatch):
    from ats.sources import slides

    monkeypatch.setattr(slides, "_PIXELS_AT_ONCE", 1000)
    for path, backend, levels, _ in files:
        if backend == "openslide":
            boxes = list(boxes_of(ats.open_image(path)))
            assert_exact(boxes, read_boxes(boxes, threads=0), levels)


@pytest.mark.parametrize(
    "box", [(0, -1, 0, 5, 5), (0, 0, -3, 5, 5), (0, 56, 0, 5, 5), (0, 0, 76, 5, 5), (0, 0, 0, 0, 5)]
)
def test_a_box_outside_is_refused(box, files):
    """NumPy and zarr cut such slices short, or return nothing, without a word."""
    for source in (ats.open_image(files[-1][0]), from_arrays([pixels(60, 80).transpose(2, 0, 1)])):
        with pytest.raises(ValueError, match=r"is not inside level 0 of .*, which is 60×80"):
            source.read(*box)
    for level in (1, -1):
        with pytest.raises(ValueError, match=rf"has 1 level\(s\), 0 to 0; there is no level {level}"):
            source.read(level, 0, 0, 5, 5)


def test_any_integers_will_do(files):
    """Offsets come from tensors and NumPy; OpenSlide's own reader takes neither."""
    for path, _, levels, _ in files:
        source = ats.open_image(path)
        offsets = torch.tensor([7, 9])
        box = (np.int64(0), offsets[0], np.uint8(offsets[1]), np.int32(20), torch.tensor(10))
        assert_exact([Box(source, 0, 7, 9, 20, 10)], [source.read(*box)], levels)
        with pytest.raises(TypeError, match="of a box must be integers"):
            source.read(0, 7.0, 9, 20, 10)


def test_image_files_are_decoded_once_and_few_are_kept(tmp_path, monkeypatch):
    decoded = []
    real = plain.decode
    monkeypatch.setattr(plain, "decode", lambda path, background: decoded.append(path.name) or real(path, background))
    monkeypatch.setattr(plain, "KEPT_BYTES", 2 * 100 * 100 * 3)
    sources = []
    for index in range(3):
        Image.fromarray(pixels(100, 100, seed=index)).save(tmp_path / f"{index}.png")
        sources.append(ats.open_image(tmp_path / f"{index}.png"))
    assert decoded == []
    read_boxes([Box(sources[0], 0, top, 0, 9, 9) for top in range(40)], threads=8)
    assert decoded == ["0.png"]
    for index in (1, 0, 2, 0, 1):
        sources[index].read(0, 0, 0, 5, 5)
    assert decoded == ["0.png", "1.png", "2.png", "1.png"]


def test_clip_box():
    """The part inside, and padding that makes up for the rest, also for boxes that are wholly outside."""
    size = (10, 8)
    for top in range(-9, 16, 4):
        for left in range(-9, 16, 5):
            part = clip_box(size, top, left, 6, 5)
            rows = [row for row in range(top, top + 6) if 0 <= row < 10]
            columns = [column for column in range(left, left + 5) if 0 <= column < 8]
            assert (part.height, part.width) == (len(rows), len(columns))
            assert (part.above + part.height + part.below, part.before + part.width + part.after) == (6, 5)
            if rows and columns:
                assert (part.top, part.left) == (rows[0], columns[0])
                assert (part.above, part.before) == (rows[0] - top, columns[0] - left)


def test_read_boxes_reports_the_first_error(files):
    source = ats.open_image(files[0][0])
    with pytest.raises(ValueError, match=r"at \(-2, 0\)"):
        read_boxes([(source, 0, 0, 0, 2, 2), (source, 0, -2, 0, 2, 2), (source, 0, -3, 0, 2, 2)])
    assert read_boxes([]) == []
