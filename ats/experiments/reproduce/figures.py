"""The paper's figures from the tables' runs, and a sweep of the entropy weight of its own."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ats.datasets.megapixel_mnist import GLYPH
from ats.experiments.config import ExperimentConfig
from ats.experiments.data import ExperimentData, MegapixelMNISTData
from ats.experiments.evaluation import load_task
from ats.experiments.image_data import ImageData, experiment_data
from ats.experiments.localisation import attention_map
from ats.experiments.plotting.overlay import Attention, draw_comparison
from ats.experiments.plotting.plots import Panel, draw_curves, draw_lines, draw_maps
from ats.experiments.reproduce.curves import curve_of, entropies
from ats.experiments.reproduce.runs import Job, result_of, run_jobs
from ats.experiments.reproduce.tables import TABLE_1, Table
from ats.experiments.training import write_json

ENTROPY_WEIGHTS = (0.0, 0.001, 0.01, 0.1, 1.0)
_SHOWN = 3  # images of a comparison

Runs = dict[str, list[ExperimentConfig]]  # complete runs by method


def complete_runs(table: Table, preset: str, seeds: int, output: Path, data: Path | None) -> Runs:
    """The table's runs that are complete."""
    runs: Runs = {}
    for row in table.rows:
        configs = [table.config(row, preset, seed, output, data) for seed in range(seeds)]
        if done := [config for config in configs if result_of(config) is not None]:
            runs[row.name] = done
    return runs


def draw_figures(table: Table, runs: Runs, folder: Path) -> list[Path]:
    """All figures that the complete runs of a table allow; says which ones they do not.

    Args:
        table: of the runs.
        runs: by method.
        folder: where the pictures go.
    """
    console, written = Console(), []
    curves = {name: [points for config in configs if (points := curve_of(config))] for name, configs in runs.items()}
    curves = {name: found for name, found in curves.items() if found}
    data = experiment_data(next(iter(runs.values()))[0]) if runs else None
    path = folder / f"{table.name}-curves.png"
    if curves and data is not None:
        title = table.title if data.source == table.title else f"{table.title}: {data.source}"
        draw_curves(curves, path, title=title)
        write_json(path.with_suffix(".json"), {"source": data.source, "curves": curves})
        written += [path, path.with_suffix(".json")]
    else:
        console.print(f"{path.name}: not run, no complete run of {table.name}")
    sampled = {name: configs[0] for name, configs in runs.items() if configs[0].model.method == "ats"}
    if sampled:
        written.append(_over_training(table, next(iter(sampled.values())), folder))
    if len(sampled) > 1:
        written.append(_over_patches(table, sampled, folder))
    compared = [name for name in ("ATS-5", "ATS-10", "Deep MIL", "Gated Deep MIL") if name in runs]
    if isinstance(data, ImageData) and compared:
        written.append(_comparison(table, {name: runs[name][0] for name in compared}, folder))
    return written


def sweep_entropy(preset: str, output: Path, data: Path | None, folder: Path) -> list[Path]:
    """Train ATS-10 on colon cancer with other entropy weights, and show what becomes of the attention."""
    row = next(row for row in TABLE_1.rows if row.name == "ATS-10")
    base = TABLE_1.config(row, preset, 0, output, data)
    configs = {
        weight: dataclasses.replace(
            base,
            output=output / "entropy" / preset / f"weight-{weight:g}",
            optim=dataclasses.replace(base.optim, entropy_weight=weight),
        )
        for weight in ENTROPY_WEIGHTS
    }
    run_jobs([Job(f"entropy weight {weight:g}", config) for weight, config in configs.items()])
    loaded = experiment_data(base)
    curves = {weight: entropies(config.run_folder) for weight, config in configs.items()}
    path = folder / "entropy-curves.png"
    names = {"x": "step", "y": "entropy of the attention (nats)", "legend": "entropy weight"}
    lines = {f"{weight:g}": _as_float(curve) for weight, curve in curves.items()}
    draw_lines(lines, path, title=f"ATS-10: {loaded.source}", **names)
    rows = [_swept(weight, config, curves[weight]) for weight, config in configs.items()]
    write_json(path.with_suffix(".json"), {"source": loaded.source, "preset": preset, "seed": base.seed, "rows": rows})
    view, image, _ = loaded.load("test", torch.tensor([_first_positive(loaded)], device="cpu"))
    panels = [
        Panel(f"entropy weight {weight:g}", _map(config.run_folder, view, image)) for weight, config in configs.items()
    ]
    maps = folder / "entropy-maps.png"
    _draw_maps(image[0], panels, maps, "test image", loaded)
    return [path, path.with_suffix(".json"), maps]


def _swept(weight: float, config: ExperimentConfig, entropy: dict[int, float]) -> dict[str, Any]:
    """What became of a run with an entropy weight."""
    result = result_of(config)
    assert result is not None
    return {
        "entropy_weight": weight,
        "train_loss": result.training["metrics"]["train/loss"],
        "test_error": result.evaluation["error"],
        "attention": result.localisation,
        "entropy": entropy,
    }


def _over_training(table: Table, config: ExperimentConfig, folder: Path) -> Path:
    data = experiment_data(config)
    view, image, _ = data.load("test", torch.tensor([_first_positive(data)], device="cpu"))
    rows, columns = _region(data, image)
    snapshots = sorted((config.run_folder / "checkpoints").glob("step-*.ckpt"))
    panels = [
        Panel(f"step {int(path.stem[5:])}", _crop(_map(path, view, image), image, rows, columns)) for path in snapshots
    ]
    path = folder / f"{table.name}-over-training.png"
    title = f"test image, {config.model.label.upper()}"
    _draw_maps(image[0][:, rows, columns], panels, path, title, data)
    return path


def _draw_maps(image: Tensor, panels: list[Panel], path: Path, title: str, data: ExperimentData) -> None:
    targets = data.split("test").examples[_first_positive(data)].targets if isinstance(data, ImageData) else ()
    draw_maps(image, panels, path, title=title, source=data.source, targets=targets)


def _over_patches(table: Table, configs: dict[str, ExperimentConfig], folder: Path) -> Path:
    data = experiment_data(next(iter(configs.values())))
    view, image, _ = data.load("test", torch.tensor([_first_positive(data)], device="cpu"))
    rows, columns = _region(data, image)
    panels = [
        Panel(name, _crop(_map(config.run_folder, view, image), image, rows, columns))
        for name, config in configs.items()
    ]
    path = folder / f"{table.name}-over-patches.png"
    _draw_maps(image[0][:, rows, columns], panels, path, "test image", data)
    return path


def _comparison(table: Table, configs: dict[str, ExperimentConfig], folder: Path) -> Path:
    data = experiment_data(next(iter(configs.values())))
    assert isinstance(data, ImageData)
    test = data.split("test")
    chosen = [index for index, example in enumerate(test.examples) if example.targets][:_SHOWN]
    attention = {name: [_attention(config, index) for index in chosen] for name, config in configs.items()}
    path = folder / f"{table.name}-comparison.png"
    draw_comparison(
        [test.image(index) for index in chosen],
        [test.examples[index].targets for index in chosen],
        attention,
        path,
        labels=[test.classes[test.label(index)] for index in chosen],
        source=test.source,
    )
    return path


def _attention(config: ExperimentConfig, index: int) -> Attention:
    view, image, _ = experiment_data(config).load("test", torch.tensor([index], device="cpu"))
    weights, offsets, patch_size = attention_map(load_task(config.run_folder).model, view, image)
    return Attention(weights[0], offsets, patch_size)


def _map(checkpoint: Path, view: Tensor, image: Tensor) -> Tensor:
    """Attention (gh, gw) on the cells of one image."""
    weights, offsets, _ = attention_map(load_task(checkpoint).model, view, image)
    columns = int((offsets[:, 0] == offsets[0, 0]).sum())
    return weights[0].view(-1, columns)


def _region(data: ExperimentData, image: Tensor) -> tuple[slice, slice]:
    """What of an image to look at: of Megapixel MNIST half of a side, where most digits are; else everything."""
    height, width = image.shape[-2:]
    if not isinstance(data, MegapixelMNISTData):
        return slice(0, height), slice(0, width)
    images = data.split("test")
    digits = images.places[0, : images.n_digits].long()  # (D, 2) of the first image
    side = max(8 * GLYPH, height // 2)
    corners = (digits + GLYPH // 2 - side // 2).clamp(min=0, max=max(0, height - side))  # of regions around each digit
    inside = (digits >= corners[:, None]) & (digits + GLYPH <= corners[:, None] + side)  # (D, D, 2)
    top, left = corners[inside.all(-1).sum(-1).argmax()].tolist()
    return slice(top, min(top + side, height)), slice(left, min(left + side, width))


def _crop(attention: Tensor, image: Tensor, rows: slice, columns: slice) -> Tensor:
    """The cells of a region of the image."""
    parts = []
    for cells, size, part in zip(attention.shape, image.shape[-2:], (rows, columns), strict=True):
        first = part.start * cells // size
        parts.append(slice(first, max(first + 1, -(-part.stop * cells // size))))
    return attention[parts[0], parts[1]]


def _first_positive(data: ExperimentData) -> int:
    """The first test image with something to find: any of Megapixel MNIST, else one that is not of class 0."""
    if isinstance(data, MegapixelMNISTData):
        return 0
    return int(data.labels("test").nonzero()[0])


def _as_float(values: dict[int, float]) -> dict[float, float]:
    return {float(step): value for step, value in values.items()}
