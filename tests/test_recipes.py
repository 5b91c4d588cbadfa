"""The recipes of docs/files.md for OME-Zarr and for TIFF through tifffile, as printed there."""

import multiprocessing
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ats
from tests.written_images import assert_exact, boxes_of, pyramid, write_tiff

zarr = pytest.importorskip("zarr", reason="zarr is not installed, which has no release for this Python")

PAGE = (Path(__file__).parent.parent / "docs" / "files.md").read_text()
SECTION = PAGE.partition("## OME-Zarr")[2].partition("\n## ")[0]
OME_ZARR, TIFF = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


def write_ome_zarr(folder: Path, levels: list[np.ndarray], version: str, axes: str) -> None:
    """A group of levels (H, W, C), with axes before and among these, of which the wanted time and depth is 0."""
    group = zarr.open_group(folder, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for number, level in enumerate(levels):
        whole = level.transpose(2, 0, 1)
        for place, axis in enumerate(axes):
            if axis in "tz":
                whole = np.stack([whole, ~whole], place)  # another plane, which must not show
        array = group.create_array(
            str(number), shape=whole.shape, dtype=whole.dtype, chunks=(*whole.shape[:-2], 32, 32)
        )
        array[:] = whole
        scale = [1.0] * (len(axes) - 2) + [0.5 * 2**number, 0.25 * 2**number]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    described = {"multiscales": [{"axes": [{"name": axis} for axis in axes], "datasets": datasets}]}
    group.attrs.update({"ome": described | {"version": "0.5"}} if version == "0.5" else described)


@pytest.mark.parametrize(("version", "axes"), [("0.4", "cyx"), ("0.5", "tczyx")])
def test_ome_zarr(version: str, axes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    levels = pyramid(120, 90, 3, dtype=np.uint16)
    write_ome_zarr(tmp_path / "cells.ome.zarr", levels, version, axes)
    names = {"ats": ats}
    exec(OME_ZARR, names)
    source = names["cells"]
    assert source.mpp == (0.5, 0.25)
    boxes = list(boxes_of(source))
    assert_exact(boxes, ats.sources.read_boxes(boxes, threads=4), levels)
    view = ats.read_view(source, size=16, cache=tmp_path / "views")
    expected = ats.area_downsample(torch.from_numpy(levels[2].transpose(2, 0, 1).astype(np.float32))[None], 16)[0]
    torch.testing.assert_close(view, expected)


def read_all(given: bytes) -> list[np.ndarray]:
    return [box.source.read(*box[1:]).numpy() for box in pickle.loads(given)]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_tiff_through_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a child that is forked while the parent has it open, and pickled by its path."""
    import tifffile

    monkeypatch.chdir(tmp_path)
    levels = pyramid(200, 170, 2)
    with tifffile.TiffWriter("scan.tif") as file:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "zlib"}
        file.write(levels[0], subifds=1, **options)
        file.write(levels[1], subfiletype=1, **options)
    names = {"ats": ats, "zarr": zarr, "__name__": __name__}
    exec(TIFF, names)
    monkeypatch.setattr(sys.modules[__name__], "TiffLevel", names["TiffLevel"], raising=False)  # where pickle looks
    source = names["scan"]
    boxes = list(boxes_of(source))
    assert_exact(boxes, ats.sources.read_boxes(boxes, threads=4), levels)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for answer in pool.map(read_all, [pickle.dumps(boxes)] * 2, chunksize=1):
            assert_exact(boxes, map(torch.from_numpy, answer), levels)
    write_tiff("plain.tif", levels[:1], photometric="rgb")
    plain = ats.sources.from_arrays(tifffile.memmap("plain.tif", mode="r"), channels_last=True)
    boxes = list(boxes_of(pickle.loads(pickle.dumps(plain))))
    assert_exact(boxes, ats.sources.read_boxes(boxes, threads=2), levels)
