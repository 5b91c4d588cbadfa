"""Training steps on images on disk: the view comes from the cache, patches from the file."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ats
from ats.experiments.cost import Step
from ats.models.images import attention_network, feature_network
from bench.written_slide import write_slide

N_PATCHES, PATCH, VIEW = 10, 224, (256, 256)
STEPS = 10  # in which what readers keep of a file fills up
MEGAPIXEL = 1000

MEMORY, SMALL, LARGE = "1 megapixel in memory", "1 megapixel in a file", "the large file"
SLIDE, RASTER = "a slide of 30,000×30,000 pixels, JPEG", "a raster of 36,000×18,000 pixels"
SIDE = 30_000


def data_raster() -> Path | None:
    """The raster that is read, if it is there."""
    path = Path(os.environ.get("ATS_DATA", "")) / "rasters" / "cog_world.tif"
    return path if "ATS_DATA" in os.environ and path.is_file() else None


def write_files(folder: Path, side: int = SIDE) -> dict[tuple[str, str], Path]:
    """The files by kind and size, in a folder that keeps the written ones, and their views in its cache."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for size, pixels in ((SMALL, MEGAPIXEL), (LARGE, side)):
        found[SLIDE, size] = folder / f"{pixels}.tif"
        if not found[SLIDE, size].exists():
            write_slide(found[SLIDE, size], pixels, pixels)
    raster = data_raster()
    if raster is not None:
        found[RASTER, LARGE], found[RASTER, SMALL] = raster, folder / "raster.tif"
        if not found[RASTER, SMALL].exists():
            _write_part(raster, found[RASTER, SMALL])
    for path in found.values():
        ats.read_view(ats.open_image(path), size=VIEW, cache=folder / "views")
    return found


def _write_part(raster: Path, path: Path) -> None:
    """A megapixel amid a raster, with tiles as its own, whole or not at all."""
    import rasterio

    with rasterio.open(raster) as file:
        top, left = file.height // 4, file.width // 2
        pixels = file.read(window=((top, top + MEGAPIXEL), (left, left + MEGAPIXEL)))
        profile = file.profile | {"height": MEGAPIXEL, "width": MEGAPIXEL}
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        with rasterio.open(Path(place) / path.name, "w", **profile) as file:
            file.write(pixels)
        os.replace(Path(place) / path.name, path)


def prepare(path: Path | None, channels: int, folder: Path, steps: int = STEPS) -> Callable[[], Step]:
    """What makes a function of some steps on a file, or without one on a megapixel in memory.

    Model, handles and what readers keep count; the image in memory does too.
    """

    def make() -> Step:
        torch.manual_seed(0)
        attention = nn.Sequential(attention_network(channels), nn.AvgPool2d(4))  # 32×32 cells
        model = ats.nn.AttentionSampling(attention, feature_network(channels), N_PATCHES, PATCH, receptive_field="auto")
        shape = channels, MEGAPIXEL, MEGAPIXEL
        image = torch.randint(256, shape, dtype=torch.uint8, device="cpu") if path is None else None
        view = torch.rand(channels, *VIEW, device="cpu")

        def step() -> None:
            seen, source = (view, image) if path is None else _opened(path, folder)
            pooled, _, sample = model([seen], [source])
            model.zero_grad(set_to_none=True)
            (pooled.square().sum() - 0.01 * sample.entropy.mean()).backward()

        def several() -> None:
            for _ in range(steps):
                step()

        return several

    return make


def _opened(path: Path, folder: Path) -> tuple[Tensor, ats.ImageSource]:
    source = ats.open_image(path)
    return ats.read_view(source, size=VIEW, cache=folder / "views"), source
