"""`ats.read_view`: the view of an image on disk is that of the image in memory, and what is cached is never half."""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ats
from ats.sources import from_arrays, view_cache, views
from ats.sources.views import coarsest_level, view_size
from tests.helpers import assert_close

DATA = Path(os.environ.get("ATS_DATA", ""))
WORLD = DATA / "rasters" / "cog_world.tif"


def image(channels, height, width, dtype=np.uint8, seed=0):
    random = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return random.normal(size=(channels, height, width)).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max + 1, (channels, height, width), dtype)


class Counted:
    """A source that notes what was read of it."""

    def __init__(self, source):
        self._source, self.boxes = source, []

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, *box):
        self.boxes.append(box)
        return self._source.read(*box)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("strip", [1 << 25, 1000, 50])
def test_a_view_is_that_of_the_image_in_memory(dtype, strip, monkeypatch):
    """Strips and blocks of columns must not show, at sizes that divide and sizes that do not."""
    monkeypatch.setattr(views, "STRIP_BYTES", strip)
    pixels = image(2, 41, 29, dtype)
    memory = torch.from_numpy(pixels.astype(np.float32) if dtype in (np.uint16, np.int16) else pixels)
    for size in ((41, 29), (20, 14), (7, 29), (41, 4), (1, 1)):
        view = ats.read_view(from_arrays([pixels]), size=size)
        wide = torch.float64 if dtype == np.float64 else torch.float32
        expected = ats.area_downsample(memory[None], size, dtype=wide)[0]
        assert view.dtype == wide
        torch.testing.assert_close(view, expected, rtol=1e-5, atol=0.05 if dtype in (np.uint16, np.int16) else 1e-6)


def test_memory_is_bounded_by_strips(monkeypatch):
    monkeypatch.setattr(views, "STRIP_BYTES", 4000)
    source = Counted(from_arrays([image(3, 500, 400)]))
    ats.read_view(source, size=(50, 40))
    assert max(3 * height * width for _, _, _, height, width in source.boxes) <= 4000
    assert sum(height * width for _, _, _, height, width in source.boxes) == 500 * 400, "read once"


def test_the_coarsest_level_that_is_not_coarser_is_read():
    """Levels of unrelated pixels: which one a view is of shows."""
    pixels = [image(1, 96, 80, seed=0), image(1, 48, 40, seed=1), image(1, 23, 20, seed=2)]
    source = from_arrays(pixels, mpp=0.5)
    for size, level in (((96, 80), 0), ((49, 40), 0), ((48, 40), 1), ((24, 20), 1), ((23, 20), 2), ((5, 5), 2)):
        assert coarsest_level(source, *size) == level
        expected = ats.area_downsample(torch.from_numpy(pixels[level])[None], size)[0]
        assert_close(ats.read_view(source, size=size), expected)


def test_scale_mpp_and_size():
    source = from_arrays([image(3, 300, 201)], mpp=(0.25, 0.5), name="x.svs")
    assert view_size(source, scale=0.25) == (75, 50)
    assert view_size(source, scale=1e-6) == (1, 1)
    assert view_size(source, mpp=1) == (75, 100)
    assert view_size(source, mpp=(0.5, 1.0)) == (150, 100)
    assert view_size(source, mpp=(0.25, 0.5)) == (300, 201)
    assert view_size(source, size=7) == (7, 7)
    for options, message in (
        ({}, "give one of scale, mpp and size"),
        ({"scale": 0.5, "size": 3}, "give one of scale, mpp and size"),
        ({"scale": 2}, "scale must be above 0 and at most 1"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"size": (301, 5)}, r"301×5 pixels is larger than x\.svs, 300×201"),
        ({"mpp": 0.4}, r"0\.4 micrometres a pixel is finer than x\.svs itself, \(0\.25, 0\.5\)"),
        ({"mpp": -1}, "mpp must be micrometres a pixel"),
    ):
        with pytest.raises(ValueError, match=message):
            ats.read_view(source, **options)
    with pytest.raises(ValueError, match=r"y\.svs does not say how many micrometres .*open_image\(path, mpp=…\)"):
        ats.read_view(from_arrays([image(3, 30, 30)], name="y.svs"), mpp=1)


def test_views_are_cached(tmp_path):
    """The second time nothing is read; another size, level or state of the file is another view."""
    Image.fromarray(image(3, 60, 50).transpose(1, 2, 0)).save(tmp_path / "x.png")
    cache = tmp_path / "new" / "cache"
    source = Counted(ats.open_image(tmp_path / "x.png"))
    first = ats.read_view(source, size=20, cache=cache)
    read = len(source.boxes)
    assert torch.equal(ats.read_view(source, size=20, cache=cache), first)
    assert torch.equal(ats.read_view(Counted(ats.open_image(tmp_path / "x.png")), size=20, cache=str(cache)), first)
    assert len(source.boxes) == read > 0
    assert torch.equal(first, ats.read_view(source, size=20))
    assert ats.read_view(source, size=21, cache=cache).shape == (3, 21, 21)
    assert len(list(cache.iterdir())) == 2

    Image.fromarray(image(3, 60, 50, seed=1).transpose(1, 2, 0)).save(tmp_path / "x.png")
    os.utime(tmp_path / "x.png", ns=(0, 10**18))
    new = ats.read_view(ats.open_image(tmp_path / "x.png"), size=20, cache=cache)
    assert not torch.equal(new, first)
    assert len(list(cache.iterdir())) == 3


def test_one_background_is_not_anothers_view(tmp_path):
    Image.fromarray(np.zeros((20, 20, 4), np.uint8)).save(tmp_path / "x.png")
    for background, value in (("auto", 1), (0, 0), ((51, 51, 51), 0.2)):
        source = ats.open_image(tmp_path / "x.png", background=background)
        for _ in range(2):
            assert_close(ats.read_view(source, size=4, cache=tmp_path / "c"), torch.full((3, 4, 4), float(value)))


def test_a_damaged_cache_file_is_made_anew(tmp_path):
    """Cut at any length, any byte flipped, foreign: never a wrong view, never an error."""
    Image.fromarray(image(3, 60, 50).transpose(1, 2, 0)).save(tmp_path / "x.png")
    source = ats.open_image(tmp_path / "x.png")
    right = ats.read_view(source, size=8, cache=tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    whole = file.read_bytes()
    random = np.random.default_rng(0)
    damaged = [whole[:length] for length in range(0, len(whole), 211)] + [b"", b"PK\3\4", whole + b"x"]
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << random.integers(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        file.write_bytes(data)
        assert torch.equal(ats.read_view(source, size=8, cache=tmp_path / "c"), right)
    np.savez(file, view=np.zeros((3, 8, 8), np.float32), key="of another image")
    assert torch.equal(ats.read_view(source, size=8, cache=tmp_path / "c"), right)
    assert torch.equal(torch.from_numpy(np.load(file)["view"]), right)


def test_left_overs_of_a_killed_process_go(tmp_path):
    Image.fromarray(image(3, 60, 50).transpose(1, 2, 0)).save(tmp_path / "x.png")
    source = ats.open_image(tmp_path / "x.png")
    ats.read_view(source, size=8, cache=tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    file.unlink()
    old, new = (tmp_path / "c" / f".{file.stem}.{process}.1.part" for process in (1, 2))
    old.write_bytes(b"PK")
    new.write_bytes(b"PK")
    os.utime(old, (0, 0))
    ats.read_view(source, size=8, cache=tmp_path / "c")
    assert set((tmp_path / "c").iterdir()) == {file, new}


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    """The disk fills up half way through a real write: the limit on a file's size stands in for it."""
    Image.fromarray(image(3, 200, 200).transpose(1, 2, 0)).save(tmp_path / "x.png")
    code = f"""
import errno, resource, signal
import ats
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source = ats.open_image({str(tmp_path / "x.png")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ats.read_view(source, size=150, cache={str(tmp_path / "c")!r})
except OSError as error:
    print(error.errno == errno.EFBIG, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done.stderr
    assert (
        f"the view of {tmp_path / 'x.png'} cannot be kept in {tmp_path / 'c'}: File too large; free some" in done.stdout
    )
    assert list((tmp_path / "c").iterdir()) == []

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"x\.png cannot be kept in .*/c: its disk is full; free some space") as error:
        ats.read_view(ats.open_image(tmp_path / "x.png"), size=10, cache=tmp_path / "c")
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "c").iterdir()) == []


def test_a_cache_needs_a_fingerprint(tmp_path):
    pixels = image(1, 20, 20)
    with pytest.raises(ValueError, match=r"array has no fingerprint.*leave cache out, or pass .*fingerprint=…"):
        ats.read_view(from_arrays([pixels]), size=5, cache=tmp_path)
    source = from_arrays([pixels], fingerprint="mine, version 1")
    assert torch.equal(ats.read_view(source, size=5, cache=tmp_path), ats.read_view(source, size=5))
    np.save(tmp_path / "x.npy", pixels)
    mapped = from_arrays([np.load(tmp_path / "x.npy", mmap_mode="r")])
    other = from_arrays([np.load(tmp_path / "x.npy", mmap_mode="r")[:, ::-1]])
    assert torch.equal(ats.read_view(mapped, size=5, cache=tmp_path), ats.read_view(source, size=5))
    assert torch.equal(ats.read_view(other, size=5, cache=tmp_path), ats.read_view(source, size=5).flip(1))


def read_repeatedly(path, cache):
    return [ats.read_view(ats.open_image(path), size=16, cache=cache) for _ in range(10)]


def test_processes_and_threads_that_cache_one_view(tmp_path, monkeypatch):
    """All write the same file at once; each gets the whole view, and one file is left."""
    Image.fromarray(image(3, 60, 50).transpose(1, 2, 0)).save(tmp_path / "x.png")
    right = ats.read_view(ats.open_image(tmp_path / "x.png"), size=16)
    monkeypatch.setattr(view_cache, "_load", lambda *given: None)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        answers = pool.starmap_async(read_repeatedly, [(tmp_path / "x.png", tmp_path / "c")] * 3, chunksize=1)
        found = []
        threads = [
            threading.Thread(target=lambda: found.extend(read_repeatedly(tmp_path / "x.png", tmp_path / "c")))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found += [view for answer in answers.get(600) for view in answer]
    assert len(found) == 70
    assert all(torch.equal(view, right) for view in found)
    assert len(list((tmp_path / "c").iterdir())) == 1


@pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not WORLD.is_file() or sys.platform != "linux",
    reason="a raster of 648 megapixels, and Linux's peak of memory: set ATS_DATA",
)
def test_memory_of_a_view_of_a_large_raster():
    """36,000×18,000 pixels: from its full resolution, in a process that may not use 400 MB more than it has."""
    code = f"""
from pathlib import Path
import rasterio
import ats
def peak_so_far():  # of this process alone, in KB; rusage's would also count the one that started it
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
source = ats.open_image({str(WORLD)!r})
full = ats.sources.views._average
before = peak_so_far()
view = ats.read_view(source, size=(500, 1000))
overview = peak_so_far()
whole = full(source, 0, 300, 600)
peak = peak_so_far()
print((overview - before) // 1024, (peak - before) // 1024, float(view.mean()), float(whole.mean()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    overview, peak, view, whole = map(float, done.stdout.split())
    assert overview < 150
    assert peak < 250, "megabytes; the raster has 618"
    assert view == pytest.approx(whole, rel=0.02)
