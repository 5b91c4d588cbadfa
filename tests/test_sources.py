"""`ats.sources`: boxes of arrays, slides, rasters and image files are the very pixels that the files hold."""

import multiprocessing
import os
import pickle
import re
import sys
import threading
from pathlib import Path

import numpy as np
import openslide
import pytest
import rasterio
import tifffile
import torch
from PIL import Image
from rasterio.enums import Resampling
from torch.utils.data import DataLoader

import ats
from ats.sources import Box, ImageSource, Level, clip_box, from_arrays, handles, plain, read_boxes
from ats.sources.views import coarsest_level

DATA = Path(os.environ.get("ATS_DATA", ""))
needs_files = pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not (DATA / "slides").is_dir(),
    reason="real slides and rasters: set ATS_DATA to a folder that holds slides/ and rasters/",
)


def pixels(height, width, channels=3, dtype=np.uint8, seed=0):
    """(H, W, C) of smooth colours with noise, so that a read of the wrong place or by interpolation shows."""
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max + 1, (height, width, channels), dtype)


def pyramid(height, width, n_levels, ratio=2, **options):
    """Levels of unrelated pixels: a read of the wrong level, or one that resamples, cannot pass."""
    sizes = [(height // ratio**level, width // ratio**level) for level in range(n_levels)]
    return [pixels(*size, seed=level, **options) for level, size in enumerate(sizes)]


def write_tiff(path, levels, **options):
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for index, level in enumerate(levels):
            file.write(level, subfiletype=int(index > 0), metadata=None, **options)


def write_geotiff(path, level, overviews=(), **options):
    """Through GDAL: overviews, JPEG, projections, many bands; returns the levels as GDAL itself reads them."""
    shape = {"height": level.shape[0], "width": level.shape[1], "count": level.shape[2], "dtype": level.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
        file.write(level.transpose(2, 0, 1))
        if overviews:
            file.build_overviews(overviews, Resampling.nearest)
    levels = []
    for number in (None, *range(len(overviews))):
        with rasterio.open(path, **({} if number is None else {"overview_level": number})) as file:
            levels.append(file.read().transpose(1, 2, 0))
    return levels


def written(folder):
    """(path, backend that it must be given to, levels (H, W, C), mpp) of files of every kind that is read."""
    tiles = {"tile": (64, 64), "photometric": "rgb"}
    even, odd, tall = pyramid(256, 320, 3), pyramid(301, 259, 3), pyramid(200, 180, 2, ratio=3)
    write_tiff(folder / "even.tif", even, **tiles)
    yield folder / "even.tif", "openslide", even, None
    write_tiff(folder / "odd.tif", odd, compression="zlib", **tiles)
    yield folder / "odd.tif", "openslide", odd, None
    write_tiff(folder / "tall.tif", tall, bigtiff=True, **tiles)
    yield folder / "tall.tif", "openslide", tall, None
    write_tiff(folder / "strips.tif", [pixels(150, 130)], rowsperstrip=7, photometric="rgb")
    yield folder / "strips.tif", "pillow", [pixels(150, 130)], None
    deep = [pixels(150, 130, 5, np.uint16)]
    write_tiff(folder / "deep.tif", deep, tile=(32, 32), photometric="minisblack", planarconfig="contig")
    yield folder / "deep.tif", "rasterio", deep, None
    signed = [pixels(90, 70, 1, np.int16)]
    write_tiff(folder / "signed.tif", [signed[0][..., 0]], photometric="minisblack")
    yield folder / "signed.tif", "pillow", signed, None
    smooth = np.add.outer(np.arange(300), np.arange(280))[..., None] // np.array([3, 4, 5])
    jpeg = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "jpeg", "photometric": "ycbcr"}
    sizes = [
        level.shape[1::-1] for level in write_geotiff(folder / "jpeg.tif", smooth.astype(np.uint8), (2, 4), **jpeg)
    ]
    with openslide.OpenSlide(folder / "jpeg.tif") as slide:  # decoders of JPEG differ by two levels of 255
        wholes = [np.asarray(slide.read_region((0, 0), level, size)) for level, size in enumerate(sizes)]
    yield folder / "jpeg.tif", "openslide", [whole[..., :3] for whole in wholes], None
    place = {"crs": "EPSG:32618", "transform": rasterio.Affine(30, 0, 5e5, 0, -20, 4e6)}
    levels = write_geotiff(folder / "geo.tif", pixels(133, 157, 4, np.int16), (2, 4), **place)
    yield folder / "geo.tif", "rasterio", levels, (20e6, 30e6)
    Image.fromarray(pixels(60, 80)).save(folder / "x.png")
    yield folder / "x.png", "pillow", [pixels(60, 80)], None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return list(written(tmp_path_factory.mktemp("written")))


def boxes_of(source, count=8, seed=0):
    random = np.random.default_rng(seed)
    for level, size in enumerate(source.levels):
        yield Box(source, level, 0, 0, size.height, size.width)
        for _ in range(count):
            height, width = random.integers(1, min(size.height, size.width, 90) + 1, 2)
            top, left = random.integers(0, (size.height - height + 1, size.width - width + 1))
            yield Box(source, level, *(int(value) for value in (top, left, height, width)))


def cut(levels, box):
    part = levels[box.level][box.top : box.top + box.height, box.left : box.left + box.width]
    return torch.from_numpy(np.ascontiguousarray(part.transpose(2, 0, 1)))


def assert_exact(boxes, read, levels):
    for box, tensor in zip(boxes, read, strict=True):
        expected = cut(levels, box)
        assert tensor.dtype == expected.dtype == box.source.dtype
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), box  # uint16 has no torch.equal


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
                atol = 2 if path.name == "jpeg.tif" else 0  # colours that are spread over more pixels
                torch.testing.assert_close(source.read(*box[1:]), cut(levels, box), rtol=0, atol=atol)


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


def test_spawned_workers(files):
    sources = [(ats.open_image(path), levels) for path, _, levels, _ in files]
    boxes = [list(boxes_of(source, 4)) for source, _ in sources]
    read_boxes([box for wanted in boxes for box in wanted], threads=0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answer = pool.apply(read_all, [pickle.dumps(boxes)])
    for (_, levels), wanted, arrays in zip(sources, boxes, answer, strict=True):
        assert_exact(wanted, map(torch.from_numpy, arrays), levels)


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


def test_large_boxes_of_slides_are_read_in_parts(files, monkeypatch):
    from ats.sources import slides

    monkeypatch.setattr(slides, "_PIXELS_AT_ONCE", 1000)
    for path, backend, levels, _ in files:
        if backend == "openslide":
            boxes = list(boxes_of(ats.open_image(path)))
            assert_exact(boxes, read_boxes(boxes, threads=0), levels)


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
            patch.setattr(slides, "_opened", Slide)
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


def test_arrays_of_every_kind(tmp_path):
    values = pixels(40, 50, 3, np.uint16)
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")

    class Sliced:  # as zarr and others are
        shape, dtype = values.shape, values.dtype

        def __getitem__(self, slices):
            return values[slices]

    chw = np.ascontiguousarray(values.transpose(2, 0, 1))
    small = np.ascontiguousarray(values[::2, ::2])
    for levels, last in (
        ([torch.from_numpy(chw), torch.from_numpy(chw)[:, ::2, ::2]], False),
        ([chw, chw[:, ::2, ::2]], False),
        ([chw.astype(">u2"), small.transpose(2, 0, 1)], False),
        ([chw[:, :, ::-1][:, :, ::-1]], False),
        ([mapped, mapped[::2, ::2]], True),
        (Sliced(), True),
    ):
        source = from_arrays(levels, channels_last=last)
        boxes = list(boxes_of(source))
        assert_exact(boxes, [source.read(*box[1:]) for box in boxes], [values, small])
    grey = from_arrays([values[..., 0]])
    assert_exact([Box(grey, 0, 3, 4, 5, 6)], [grey.read(0, 3, 4, 5, 6)], [values[..., :1]])


def test_a_box_of_an_array_is_a_copy():
    for array in (torch.zeros(1, 8, 8), np.zeros((1, 8, 8), np.float32)):
        from_arrays([array]).read(0, 0, 0, 8, 8).add_(1)
        assert array.sum() == 0


def test_memory_maps_pickle_as_places_in_files(tmp_path):
    """NumPy pickles a map as all of its pixels; slices of a map keep the offset of the whole."""
    values = pixels(300, 400)
    values.tofile(tmp_path / "raw")
    whole = np.memmap(tmp_path / "raw", np.uint8, "r", shape=values.shape)
    shifted = np.memmap(tmp_path / "raw", np.uint8, "r", offset=5000, shape=(50, 60, 3))
    for array, expected in (
        (whole, values),
        (whole[7:250:2, ::-1], values[7:250:2, ::-1]),
        (shifted[3:], values.reshape(-1)[5000:][: 50 * 60 * 3].reshape(50, 60, 3)[3:]),
    ):
        source = from_arrays([array], channels_last=True)
        data = pickle.dumps(source)
        assert len(data) < 2000
        for again in (pickle.loads(data), pickle.loads(pickle.dumps(pickle.loads(data)))):
            boxes = list(boxes_of(again))
            assert_exact(boxes, [again.read(*box[1:]) for box in boxes], [expected])
        assert again.fingerprint == source.fingerprint is not None
    changed = np.memmap(tmp_path / "raw", np.uint8, "c", shape=values.shape)
    changed[0, 0] = 7
    assert (
        pickle.loads(pickle.dumps(from_arrays([changed], channels_last=True))).read(0, 0, 0, 1, 1).tolist()
        == [[[7]]] * 3
    )


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ([], ValueError, "at least one level"),
        ([np.zeros((3, 8, 8), np.int64)], TypeError, "level 0 is ndarray of int64, expected one of uint8, uint16"),
        (["x.tif"], TypeError, "level 0 is str of no dtype"),
        ([np.zeros(8, np.uint8)], ValueError, r"level 0 has the shape \(8,\)"),
        ([np.zeros((0, 8), np.uint8)], ValueError, r"shape \(0, 8\)"),
        ([np.zeros((64, 64, 3), np.uint8)], ValueError, "reads as 64 channels of 64×3 pixels; pass channels_last=True"),
        ([np.zeros((3, 8, 8), np.uint8), np.zeros((1, 4, 4), np.uint8)], ValueError, "must agree in channels"),
        ([np.zeros((4, 4), np.uint8), np.zeros((8, 8), np.uint8)], ValueError, "level 1 is 8×8 pixels, no smaller"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_image(levels, error, message):
    with pytest.raises(error, match=message):
        from_arrays(levels)


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


def test_paths_may_be_relative_and_begin_with_a_tilde(tmp_path, monkeypatch):
    Image.fromarray(pixels(6, 7)).save(tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sources = [ats.open_image("x.png"), ats.open_image("~/x.png")]
    monkeypatch.chdir("/")
    for source in sources:
        assert source.read(0, 0, 0, 6, 7).shape == (3, 6, 7)


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


@needs_files
@pytest.mark.parametrize("name", ["boxes.tiff", "RGB.byte.tif", "cogeo.tif", "mosaic_cog1.tif", "cog_world.tif"])
def test_real_rasters(name):
    """Every level against another reader's: tifffile's where it decodes them, else GDAL's own whole levels."""
    path = DATA / "rasters" / name
    source = ats.open_image(path)
    with rasterio.open(path) as file:
        size, count, overviews = file.shape, file.count, len(file.overviews(1))
    assert (source.levels[0].height, source.levels[0].width) == size
    assert source.channels == count
    assert len(source.levels) == overviews + 1
    for level, number in enumerate((None, *range(overviews))):
        with rasterio.open(path, **({} if number is None else {"overview_level": number})) as file:
            for box in list(boxes_of(source, 4))[1:]:
                if box.level == level and box.height < 1000:
                    window = ((box.top, box.top + box.height), (box.left, box.left + box.width))
                    assert np.array_equal(source.read(*box[1:]).numpy(), file.read(window=window))
    expected = {"RGB.byte.tif": 300.04e6, "mosaic_cog1.tif": 300.04e6, "cogeo.tif": 0.597e6}
    if name in expected:
        assert source.mpp == pytest.approx((expected[name],) * 2, rel=1e-3)


@needs_files
def test_a_real_slide():
    path = DATA / "slides" / "CMU-1-Small-Region.svs"
    source = ats.open_image(path)
    assert source.levels == (Level(2967, 2220),)
    assert source.mpp == (0.499, 0.499)
    other = ats.open_image(path, backend="rasterio")
    for box in boxes_of(source, 12):
        if box.height < 2000:
            np.testing.assert_array_equal(source.read(*box[1:]), other.read(*box[1:]))


@needs_files
@pytest.mark.parametrize(("name", "size"), [("sm_image.dcm", 50), ("boxes_dicom/boxes_0.dcm", 16)])
def test_real_dicom(name, size):
    path = DATA / "rasters" / name
    source = ats.open_image(path)
    assert source.levels[0] == Level(size, size)
    whole = np.asarray(openslide.OpenSlide(path).read_region((0, 0), 0, (size, size)))
    np.testing.assert_array_equal(source.read(0, 0, 0, size, size).permute(1, 2, 0), whole[..., :3])


@needs_files
@pytest.mark.parametrize("name", ["slides/CMU-1-Small-Region.svs", "rasters/cogeo.tif", "rasters/mosaic_cog1.tif"])
def test_views_of_real_files(name):
    """From disk as from memory, of the level that suits; from the full resolution, and between two levels."""
    source = ats.open_image(DATA / name)
    for size in ((150, 130), (source.levels[0].height // 2 + 1, 100)):
        level = coarsest_level(source, *size)
        whole = source.read(level, 0, 0, source.levels[level].height, source.levels[level].width)
        memory = whole if whole.dtype == torch.uint8 else whole.float()
        torch.testing.assert_close(
            ats.read_view(source, size=size), ats.area_downsample(memory[None], size)[0], rtol=1e-5, atol=1e-5
        )


@needs_files
def test_the_examples_of_the_docs_run(tmp_path, monkeypatch):
    """A user copies them: they must run as printed, on any slide and array."""
    text = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slide.svs").symlink_to(DATA / "slides" / "CMU-1-Small-Region.svs")
    np.save("raster.npy", pixels(40, 50))
    names = {}
    exec("\n".join(examples), names)
    assert names["view"].shape == (3, 185, 138)
    assert names["patch"].shape == (3, 224, 224)
    assert 0 < names["cells"].float().mean() < 1
    assert names["image"].levels == (Level(40, 50),)
