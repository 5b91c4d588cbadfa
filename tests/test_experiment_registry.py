"""Adding an experiment takes one file and one line: the toy goes through every command that it has a use for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import ats
from ats.experiments import cost
from ats.experiments.commands.command_line import run
from ats.experiments.config import ModelConfig, to_dict
from ats.experiments.registry import EXPERIMENTS, experiment_data, from_dict, register, tables
from ats.experiments.training import train
from tests.test_training import StopAt, assert_same, weights
from tests.toy_experiment import TOY, ToyConfig


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    register(TOY)
    yield
    del EXPERIMENTS["toy"]


def test_the_toy_trains_and_is_looked_at_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(f"train toy --preset quick --data.side 24 --output {folder}".split()) == 0
    assert json.loads((folder / "config.json").read_text())["data"] == {"folder": None, "side": 24}
    assert run(f"evaluate {folder} --repeats 2 --output {tmp_path / 'result.json'}".split()) == 0
    assert "Data: toy squares" in " ".join(capsys.readouterr().out.split())
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert (result["images"], result["n_patches"]) == (6, 3)
    Image.new("L", (40, 30), 60).save(tmp_path / "image.png")
    picture = tmp_path / "attention.png"
    assert run(f"attention {folder} {tmp_path / 'image.png'} --n-patches 2 --output {picture}".split()) == 0
    assert picture.stat().st_size > 1000
    assert capsys.readouterr().out.split('"')[1] in ("dark", "light")
    study = f"study inference {folder} --images 4 --draws 2 --n-patches 4 --lead 2 --tolerance 1 --budget 9"
    assert run(study.split()) == 0


def test_the_help_lists_it_and_names_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    assert "toy" in capsys.readouterr().out
    assert run(["train", "toy", "--preset", "quick", "--help"]) == 0
    assert "--data.side" in capsys.readouterr().out
    for line, message in (
        ("--preset paper", "unknown preset 'paper' of toy, expected one of quick"),
        ("--preset quick --model.networks paper", "toy has no networks 'paper', expected one of 'modern'"),
        ("--preset quick --model.method cnn", "toy has no CNN; choose another model.method"),
    ):
        assert run(["train", "toy", *line.split(), "--output", str(tmp_path / "run")]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run").exists()


def test_interrupted_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    import dataclasses

    config = TOY.presets["quick"]
    whole, stopped = (dataclasses.replace(config, output=tmp_path / name) for name in ("whole", "stopped"))
    expected = weights(train(whole))
    with pytest.raises(Exception, match="goes on from its last checkpoint"):
        train(stopped, callbacks=(StopAt(step=3),))
    assert_same(weights(train(stopped)), expected)
    assert from_dict(to_dict(config)) == config
    trained = ats.load(tmp_path / "whole")
    assert trained.classes == ("dark", "light")
    images, _ = experiment_data(config).examples("test", torch.arange(2))
    assert trained.predict(images).logits.shape == (2, 2)


def test_costs_are_those_of_its_own_size() -> None:
    (image,) = cost.random_images(TOY.presets["quick"])
    assert image.shape == (1, 1, 32, 32)
    timing = cost.measure_seconds({"toy": TOY.presets["quick"]}, rounds=1, warmup=1)["toy"]
    assert timing.median > 0


def test_a_name_is_taken_once_and_tables_come_from_experiments() -> None:
    register(TOY)  # the same one again is no other
    with pytest.raises(ValueError, match="there is an experiment 'toy' already"):
        register(type(TOY)(ToyConfig, TOY.data, {}, (1, 1)))
    assert list(tables()) == ["table1", "table2", "mnist", "table2-all"]
    assert ModelConfig().networks in ToyConfig.networks
