"""The best epoch on validation images is kept, training stops in time, and a stopped run chooses alike; loggers."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig
from ats.experiments.loggers import known_loggers, make_loggers
from ats.experiments.trained import load
from ats.experiments.training import InterruptedRunError, train
from tests.test_training import StopAt, assert_same, tiny, weights


def validated(folder: Path, **optim: object) -> ExperimentConfig:
    """Steps so large that the loss on validation images soon rises again."""
    config = tiny(folder)
    data = dataclasses.replace(config.data, validation_images=8)
    changed = {"epochs": 30, "learning_rate": 0.3, "schedule": "constant", "warmup": 0.0, "keep": "best", "patience": 1}
    return dataclasses.replace(config, data=data, optim=dataclasses.replace(config.optim, **(changed | optim)))


def test_training_stops_and_the_best_epoch_is_kept_though_interrupted(tmp_path: Path) -> None:
    config = validated(tmp_path / "whole")
    best = train(config)
    assert best == config.run_folder / "checkpoints" / "best.ckpt"
    (log,) = (config.run_folder / "csv").glob("version_*/metrics.csv")
    losses = [float(row["validation/loss"]) for row in csv.DictReader(log.open()) if row["validation/loss"]]
    least = losses.index(min(losses))
    assert len(losses) == least + 1 + 1 < 30
    content = torch.load(best, weights_only=True)
    assert content["epoch"] == least
    saved = {f"model.{name}": value for name, value in load(config.run_folder).model.state_dict().items()}
    assert_same(saved, weights(best))
    assert not torch.equal(*(weights(best.with_name(name))["model.head.bias"] for name in ("best.ckpt", "last.ckpt")))
    stopped = validated(tmp_path / "stopped")
    with pytest.raises(InterruptedRunError):
        train(stopped, callbacks=(StopAt(step=3 * (least + 1) + 1),))
    assert_same(weights(train(stopped)), weights(best))
    assert_same(*(weights(each.run_folder / "checkpoints" / "last.ckpt") for each in (stopped, config)))
    (stopped.run_folder / "training.json").unlink()  # killed between the last checkpoint and this
    train(stopped)
    assert json.loads((stopped.run_folder / "training.json").read_text())["steps"] == 3 * len(losses)


def test_without_images_for_validation_it_is_refused(tmp_path: Path) -> None:
    config = validated(tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_images=0))
    with pytest.raises(ValueError, match=r"optim\.keep best and optim\.patience need images for validation"):
        train(config)
    assert not config.run_folder.exists()


def test_loggers_go_by_lightnings_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"tensorboard", "csv", "wandb", "mlflow"} <= set(known_loggers())
    names = [type(each).__name__ for each in make_loggers(("tensorboard", "CSV"), tmp_path)]
    assert names == ["TensorBoardLogger", "CSVLogger"]
    with pytest.raises(ValueError, match=r"unknown logger 'board' in trainer\.loggers, expected some of"):
        make_loggers(("board",), tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.loggers wandb needs a package that is not installed"):
        make_loggers(("wandb",), tmp_path)
    output = ["--output", str(tmp_path / "run")]
    assert run(["train", "megapixel-mnist", "--preset", "demo", *output, "--trainer.loggers", "board"]) == 1
    assert "unknown logger" in capsys.readouterr().err
