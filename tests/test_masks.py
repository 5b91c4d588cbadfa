"""`ats.tissue_mask` and `ats.mask_cells`: which cells attention may look at."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ats
from ats.sources import from_arrays, mask_cells, tissue_mask

DATA = Path(os.environ.get("ATS_DATA", ""))
SLIDE = DATA / "slides" / "CMU-1-Small-Region.svs"


def test_tissue_is_what_is_coloured():
    """Pink on white with grey dirt: the pink is tissue, whatever its brightness."""
    view = torch.full((3, 40, 50), 0.95) + torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0)) * 0.02
    view[:, 10:20, 15:30] = torch.tensor([0.8, 0.4, 0.6])[:, None, None]
    view[:, 30:33, 15:30] = torch.tensor([0.3, 0.1, 0.2])[:, None, None]
    view[:, 2:4, 5:9] = 0.2  # dirt
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[10:20, 15:30] = expected[30:33, 15:30] = True
    assert torch.equal(tissue_mask(view), expected)
    assert torch.equal(tissue_mask((view * 255).round().to(torch.uint8)), expected)


def test_otsus_threshold_is_the_best_of_all():
    """By trying every threshold on the definition: the one with the least variance within its two classes."""
    random = np.random.default_rng(1)
    saturation = np.concatenate([random.beta(2, 9, 3000), random.beta(8, 4, 900)])
    view = torch.from_numpy(np.stack([np.ones_like(saturation), 1 - saturation, 1 - saturation]))[:, None]
    bins = np.round(saturation * 255)
    within = {
        t: sum(part.size * part.var() for part in (bins[bins <= t], bins[bins > t]))
        for t in range(int(bins.min()), int(bins.max()))
    }
    best = min(within, key=lambda threshold: within[threshold])
    assert torch.equal(tissue_mask(view)[0], torch.from_numpy(bins > best))


def test_a_view_without_colour_has_no_tissue():
    for view in (torch.ones(3, 4, 5), torch.zeros(3, 4, 5), torch.rand(1, 4, 5).expand(3, 4, 5)):
        assert not tissue_mask(view).any()


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (torch.zeros(1, 4, 4), r"view must be \(3, h, w\), red, green, blue, got \(1, 4, 4\)"),
        (
            torch.full((3, 4, 4), 200.0),
            "must hold values from 0 to 1, before mean and std are taken off, got 200 to 200",
        ),
        (torch.full((3, 4, 4), float("nan")), "must hold values from 0 to 1"),
    ],
)
def test_what_is_no_view(view, message):
    with pytest.raises(ValueError, match=message):
        tissue_mask(view)


@pytest.mark.skipif("ATS_DATA" not in os.environ or not SLIDE.is_file(), reason="a real slide: set ATS_DATA")
def test_a_real_slide():
    """The slide's upper right is glass; most of the rest is tissue."""
    view = ats.read_view(ats.open_image(SLIDE), scale=1 / 16)
    mask = tissue_mask(view)
    assert 0.2 < mask.float().mean() < 0.8
    assert view.mean(0)[mask].mean() < view.mean(0)[~mask].mean() - 0.1
    cells = mask_cells(mask, (12, 9), ats.open_image(SLIDE))
    assert 0.2 < cells.float().mean() <= 1


def test_a_cell_lives_where_the_mask_touches_it():
    mask = np.zeros((8, 12), bool)
    mask[3, 4] = True
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1, 2] = True
    for given in (mask, torch.from_numpy(mask), mask.astype(np.uint8)[None], mask.astype(np.float32)):
        assert torch.equal(mask_cells(given, (4, 6), (80, 120)), expected)
    assert torch.equal(mask_cells(mask, (4, 6), from_arrays([np.zeros((80, 120), np.uint8)])), expected)


def test_the_share_of_a_cell_that_is_covered():
    """A mask of another resolution than the grid: areas are exact."""
    mask = torch.zeros(10, 10)
    mask[:, :4] = 1  # of cells 10/3 wide: the first whole, of the second two thirds of a pixel
    for least, columns in ((0, 2), (0.19, 2), (0.21, 1), (0.99, 1)):
        expected = torch.zeros(3, 3, dtype=torch.bool)
        expected[:, :columns] = True
        assert torch.equal(mask_cells(mask, (3, 3), (100, 100), least=least), expected)


def test_cells_lie_where_the_network_puts_them():
    """An unpadded network loses a margin, so its cells do not begin at the image's edge."""
    mask = torch.zeros(40, 40)
    mask[4, 4] = 1  # within the margin of 10/2 view pixels, a pixel each
    mask[5, 34] = 1
    cells = mask_cells(mask, (3, 3), (400, 400), view_size=(40, 40), receptive_field=10)
    assert cells.tolist() == [[False, False, True], [False] * 3, [False] * 3]
    padded = ats.Placement.padded(8)  # cells centred on view pixels 0.5, 8.5, …; the mask's is in the fifth
    mask = torch.zeros(40, 40)
    mask[0, 35] = 1
    cells = mask_cells(mask, (5, 5), (400, 400), view_size=(40, 40), receptive_field=padded)
    assert cells.nonzero().tolist() == [[0, 4]]
    with pytest.raises(ValueError, match="receptive_field=10 is in pixels of the view"):
        mask_cells(mask, (3, 3), (400, 400), receptive_field=10)


def test_a_mask_from_an_image_file(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[:5, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cells = mask_cells(tmp_path / "mask.png", (4, 3), (2000, 3000))
    assert cells.tolist() == [[False, False, True], *[[False] * 3] * 3]


def square(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(kind, coordinates):
    return {
        "type": "Feature",
        "properties": {"objectType": "annotation"},
        "geometry": {"type": kind, "coordinates": coordinates},
    }


def brute(polygons, grid, size, subsamples=8):
    """Even-odd at each subsample, one point and edge at a time."""
    cells = torch.zeros(*grid)
    for row in range(grid[0] * subsamples):
        for column in range(grid[1] * subsamples):
            y = (row + 0.5) * size[0] / grid[0] / subsamples
            x = (column + 0.5) * size[1] / grid[1] / subsamples
            hit = False
            for rings in polygons:
                odd = False
                for ring in rings:
                    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
                        if (y0 > y) != (y1 > y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                            odd = not odd
                hit = hit or odd
            cells[row // subsamples, column // subsamples] += hit / subsamples**2
    return cells


@pytest.mark.parametrize("packed", [False, True])
def test_polygons(packed, tmp_path):
    """As QuPath exports them: holes, several parts, collections, open rings; (x, y) in pixels of level 0."""
    polygons = [
        [square(10, 20, 60, 90), square(20, 30, 50, 60)],
        [[[70.5, 5], [99, 40.25], [64, 33]]],
        [square(80, 60, 95, 95)],
    ]
    content = {
        "type": "FeatureCollection",
        "features": [feature("Polygon", polygons[0]), feature("MultiPolygon", polygons[1:])],
    }
    data = json.dumps(content).encode()
    path = tmp_path / ("mask.geojson.gz" if packed else "mask.geojson")
    path.write_bytes(gzip.compress(data) if packed else data)
    covered = brute(polygons, (7, 9), (100, 100))
    for least in (0.0, 0.3, 0.7):
        expected: Tensor = covered > least + 1e-6
        assert torch.equal(mask_cells(path, (7, 9), (100, 100), least=least), expected)
    single = tmp_path / "single.json"
    last = feature("Polygon", polygons[2])
    for other in ([last], {"type": "GeometryCollection", "geometries": [last["geometry"]]}):
        single.write_text(json.dumps(other))
        assert mask_cells(single, (10, 10), (100, 100)).nonzero().amin(0).tolist() == [6, 8]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"type": "Feature"}', '{"type": "Point", "coordinates": [1, 2]}', "[]", "[" * 100_000,
     '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}', '{"type": "Polygon", "coordinates": [[["a", "b"]]]}',
     '{"type": "Polygon", "coordinates": [[[1, 2], [3, 1e999], [5, 6]]]}'],
)  # fmt: skip
def test_what_is_no_polygon(text, tmp_path):
    (tmp_path / "x.geojson").write_text(text)
    with pytest.raises(ValueError, match=r"x\.geojson (is damaged or no GeoJSON of polygons|holds no polygons)"):
        mask_cells(tmp_path / "x.geojson", (4, 4), (100, 100))


def test_masks_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"the mask is 20×30, whose shape is not that of the image, 3000×2000"):
        mask_cells(np.ones((20, 30)), (4, 4), (3000, 2000))
    assert mask_cells(np.ones((20, 30)), (4, 4), (1990, 3010)).all(), "a mask's sides are rounded"
    with pytest.raises(ValueError, match=r"leaves none of 4×4 cells"):
        mask_cells(np.zeros((20, 30)), (4, 4), (2000, 3000))
    with pytest.raises(ValueError, match=r"a mask must be \(h, w\), got \(3, 20, 30\)"):
        mask_cells(np.ones((3, 20, 30)), (4, 4), (2000, 3000))
    for name in ("gone.png", "gone.geojson"):
        with pytest.raises(FileNotFoundError, match=name):
            mask_cells(tmp_path / name, (4, 4), (100, 100))
    with pytest.raises(ValueError, match="least must be a share"):
        mask_cells(np.ones((20, 30)), (4, 4), (2000, 3000), least=1)


def test_masked_cells_are_never_drawn():
    logits = torch.zeros(1, 6, 6)
    cells = mask_cells(np.eye(6), (6, 6), (60, 60))
    sample = ats.sample_patches(torch.rand(1, 3, 60, 60), logits.masked_fill(~cells, -torch.inf), 6, 8)
    assert sorted(sample.indices[0].tolist()) == [0, 7, 14, 21, 28, 35]


@pytest.mark.parametrize("name", ["mask.png", "mask.geojson"])
def test_a_mask_that_is_not_there(name, tmp_path):
    image = from_arrays([torch.zeros(3, 40, 50, dtype=torch.uint8)])
    with pytest.raises(FileNotFoundError, match=rf"there is no mask .*{name}; name an image file, or GeoJSON"):
        mask_cells(tmp_path / name, (4, 5), image)
