"""The paper's figures from the tables' runs, and a sweep of the entropy weight of its own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ats._files import write_json
from ats.experiments.config import ExperimentConfig
from ats.experiments.console import plain_console
from ats.experiments.experiment import ExperimentData
from ats.experiments.localisation import attention_map
from ats.experiments.plotting.overlay import Attention, best_patches, draw_comparison, grid_of
from ats.experiments.plotting.plots import Panel, draw_curves, draw_lines, draw_maps
from ats.experiments.registry import experiment_data
from ats.experiments.reproduce.curves import curve_of, entropies
from ats.experiments.reproduce.runs import Job, result_of, run_jobs
from ats.experiments.tables import Table
from ats.experiments.trained import TrainedModel, load

ENTROPY_WEIGHTS = (0.0, 0.001, 0.01, 0.1, 1.0)
_SHOWN = 3  # images of a comparison
_COMPARED: tuple[str, ...] = ("ATS-5", "ATS-10", "Deep MIL", "Gated Deep MIL")

Runs = dict[str, list[ExperimentConfig]]  # complete runs by method


def complete_runs(configs: Mapping[tuple[str, int], ExperimentConfig]) -> Runs:
    """Those of a table's runs, by method and seed, that are complete."""
    runs: Runs = {}
    for (name, _), config in configs.items():
        if result_of(config) is not None:
            runs.setdefault(name, []).append(config)
    return runs


def draw_figures(table: Table, runs: Runs, folder: Path) -> list[Path]:
    """All figures that the complete runs of a table allow; says which ones they do not.

    Args:
        table: of the runs.
        runs: by method.
        folder: where the pictures go.
    """
    console, written = plain_console(), []
    curves = {name: [points for config in configs if (points := curve_of(config))] for name, configs in runs.items()}
    curves = {name: found for name, found in curves.items() if found}
    first = next(iter(runs.values()))[0] if runs else None
    data = None if first is None else experiment_data(first)
    path = folder / f"{table.name}-curves.png"
    if curves and data is not None:
        title = table.title if data.source == table.title else f"{table.title}: {data.source}"
        draw_curves(curves, path, title=title)
        write_json(path.with_suffix(".json"), {"source": data.source, "curves": curves})
        written += [path, path.with_suffix(".json")]
    else:
        console.print(f"{path.name}: not run, no complete run of {table.name}")
    if first is None or data is None:
        return written
    # Of one seed: another may have trained on what this one tests on.
    same = {name: config for name, configs in runs.items() for config in configs if config.seed == first.seed}
    sampled = {name: config for name, config in same.items() if config.model.method == "ats"}
    if sampled:
        written.append(_over_training(table, next(iter(sampled.values())), data, folder))
    if len(sampled) > 1:
        written.append(_over_patches(table, sampled, data, folder))
    compared = {name: same[name] for name in _COMPARED if name in same}
    if data.knows_targets and compared:
        written.append(_comparison(table, compared, data, folder))
    return written


def sweep_entropy(base: ExperimentConfig, output: Path, folder: Path) -> list[Path]:
    """Train a run of a table with other entropy weights, and show what becomes of the attention."""
    kind = base.run_folder.parent.name
    configs = {
        weight: dataclasses.replace(
            base,
            output=output / "entropy" / kind / f"weight-{weight:g}",
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
    draw_lines(lines, path, title=f"{base.model.label.upper()}: {loaded.source}", **names)
    rows = [_sweep_row(weight, config, curves[weight]) for weight, config in configs.items()]
    write_json(
        path.with_suffix(".json"), {"source": loaded.source, "preset": base.preset, "seed": base.seed, "rows": rows}
    )
    image = _shown_image(loaded)
    everything = slice(0, image.shape[2]), slice(0, image.shape[3])
    panels = [
        _panel(f"entropy weight {weight:g}", config.run_folder, image, *everything)
        for weight, config in configs.items()
    ]
    maps = folder / "entropy-maps.png"
    _draw_maps(image[0], panels, maps, "test image", loaded)
    return [path, path.with_suffix(".json"), maps]


def _sweep_row(weight: float, config: ExperimentConfig, entropy: dict[int, float]) -> dict[str, Any]:
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


def _over_training(table: Table, config: ExperimentConfig, data: ExperimentData, folder: Path) -> Path:
    image = _shown_image(data)
    rows, columns = data.shown_region((image.shape[2], image.shape[3]))
    snapshots = sorted((config.run_folder / "checkpoints").glob("step-*.ckpt"))
    panels = [_panel(f"step {int(path.stem[5:])}", path, image, rows, columns) for path in snapshots]
    path = folder / f"{table.name}-over-training.png"
    title = f"test image, {config.model.label.upper()}"
    _draw_maps(image[0][:, rows, columns], panels, path, title, data)
    return path


def _over_patches(table: Table, configs: dict[str, ExperimentConfig], data: ExperimentData, folder: Path) -> Path:
    image = _shown_image(data)
    rows, columns = data.shown_region((image.shape[2], image.shape[3]))
    panels = [_panel(name, config.run_folder, image, rows, columns) for name, config in configs.items()]
    path = folder / f"{table.name}-over-patches.png"
    _draw_maps(image[0][:, rows, columns], panels, path, "test image", data)
    return path


def _draw_maps(image: Tensor, panels: list[Panel], path: Path, title: str, data: ExperimentData) -> None:
    draw_maps(image, panels, path, title=title, source=data.source, targets=data.targets(data.shown_image()))


def _comparison(table: Table, configs: dict[str, ExperimentConfig], data: ExperimentData, folder: Path) -> Path:
    chosen = [index for index in range(len(data.labels("test"))) if data.targets(index)][:_SHOWN]
    images, labels = data.examples("test", torch.tensor(chosen, device="cpu"))
    attention: dict[str, list[Attention]] = {}
    for name, config in configs.items():
        trained = load(config.run_folder)
        attention[name] = [_attention(trained, image.unsqueeze(0)) for image in images]
    path = folder / f"{table.name}-comparison.png"
    draw_comparison(
        list(images),
        [data.targets(index) for index in chosen],
        attention,
        path,
        labels=[data.classes[label] for label in labels.tolist()],
        source=data.source,
    )
    return path


def _shown_image(data: ExperimentData) -> Tensor:
    """The image (1, C, H, W) that figures show."""
    return data.examples("test", torch.tensor([data.shown_image()], device="cpu"))[0]


def _attention(trained: TrainedModel, image: Tensor) -> Attention:
    weights, offsets, patch_size = attention_map(trained.model, trained.view(image), image)
    return Attention(weights[0], offsets, patch_size)


def _panel(title: str, checkpoint: Path, image: Tensor, rows: slice, columns: slice) -> Panel:
    """Attention on the cells of a region of one image, and the patches of most attention whose middles lie in it."""
    attention = _attention(load(checkpoint), image)
    weights, offsets = attention.weights.cpu(), attention.offsets.cpu()
    middles = offsets + torch.tensor(attention.patch_size, device="cpu") / 2
    first, last = torch.tensor([[rows.start, columns.start], [rows.stop, columns.stop]], device="cpu")
    within = ((middles >= first) & (middles < last)).all(-1)
    best = best_patches(image[0], Attention(weights * within, offsets, attention.patch_size))
    corner = rows.start, columns.start
    best = [seen._replace(corner=(seen.corner[0] - corner[0], seen.corner[1] - corner[1])) for seen in best]
    return Panel(title, _crop(weights.view(grid_of(offsets)), image, rows, columns), best)


def _crop(attention: Tensor, image: Tensor, rows: slice, columns: slice) -> Tensor:
    """The cells of a region of the image."""
    parts = []
    for cells, size, part in zip(attention.shape, image.shape[-2:], (rows, columns), strict=True):
        first = part.start * cells // size
        parts.append(slice(first, max(first + 1, -(-part.stop * cells // size))))
    return attention[parts[0], parts[1]]


def _as_float(values: dict[int, float]) -> dict[float, float]:
    return {float(step): value for step, value in values.items()}
