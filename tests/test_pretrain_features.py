"""Features that learn to read on patches with drawn limits, and keep what they learned."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ats.datasets.painted_signs import SIDES
from ats.datasets.speed_limits import load_speed_limits
from ats.datasets.synthetic.write import write_german
from ats.experiments import pretrain_features, speed_limits
from ats.experiments.build import patch_features
from ats.experiments.config import ExperimentConfig, TrainerConfig
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.pretrain_features import teach_features
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.experiments.speed_limits import SpeedLimitsConfig
from ats.experiments.training import InterruptedRunError, train
from tests.test_training import StopAt, assert_same, weights

SIZE = 40  # pixels a side of a patch


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "german"
    write_german(folder, 8, 4, size=(200, 240), sign_size=(12, 30), limits=(30, 50, 70))
    return folder


def a_config(folder: Path, output: Path | None = None, patches: int = 48, method: str = "ats") -> ExperimentConfig:
    quick = EXPERIMENTS["speed-limits"].presets["quick"]
    model = dataclasses.replace(quick.model, method=method, n_patches=3, patch_size=SIZE, grid_step=100)
    return dataclasses.replace(
        quick,
        output=output,
        data=SpeedLimitsConfig(folder=folder, drawn_patches=patches, translation=20),
        model=dataclasses.replace(model, cnn_scale=0.2, cnn_channels=16),
        optim=dataclasses.replace(quick.optim, epochs=2, batch_size=4, draws=2),
        trainer=TrainerConfig(accelerator="cpu", devices="1"),
    )


def test_patches_show_what_their_label_says(german: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_speed_limits(german, "train")
    drawn = []
    real = speed_limits.put_limit

    def note(image: torch.Tensor, random: np.random.Generator, limit: int, *rest: object, **more: int) -> torch.Tensor:
        shown = real(image, random, limit, *rest, **more)
        rows, columns = (shown != image).any(0).nonzero(as_tuple=True)
        middle = [(float(values.min()) + float(values.max())) / 2 for values in (rows, columns)]
        drawn.append((limit, [at - side / 2 for at, side in zip(middle, image.shape[-2:], strict=True)]))
        return shown

    monkeypatch.setattr(speed_limits, "put_limit", note)
    data = SpeedLimitsConfig(folder=german)
    patches, labels = speed_limits.painted_patches(images, data, SIZE, 400, np.random.default_rng(0))
    assert patches.shape == (400, 3, SIZE, SIZE)
    assert patches.dtype == torch.uint8
    limits = [int(images.classes[label]) for label in labels if label]
    assert [limit for limit, _ in drawn] == limits
    assert set(limits) == {30, 50, 70}
    assert abs(len(limits) / 400 - speed_limits.SIGNS) < 0.08
    offsets = torch.tensor([offset for _, offset in drawn])
    assert offsets.abs().max() <= speed_limits.OFF_CENTRE + 2
    assert offsets.abs().max() > speed_limits.OFF_CENTRE / 2


def test_small_photographs_are_refused(tmp_path: Path) -> None:
    write_german(tmp_path / "signs", 8, 4, size=(120, 160), sign_size=(12, 30), limits=(30, 50, 70))
    images = load_speed_limits(tmp_path / "signs", "train")
    with pytest.raises(ValueError, match="120×160 pixels are too small to cut patches of 40"):
        speed_limits.painted_patches(images, SpeedLimitsConfig(), SIZE, 1, np.random.default_rng(0))
    assert 120 < SIZE + SIDES[1] <= 200


def test_features_learn_and_attention_does_not(
    german: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = a_config(german, patches=48 * 120)
    torch.manual_seed(0)
    model = ClassificationTask(config).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teach_features(model, experiment_data(config), tmp_path / "taught.ckpt")
    for name, value in model.state_dict().items():
        same = torch.equal(value, before[name])
        assert same == name.startswith("sampling.attention"), name
    lines = capsys.readouterr().out.splitlines()
    said = [line.split("  ")[0] for line in lines]
    assert [said[0], said[-1]] == [f"drawn patches, step {step}/120" for step in (0, 120)]
    assert float(lines[-1].split()[-1]) < 0.9  # of log 4 = 1.39: at least what is a sign is known


@pytest.mark.parametrize("method", ["ats", "uniform", "mil"])
def test_a_training_leaves_taught_features_as_they_are(german: Path, tmp_path: Path, method: str) -> None:
    config = a_config(german, tmp_path / "run", method=method)
    checkpoint = train(config)
    torch.manual_seed(config.seed)
    task = ClassificationTask(config)
    teach_features(task.model, experiment_data(config), tmp_path / "taught.ckpt")
    taught, trained = patch_features(task.model).state_dict(), weights(checkpoint)
    prefix = "model.feature." if method == "mil" else "model.sampling.feature."
    for name, value in taught.items():
        assert torch.equal(value, trained[prefix + name]), name
    assert not torch.equal(task.model.head.weight, trained["model.head.weight"])


def test_a_run_that_was_stopped_is_not_taught_anew(
    german: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(train(a_config(german, tmp_path / "whole")))
    config = a_config(german, tmp_path / "stopped")
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=3),))
    monkeypatch.setattr("ats.experiments.training.teach_features", lambda *arguments: pytest.fail("taught again"))
    assert_same(weights(train(config)), expected)


def test_teaching_that_was_stopped_goes_on_and_ends_the_same(
    german: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = weights(train(a_config(german, tmp_path / "whole", patches=48 * 5)))
    monkeypatch.setattr(pretrain_features, "CHECKPOINT_EVERY", 0.0)
    config = a_config(german, tmp_path / "stopped", patches=48 * 5)
    real, calls = speed_limits.painted_patches, []

    def stop_at_the_fourth(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(speed_limits, "painted_patches", stop_at_the_fourth)
    with pytest.raises(InterruptedRunError, match="goes on from its last checkpoint"):
        train(config)
    with pytest.raises(ValueError, match="holds a run with other options"):
        train(dataclasses.replace(config, seed=1))
    torch.rand(3)  # whatever else has drawn from the global stream
    capsys.readouterr()
    assert_same(weights(train(config)), expected)
    assert "drawn patches, step 3/5" in capsys.readouterr().out
    assert len(calls) == 4 + 2


def test_a_cnn_and_other_options_are_taught_nothing(german: Path, tmp_path: Path) -> None:
    for config in (a_config(german, method="cnn"), a_config(german, patches=0)):
        task = ClassificationTask(config)
        before = {name: value.clone() for name, value in task.state_dict().items()}
        teach_features(task.model, experiment_data(config), tmp_path / "taught.ckpt")
        assert_same(task.state_dict(), before)
        assert task.taught_features is None
        task.setup("fit")
        assert all(parameter.requires_grad for parameter in task.parameters())


def test_taught_features_stay_in_evaluation_mode(german: Path) -> None:
    task = ClassificationTask(a_config(german))
    task.setup("fit")
    task.eval().train()
    assert task.taught_features is not None
    assert not any(layer.training for layer in task.taught_features.modules())
    assert task.model.sampling.attention.training
    assert {type(layer) for layer in task.taught_features.modules()} >= {nn.BatchNorm1d, nn.BatchNorm2d}
    with pytest.raises(ValueError, match=r"data\.drawn_patches teaches features from patches that lie nowhere"):
        dataclasses.replace(task.config, model=dataclasses.replace(task.config.model, positions=True))
    with pytest.raises(ValueError, match=r"data\.drawn_patches must be at least 0"):
        SpeedLimitsConfig(drawn_patches=-1)
