"""Checkpoints and records whose parts are of the wrong kind: a line that names the file, in every command."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ats
from ats._files import read_object
from ats.datasets.synthetic.write import write_german
from ats.experiments.checkpoints import read_checkpoint, write_checkpoint
from ats.experiments.commands.command_line import run
from ats.experiments.config import TrainerConfig
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.pretrain_features import teach_features
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.experiments.reproduce.runs import read_json
from ats.experiments.speed_limits import SpeedLimitsConfig
from ats.experiments.training import train
from tests.faults import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("damaged") / "whole")).parent.parent


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


def weights(change: Any) -> Any:
    return lambda content: {"state_dict": {name: change(value) for name, value in content["state_dict"].items()}}


LOADED = {
    "no tensors": weights(lambda _: 3),
    "complex": weights(lambda value: value.to(torch.complex64) if value.is_floating_point() else value),
    "whole numbers": weights(lambda value: value.long()),
    "a list": lambda _: {"state_dict": [1]},
    "numbers for names": lambda _: {"state_dict": {1: torch.zeros(1)}},
    "few classes": lambda _: {"classes": ["a"]},
    "classes of numbers": lambda _: {"classes": list(range(10))},
    "a number of classes": lambda _: {"classes": 10},
}


@pytest.mark.parametrize("damage", LOADED)
def test_it_is_not_loaded(copy: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = read_checkpoint(copy)
    write_checkpoint(copy, content | LOADED[damage](content))
    with pytest.raises(ValueError, match="another version of ats") as caught:
        ats.load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert run(["evaluate", str(copy)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


RESUMED = {
    "optimiser of other parameters": {"optimizer_states": [{"state": {}, "param_groups": []}]},
    "a version that is none": {"pytorch-lightning_version": "junk"},
    "what it ran on": {"ran_on": 5},
    "a step before the first": {"global_step": -7},
    "an epoch before the first": {"epoch": -1},
    "schedules": {"lr_schedulers": [5]},
}


@pytest.mark.parametrize("damage", RESUMED)
def test_it_is_not_gone_on_with(copy: Path, damage: str) -> None:
    folder = copy.parent.parent
    (folder / "training.json").unlink()
    write_checkpoint(copy, read_checkpoint(copy) | RESUMED[damage])
    with pytest.raises(ValueError, match=r"remove it to begin anew, or name another folder") as caught:
        train(tiny(folder))
    assert str(caught.value).startswith(str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[" * 100_000, "{", "\x00"])
def test_records_that_are_no_objects(copy: Path, text: str) -> None:
    folder = copy.parent.parent
    path = folder / "training.json"
    path.write_text(text)
    longer = tiny(folder, extend=True)
    longer = dataclasses.replace(longer, optim=dataclasses.replace(longer.optim, epochs=3))
    for call in (lambda: read_object(path), lambda: read_json(path), lambda: train(longer)):
        with pytest.raises(ValueError, match=r"training.json cannot be read"):
            call()
    path.write_text("{}")
    assert read_object(path) == {}
    with pytest.raises(ValueError, match=r"training.json cannot be read \(it lacks steps\)"):
        read_object(path, "steps")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Data, and features that were taught on one batch of them."""
    folder = tmp_path_factory.mktemp("taught")
    write_german(folder / "german", 8, 4, size=(200, 240), sign_size=(12, 30), limits=(30, 50, 70))
    quick = EXPERIMENTS["speed-limits"].presets["quick"]
    config = dataclasses.replace(
        quick,
        data=SpeedLimitsConfig(folder=folder / "german", drawn_patches=48, translation=20),
        model=dataclasses.replace(quick.model, n_patches=3, patch_size=40, grid_step=100),
        trainer=TrainerConfig(accelerator="cpu", devices="1"),
    )
    data = experiment_data(config)
    teach_features(ClassificationTask(config).model, data, folder / "taught.ckpt")
    return data, folder / "taught.ckpt"


TAUGHT = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-999]),
    "flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"running_mean", b"running_meam")),
    "foreign": lambda path: torch.save({"model": torch.ones(3)}, path),
    "no dictionary": lambda path: torch.save([1, 2], path),
    "code": lambda path: torch.save({"feature": nn.Linear(1, 1)}, path),
    "another model": lambda path: write_checkpoint(
        path, read_checkpoint(path) | {"head": {"weight": torch.ones(2, 2)}}
    ),
    "random numbers": lambda path: write_checkpoint(path, read_checkpoint(path) | {"random": 7}),
    "a step": lambda path: write_checkpoint(path, read_checkpoint(path) | {"step": "x"}),
}


@pytest.mark.parametrize("damage", TAUGHT)
def test_damaged_taught_features_are_named_and_taught_anew_once_removed(
    taught: tuple[Any, Path], tmp_path: Path, damage: str
) -> None:
    data, good = taught
    path = tmp_path / "taught.ckpt"
    shutil.copy(good, path)
    TAUGHT[damage](path)
    model = ClassificationTask(data.config).model
    with pytest.raises(ValueError, match="remove it to teach the features anew") as caught:
        teach_features(model, data, path)
    assert str(caught.value).startswith(str(path))
    assert "weights_only" not in str(caught.value)
    if damage == "empty":
        path.unlink()
        teach_features(ClassificationTask(data.config).model, data, path)
        assert read_checkpoint(path)["step"] == 1
