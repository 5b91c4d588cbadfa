"""`ats.sources` on real slides and rasters, and the examples of docs/files.md."""

import os
import re
from pathlib import Path

import numpy as np
import openslide
import pytest
import rasterio
import torch

import ats
from ats.sources import Level
from ats.sources.views import coarsest_level
from tests.written_images import boxes_of, pixels

DATA = Path(os.environ.get("ATS_DATA", ""))
needs_files = pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not (DATA / "slides").is_dir(),
    reason="real slides and rasters: set ATS_DATA to a folder that holds slides/ and rasters/",
)


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
    text = (Path(__file__).parent.parent / "docs" / "files.md").read_text()
    opening = text[: text.index("## OME-Zarr")]  # what follows needs models or zarr, and has tests of its own
    examples = re.findall(r"```python\n(.*?)```", opening, flags=re.DOTALL)
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
