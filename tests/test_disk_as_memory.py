"""Draws, offsets, patches and views of images on disk are those of the same images in memory, wherever they are read.

In the parent, in workers by fork and spawn, and in eight threads: of written files of every kind, and of all real ones.
"""

import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import rasterio
import torch
from PIL import Image
from torch import nn

import ats
from ats.sources import from_arrays
from bench.written_slide import write_slide
from tests.helpers import seeded
from tests.written_images import written

N, PATCH, VIEW, DRAWS = 7, 24, (14, 12), 3
GRID = (12, 10)  # what is left of a view by an unpadded convolution of 3×3
DATA = Path(os.environ.get("ATS_DATA", ""))
REAL = {  # files, and another reader of them than ours
    "rasters/RGB.byte.tif": "rasterio",
    "rasters/boxes.tiff": "openslide",
    "rasters/boxes_dicom/boxes_0.dcm": "openslide",
    "rasters/boxes_dicom/boxes_1.dcm": "openslide",
    "rasters/cogeo.tif": "rasterio",
    "rasters/mosaic_cog1.tif": "rasterio",
    "rasters/sm_image.dcm": "openslide",
    "slides/CMU-1-Small-Region.svs": "openslide",
    "speed-limits/FullIJCNN2013/00000.jpg": "pillow",
    "colon-cancer/CRCHistoPhenotypes_2016_04_28/Classification/img1/img1.png": "pillow",
}
needs_files = pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not (DATA / "rasters").is_dir(),
    reason="real slides and rasters: set ATS_DATA to a folder that holds slides/ and rasters/",
)


def whole_levels(path, reader):
    """All levels (C, H, W) of a file, each read whole by its reader itself."""
    if reader == "pillow":
        return [np.asarray(Image.open(path)).transpose(2, 0, 1)]
    if reader == "openslide":
        with openslide.OpenSlide(path) as slide:
            sizes = slide.level_dimensions
            wholes = [np.asarray(slide.read_region((0, 0), level, size)) for level, size in enumerate(sizes)]
        return [whole[..., :3].transpose(2, 0, 1) for whole in wholes]
    with rasterio.open(path) as file:
        levels, overviews = [file.read()], len(file.overviews(1))
    for number in range(overviews):
        with rasterio.open(path, overview_level=number) as file:
            levels.append(file.read())
    return levels


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pairs of a file's path and its levels (C, H, W) in memory."""
    folder = tmp_path_factory.mktemp("written")
    found = [(path, [level.transpose(2, 0, 1) for level in levels]) for path, _, levels, _ in written(folder)]
    for name, compression in (("scan.tif", "jpeg"), ("deflated.tif", "deflate")):
        write_slide(folder / name, 1100, 1333, compression)  # the last tiles are cut, the sides no multiples of four
        found.append((folder / name, whole_levels(folder / name, "openslide")))
    return found


@pytest.fixture(scope="module")
def real_images():
    return [(DATA / name, whole_levels(DATA / name, reader)) for name, reader in REAL.items() if (DATA / name).exists()]


def make_model(channels):
    attention, feature = nn.Conv2d(channels, 1, 3), nn.Sequential(nn.Flatten(), nn.Linear(channels * PATCH**2, 5))
    with torch.no_grad():
        for weights in (*attention.parameters(), *feature.parameters()):  # torch's own stream is shared by threads
            weights.copy_(torch.randn(weights.shape, generator=seeded()) / weights.numel() ** 0.5)
    return ats.nn.AttentionSampling(attention, feature, N, PATCH, receptive_field=2).eval()


def sampled(source, image):
    """What comes of a source's view and of an image, which is the source or a tensor of its pixels, as arrays."""
    full = source.levels[0]
    view = ats.read_view(source, size=(min(VIEW[0], full.height), min(VIEW[1], full.width)))
    logits, model = torch.randn(*GRID, generator=seeded(1)), make_model(source.channels)
    boxes = [
        (i, level.height // 3, level.width // 4, min(64, level.height // 2), min(64, level.width // 2))
        for i, level in enumerate(source.levels)
    ]
    found = [view, *(source.read(*box) for box in boxes)]
    for seed in range(DRAWS):
        for padding, patch in (("zeros", PATCH), ("edge", (9, 31))):
            sample = ats.sample_patches([image], [logits], N, patch, padding=padding, generator=seeded(seed))
            found += [sample.indices, sample.offsets, sample.patches]
    scale = 1 if source.dtype == torch.uint8 else 1e-4  # networks of numbers around 1
    with torch.no_grad():
        pooled, attention, sample = model([view * scale], [image], generator=seeded(2))
    return [each.numpy() for each in (*found, sample.indices, sample.offsets, sample.patches, attention, pooled)]


def from_memory(levels):
    """The same of tensors, and of a view of arrays in memory."""
    return sampled(from_arrays(levels), torch.from_numpy(np.ascontiguousarray(levels[0])))


def in_worker(given):
    torch.set_num_threads(1)  # threads do not come along to a child
    return [sampled(source, source) for source in pickle.loads(given)]


def check(images):
    """Compare what comes from everywhere, image by image, with what comes from memory."""
    expected = [from_memory(levels) for _, levels in images]
    for answers in everywhere(images):
        for (path, _), wanted, answer in zip(images, expected, answers, strict=True):
            for right, got in zip(wanted, answer, strict=True):
                if right.dtype == np.int64:
                    np.testing.assert_array_equal(got, right, err_msg=path.name)
                else:
                    np.testing.assert_allclose(got, right, rtol=1e-6, atol=1e-6, err_msg=path.name)


def everywhere(images):
    """From the parent, from eight threads, from a forked child whose parent has files open, and from a spawned one."""
    sources = [ats.open_image(path) for path, _ in images]
    given = pickle.dumps(sources)
    yield [sampled(source, source) for source in sources]
    with ThreadPoolExecutor(8) as pool:
        turns = [pool.submit(sampled, source, source) for source in sources * 2]
        answers = [turn.result() for turn in turns]
    yield answers[: len(sources)]
    yield answers[len(sources) :]
    for method in ("fork", "spawn") if sys.platform != "win32" else ("spawn",):
        with multiprocessing.get_context(method).Pool(1) as pool:
            yield pool.apply(in_worker, [given])


def test_written_files(images):
    check(images)


def test_a_written_slide_is_a_pyramid_of_means(images):
    """Of tiles that differ, in colours and in places, and of no more of them than are seen."""
    for path, levels in images:
        if path.name in ("scan.tif", "deflated.tif"):
            full, small = levels
            whole = torch.from_numpy(np.ascontiguousarray(full[:, : 4 * small.shape[1], : 4 * small.shape[2]]))
            mean = ats.area_downsample(whole[None], small.shape[1:])[0] * 255
            difference = (mean - torch.from_numpy(np.ascontiguousarray(small))).abs()
            assert difference.mean() < (5 if path.name == "scan.tif" else 0.5), "JPEG's, and rounding"
            tiles = whole[:, :1024, :1024].float().unfold(1, 256, 256).unfold(2, 256, 256).mean((3, 4))
            assert tiles.flatten(1).std(1).min() > 5


@needs_files
def test_real_files(real_images):
    check(real_images)


@needs_files
def test_a_raster_of_648_megapixels():
    """In memory it is zeros, which take no memory until they are written, but for the pixels that the patches show."""
    path = DATA / "rasters" / "cog_world.tif"
    source = ats.open_image(path)
    whole = torch.zeros(1, source.levels[0].height, source.levels[0].width, dtype=torch.uint8)
    logits = torch.randn(180, 360, generator=seeded(1))
    found = ats.sample_patches([source], [logits], N, 100, generator=seeded(2))
    with rasterio.open(path) as file:
        for top, left in found.offsets[0].tolist():
            window = (top, top + 100), (left, left + 100)
            whole[:, top : top + 100, left : left + 100] = torch.from_numpy(file.read(window=window))
    expected = ats.sample_patches(whole[None], logits[None], N, 100, generator=seeded(2))
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.offsets, expected.offsets)
    torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=1e-6)
    assert 0 < found.patches.mean() < 1, "land and sea"
