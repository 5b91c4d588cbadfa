"""What other programs open: GeoJSON by QuPath's rules, and OME-TIFF as tifffile reads it back."""

import gzip
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

import ats
from ats.export import geojson, heatmap_tiff
from tests.helpers import seeded
from tests.qupath import check_qupath

HEIGHT, WIDTH = 80, 100


def source() -> ats.ImageSource:
    return ats.sources.from_arrays([np.zeros((3, HEIGHT, WIDTH), np.uint8)], mpp=(0.5, 0.25), name="slide")


def drawn(n: int = 6) -> ats.PatchSample:
    logits = torch.randn(1, 8, 10, generator=seeded())
    return ats.sample_patches(torch.zeros(1, 3, HEIGHT, WIDTH), logits, n, 24, generator=seeded(1))


@pytest.mark.parametrize("name", ["patches.geojson", "patches.json", "patches.geojson.gz"])
def test_geojson_is_what_qupath_parses(tmp_path: Path, name: str) -> None:
    sample = drawn()
    geojson(tmp_path / name, source(), sample, origin=(3, 5))
    data = (tmp_path / name).read_bytes()
    features = check_qupath(gzip.decompress(data) if name.endswith(".gz") else data)
    table = sample.table()
    assert len(features) == len(table)
    for feature, row in zip(features, table, strict=True):
        ring = torch.tensor(feature["geometry"]["coordinates"][0])
        (left, top), (right, bottom) = ring.amin(0).tolist(), ring.amax(0).tolist()
        assert (top, left) == (max(0, row["top"]) - 3, max(0, row["left"]) - 5)
        assert (bottom, right) == (min(HEIGHT, row["top"] + 24) - 3, min(WIDTH, row["left"] + 24) - 5)
        assert feature["properties"]["measurements"]["weight"] == pytest.approx(row["weight"])
    heaviest = max(features, key=lambda feature: feature["properties"]["measurements"]["weight"])
    assert heaviest["properties"]["classification"]["color"] == [253, 231, 37]


def test_geojson_masks_what_it_shows(tmp_path: Path) -> None:
    """Read back as a mask: the cells whose patches were drawn live, by the reader that is tested elsewhere."""
    sample = drawn(2)
    geojson(tmp_path / "x.geojson", source(), sample)
    cells = ats.mask_cells(tmp_path / "x.geojson", (HEIGHT, WIDTH), (HEIGHT, WIDTH))
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    for top, left in sample.offsets[0].tolist():
        expected[max(0, top) : top + 24, max(0, left) : left + 24] = True
    assert torch.equal(cells, expected)


def test_a_heatmap_comes_back_with_its_levels_and_its_micrometres(tmp_path: Path) -> None:
    logits = torch.randn(1, 200, 300, generator=seeded())
    slide = ats.sources.from_arrays([np.zeros((3, 2000, 3000), np.uint8)], mpp=(0.5, 0.25), name="slide")
    heatmap_tiff(tmp_path / "heat.ome.tiff", slide, logits)
    with tifffile.TiffFile(tmp_path / "heat.ome.tiff") as file:
        assert file.is_ome
        (series,) = file.series
        assert [level.shape for level in series.levels] == [(800, 1200), (400, 600), (200, 300), (100, 150)]
        assert series.pages[0].is_tiled
        pixels = ET.fromstring(file.ome_metadata).find(".//{*}Pixels")
        found = [level.asarray() for level in series.levels]
    assert pixels is not None
    assert float(pixels.attrib["PhysicalSizeY"]) == pytest.approx(0.5 * 2000 / 800)
    assert float(pixels.attrib["PhysicalSizeX"]) == pytest.approx(0.25 * 3000 / 1200)
    assert pixels.attrib["PhysicalSizeXUnit"] == "µm"
    expected = ats.heatmap(logits, (2000, 3000), size=(800, 1200))[0] * 800 * 1200
    np.testing.assert_allclose(found[0], expected.float().numpy(), rtol=1e-6)
    assert found[0].mean() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(found[1], found[0].reshape(400, 2, 600, 2).mean((1, 3)), rtol=1e-5)


def test_nothing_is_overwritten_and_endings_are_checked(tmp_path: Path) -> None:
    sample, logits = drawn(), torch.zeros(1, 4, 4)
    for write, name in ((geojson, "x.geojson"), (heatmap_tiff, "x.tif")):
        what: Any = sample if write is geojson else logits
        write(tmp_path / name, source(), what)
        with pytest.raises(FileExistsError, match="is there already"):
            write(tmp_path / name, source(), what)
        write(tmp_path / name, source(), what, overwrite=True)
        with pytest.raises(ValueError, match="must end with one of"):
            write(tmp_path / "x.txt", source(), what)
    with pytest.raises(ValueError, match="logits must be of one image"):
        heatmap_tiff(tmp_path / "y.tif", source(), torch.zeros(2, 4, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.geojson", "x.tif"]


def test_without_tifffile_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torch-ats\[slides\]'"):
        heatmap_tiff(tmp_path / "x.tif", source(), torch.zeros(1, 4, 4))
