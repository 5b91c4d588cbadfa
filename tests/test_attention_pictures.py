"""Pictures of the attention in a training: what they show, when, and that they change nothing; any logger by name."""

import csv
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import loggers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ats.experiments.attention_pictures import AttentionPictures, attention_pictures, cells_over, seen, takes_pictures
from ats.experiments.config import DiagnosticsConfig, ExperimentConfig
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.loggers import make_loggers
from ats.experiments.registry import experiment_data
from ats.experiments.training import train
from tests import test_images_experiment as images
from tests.test_training import assert_same, tiny, weights


def pictured(config: ExperimentConfig, every: int, *names: str) -> ExperimentConfig:
    trainer = dataclasses.replace(config.trainer, loggers=names or ("tensorboard",))
    return dataclasses.replace(config, diagnostics=DiagnosticsConfig(pictures=every), trainer=trainer)


def in_tensorboard(run: Path) -> dict[str, list[int]]:
    """The steps of each picture."""
    (folder,) = (run / "tensorboard").glob("version_*")
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_pictures_come_every_few_epochs_and_change_nothing(tmp_path: Path) -> None:
    """Of eight images in batches of four, for four epochs: after the second and the fourth."""
    manifest = images.write_images(tmp_path, images.TWO)
    plain, watched = (pictured(images.tiny(manifest, tmp_path / str(every), epochs=4), every) for every in (0, 2))
    assert_same(weights(train(plain)), weights(train(watched)))
    assert in_tensorboard(plain.run_folder) == {}
    assert in_tensorboard(watched.run_folder) == {f"attention/train-{index}": [4, 8] for index in (0, 2, 4, 6)}


def test_pictures_of_a_built_in_experiment(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    config = pictured(dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=1)), 1)
    train(config)
    assert in_tensorboard(config.run_folder) == {f"attention/train-{index}": [3] for index in (0, 6, 12, 18)}


def test_pictures_of_a_manifest_are_of_its_validation_images(tmp_path: Path) -> None:
    splits = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    manifest = images.write_images(tmp_path, images.TWO, {"split": splits})
    for storage in ("memory", "disk"):
        config = pictured(images.tiny(manifest, tmp_path / storage, epochs=1, storage=storage), 1)
        train(config)
        assert set(in_tensorboard(config.run_folder)) == {"attention/validation-0", "attention/validation-1"}


def test_a_picture_shows_the_image_and_where_attention_is(tmp_path: Path) -> None:
    manifest = images.write_images(tmp_path, images.TWO)
    config = images.tiny(manifest, tmp_path / "run")
    config = dataclasses.replace(config, data=config.data.resolved(0))
    data, task = experiment_data(config), ClassificationTask(config).eval()
    logits = torch.zeros(1, 1, 12, 12)
    logits[..., 3, 9] = 50.0
    task.model.sampling.attention.forward = lambda view: logits  # type: ignore
    (picture, *_) = attention_pictures(task, data, 2).values()
    assert picture.shape == (3, 240, 2 * 240 + 4)  # a view of 24 pixels, ten times
    _, image, _ = data.load("train", torch.tensor([0]))
    shrunk = image[0].float().unflatten(2, (24, 2)).unflatten(1, (24, 2)).mean((2, 4))
    small = picture[:, 5:240:10, 5:240:10].float()
    torch.testing.assert_close(small, shrunk, rtol=0, atol=1.0)
    yellow = (picture[:, :, 244:].float() - 0.35 * picture[:, :, :240].float().mean(0)).amin(0)
    brightest = torch.tensor([253, 231, 37.0]) * 0.65
    patch = picture[:, 60:80, 244 + 180 : 244 + 200].float() - 0.35 * picture[:, 60:80, 180:200].float().mean(0)
    torch.testing.assert_close(patch.mean((1, 2)), brightest, rtol=0, atol=1.5)
    assert yellow.shape == (240, 240)
    assert float(yellow[:60].amax()) < 0.65 * 84 + 2  # elsewhere the darkest of the colours


def test_cells_lie_where_their_patches_do() -> None:
    """Three by two cells of 10 pixels, 8 patches wide, in an image of 30 by 40 shown at half its size."""
    rows, columns = torch.meshgrid(torch.tensor([1, 11, 21]), torch.tensor([6, 26]), indexing="ij")
    offsets = torch.stack([rows.flatten(), columns.flatten()], -1)
    found = cells_over(torch.zeros(3, 15, 20), torch.arange(6.0), offsets, (8, 8), (0.5, 0.5))
    expected = torch.arange(6.0).view(3, 2).repeat_interleave(5, 0).repeat_interleave(10, 1) / 5
    assert torch.equal(found, expected)


def test_what_is_not_bytes_is_shown_between_its_ends() -> None:
    view = torch.tensor([[[-2.0, 0.0], [1.0, 2.0]]])
    shown = seen(view, (1000.0,), (100.0,))  # 800 to 1200
    assert shown.shape == (3, 256, 256)
    assert shown[0, [0, 0, 255, 255], [0, 255, 0, 255]].tolist() == pytest.approx([0, 0.5, 0.75, 1.0])
    assert seen(torch.zeros(4, 600, 300), None, None).shape == (3, 256, 128)


@pytest.mark.parametrize(("method", "expected"), [("mil", 1), ("uniform", 0), ("cnn", 0)])
def test_other_methods(tmp_path: Path, method: str, expected: int) -> None:
    manifest = images.write_images(tmp_path, images.TWO)
    config = pictured(images.tiny(manifest, tmp_path / "run", epochs=1), 1)
    model = dataclasses.replace(config.model, method=method, grid_step=24, cnn_channels=16)
    train(dataclasses.replace(config, model=model))
    assert bool(in_tensorboard(config.run_folder)) == bool(expected)


def test_no_training_has_more_than_twenty_of_an_image() -> None:
    class Trainer:
        num_training_batches, estimated_stepping_batches, current_epoch = 5, 5000, 0

    due = []
    for Trainer.current_epoch in range(1000):
        if AttentionPictures(10)._is_due(Trainer()):  # type: ignore[arg-type]
            due.append(Trainer.current_epoch + 1)
    assert due == list(range(50, 1001, 50))


class Service:
    """A stand-in for wandb's package and for its run, which keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.config = types.SimpleNamespace(update=lambda *_, **__: None)
        self.made: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)

    def define_metric(self, *_: Any, **__: Any) -> None: ...


def test_wandb_gets_metrics_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own logger, on a stand-in for the package; beside it CSV, which takes no pictures."""
    run, package = Service(), types.ModuleType("wandb")
    package.run = None  # type: ignore[attr-defined]
    package.Image = lambda pixels, **_: pixels.shape  # type: ignore[attr-defined]
    package.require = lambda _: None  # type: ignore[attr-defined]

    def init(**options: Any) -> Service:
        run.made = options
        return run

    package.init = init  # type: ignore[attr-defined]
    for name, classes in (("wandb.sdk.lib", ("RunDisabled",)), ("wandb.wandb_run", ("Run",))):
        part = types.ModuleType(name)
        for each in classes:
            setattr(part, each, Service if each == "Run" else type(each, (), {}))
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setitem(sys.modules, "wandb.sdk", types.ModuleType("wandb.sdk"))
    monkeypatch.setattr(sys.modules[loggers.WandbLogger.__module__], "_WANDB_AVAILABLE", True)
    config = pictured(
        images.tiny(images.write_images(tmp_path, images.TWO), tmp_path / "run", epochs=1), 1, "wandb", "csv"
    )
    train(config)
    assert (run.made["project"], run.made["name"], run.made["dir"]) == ("ats", "run", str(config.run_folder))
    pictures = [name for metrics in run.logged for name in metrics if name.startswith("attention/")]
    assert len(pictures) == 4
    assert any("train/loss" in metrics for metrics in run.logged)
    (log,) = (config.run_folder / "csv-log").glob("version_*/metrics.csv")
    assert any(row.get("train/loss") for row in csv.DictReader(log.open()))
    takes = [takes_pictures(each) for each in make_loggers(("tensorboard", "csv", "wandb"), tmp_path)]
    assert takes == [True, False, True]


def test_a_logger_that_fails_loses_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", fail)
    config = pictured(images.tiny(images.write_images(tmp_path, images.TWO), tmp_path / "run", epochs=2), 1)
    with pytest.warns(UserWarning, match="TensorBoardLogger took no pictures of the attention.*no such host") as caught:
        train(config)
    assert len([each for each in caught if "took no pictures" in str(each.message)]) == 1
