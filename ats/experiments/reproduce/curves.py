"""Loss and test error over a training, from the snapshots that it kept."""

import csv
from pathlib import Path
from typing import Any

import torch

from ats._files import read_object, write_json
from ats.experiments.checkpoints import read_checkpoint
from ats.experiments.config import ExperimentConfig
from ats.experiments.evaluation import evaluate, held_out_data
from ats.experiments.experiment import ExperimentData
from ats.experiments.reproduce.runs import read_json
from ats.experiments.trained import load

IMAGES = 500
"""Test images that a point of a curve is an error on, at most."""


def curve_of(config: ExperimentConfig) -> list[dict[str, Any]]:
    """Points (step, seconds, train_loss, test_error) of a complete run, in order; computed once, into curve.json.

    Seconds are those of training alone. The loss is of the epoch before the point. Nothing is chosen by any of it.
    """
    folder = config.run_folder
    if (known := read_json(folder / "curve.json")) is not None:
        return known["points"]
    losses = _losses(folder)
    points: list[dict[str, Any]] = []
    data: ExperimentData | None = None
    images = min(IMAGES, read_object(folder / "training.json", "test_images")["test_images"])
    for path in sorted((folder / "checkpoints").glob("step-*.ckpt")):
        content = read_checkpoint(path)
        step = int(content["global_step"])
        trained = load(path, device="cuda" if torch.cuda.is_available() else "cpu")
        data = held_out_data(trained, images, config.data.folder) if data is None else data  # for all the points
        error = evaluate(trained, images=images, seed=config.seed, data=data).error
        points.append(
            {
                "step": step,
                "seconds": content["callbacks"]["Timer"]["time_elapsed"]["train"],
                "train_loss": losses[max(known for known in losses if known <= step)],
                "test_error": error,
            }
        )
    write_json(folder / "curve.json", {"points": points})
    return points


def entropies(folder: Path) -> dict[int, float]:
    """The attention's entropy by step, as a run logged it, in nats."""
    return _read_metric(folder, "train/entropy")


def _losses(folder: Path) -> dict[int, float]:
    return _read_metric(folder, "train/loss")


def _read_metric(folder: Path, name: str) -> dict[int, float]:
    """A metric by step, from the logs of all starts of a run; where two have a step, the later start's counts."""
    found = {}
    logs = sorted((folder / "csv").glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    for log in logs:
        with log.open() as file:
            for row in csv.DictReader(file):
                if row.get(name):
                    found[int(row["step"])] = float(row[name])
    return found
