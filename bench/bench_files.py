"""A training step on files of hundreds of megapixels, beside the same step on one megapixel in memory and in a file."""

import tempfile
from pathlib import Path

import pytest

pytest.importorskip("openslide", reason="openslide is not installed (extra slides)")
pytest.importorskip("rasterio", reason="rasterio is not installed (extra satellite)")
pytest.importorskip("tifffile", reason="tifffile is not installed")

from ats.experiments import cost
from bench import rehearsal
from bench.bench_tables import peaks
from bench.file_steps import LARGE, MEMORY, N_PATCHES, PATCH, RASTER, SLIDE, SMALL, data_raster, prepare, write_files
from bench.report import Group, Report

SECTION = "files"
CHANNELS = {SLIDE: 3, RASTER: 1}
SLOWER, MORE = 1.5, 50  # times, and megabytes, than a step on a megapixel in memory


@pytest.mark.parametrize("kind", [pytest.param(SLIDE, id="slide"), pytest.param(RASTER, id="raster")])
def bench_large_files(report: Report, pytestconfig: pytest.Config, kind: str) -> None:
    """Patches from the file, views from the cache: neither time nor memory grows with the image."""
    if report.device.type != "cpu" or rehearsal.active:
        pytest.skip("of a GPU's step reading is no part that depends on it")
    if kind == RASTER and data_raster() is None:
        pytest.skip("the raster is not here: set ATS_DATA to a folder that holds rasters/cog_world.tif")
    folder: Path = pytestconfig.getoption("--files") or Path(tempfile.gettempdir()) / "ats-bench-files"
    files, channels = write_files(folder), CHANNELS[kind]
    paths = {MEMORY: None, SMALL: files[kind, SMALL], LARGE: files[kind, LARGE]}
    group = Group("to find out what it takes")
    measures = {
        name: lambda path=path, name=name: cost.measure_rise(
            prepare, (path, channels, folder), warm=(files[kind, SMALL], channels, folder, 1), what=name
        )
        for name, path in paths.items()
    }
    peaks(report.device, measures, group)
    steps = {name: prepare(path, channels, folder, 1)() for name, path in paths.items()}
    timed = report.compare(
        f"A training step on {kind}: {N_PATCHES} patches of {PATCH}×{PATCH}, view cached",
        {name: lambda index, step=step: step() for name, step in steps.items()},
        seconds=20.0,
        per="sample",
        steps=True,
    )
    timed.memory, timed.not_run = group.memory, group.not_run
    timed.at_most(SLOWER, timed.ratio(LARGE, MEMORY), "time, over 1 megapixel in memory", headline=True)
    if {LARGE, MEMORY} <= timed.memory.keys():
        more = (timed.memory[LARGE] - timed.memory[MEMORY]) / 1e6
        timed.at_most(MORE, more, "memory, beyond 1 megapixel in memory", "MB", headline=True)
    timed.notes.append(
        "Memory is that of ten steps, with the model and what readers keep of a file, without the readers' code."
    )
