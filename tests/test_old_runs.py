"""Runs of version 0.1, before experiments had a file each: their checkpoints load, and their trainings go on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import ats
from ats.experiments.checkpoints import read_checkpoint
from ats.experiments.config import ExperimentConfig
from ats.experiments.evaluation import evaluate
from ats.experiments.training import InterruptedRunError, train
from tests.test_training import EPOCHS, StopAt, assert_same, tiny, weights

OLD = {  # what 0.1 wrote of `tiny`, in its order; that had no trainer.sync_batchnorm and no trainer.extend
    "experiment": "megapixel-mnist",
    "preset": "demo",
    "output": "run",
    "seed": 0,
    "data": {
        "digits": "bundled", "folder": None, "image_size": 140, "n_noise": 2, "train_images": 24, "small_epochs": 0,
        "medium_epochs": 0, "validation_images": 0, "test_images": 8,
    },
    "model": {
        "method": "ats", "networks": "modern", "n_patches": 10, "patch_size": 50, "view_scale": 0.12, "replace": False,
        "estimator": "ordered", "control_variate": False, "positions": False, "feature_scale": 8.0, "grid_step": 50,
        "grid_chunk": 0, "cnn_scale": 1.0, "cnn_channels": 32,
    },
    "optim": {
        "epochs": EPOCHS, "updates": 0, "batch_size": 8, "draws": 1, "learning_rate": 0.01, "weight_decay": 0.0,
        "warmup": 0.2, "schedule": "cosine", "gradient_clip": 1.0, "entropy_weight": 0.0001, "class_weights": False,
        "average": 0.0,
    },
    "trainer": {
        "accelerator": "cpu", "devices": "1", "num_nodes": 1, "strategy": "auto", "precision": "32-true",
        "checkpoint_seconds": 0.0, "snapshots": 0,
    },
    "diagnostics": {"every": 0, "gradient_draws": 0},
}  # fmt: skip
CALLBACK = (
    "EpochCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
    "'train_time_interval': None}"
)


def as_of_old(config: ExperimentConfig) -> Path:
    """Make a run's files those that 0.1 would have left, whose CSV files were complete without a checkpoint's help."""
    folder = config.run_folder
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    (folder / "config.json").write_text(json.dumps(OLD, indent=2))
    last = folder / "checkpoints" / "last.ckpt"
    content = read_checkpoint(last)
    del content["ran_on"]
    content["callbacks"] = {
        "Timer": content["callbacks"]["Timer"],
        CALLBACK: {
            "monitor": None, "best_model_score": None, "best_model_path": str(last), "current_score": None,
            "dirpath": str(last.parent), "best_k_models": {}, "kth_best_model_path": "",
            "kth_value": torch.tensor(float("inf")), "last_model_path": "",
        },
    }  # fmt: skip
    content["hyper_parameters"] = {"config": OLD}
    assert set(content) == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks", "optimizer_states",
        "lr_schedulers", "hparams_name", "hyper_parameters", "classes",
    }  # fmt: skip
    torch.save(content, last)
    return last


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("old") / "whole"))


def test_an_old_training_goes_on_to_the_same_weights_and_its_checkpoint_loads(whole: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=3 * 2 + 1),))
    last = as_of_old(config)
    assert read_checkpoint(last)["epoch"] == 1
    assert_same(weights(train(config)), weights(whole))
    as_of_old(config)
    old, new = (ats.load(path) for path in (last, whole))
    assert old.classes == new.classes == tuple("0123456789")
    assert evaluate(old, repeats=2) == evaluate(new, repeats=2)


def test_an_old_training_does_not_go_on_as_another(tmp_path: Path) -> None:
    """It had no record of what it ran on, but for the precision among its options."""
    config = tiny(tmp_path / "run")
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=3 + 1),))
    as_of_old(config)
    for section, change, message in (
        ("optim", {"learning_rate": 0.02}, r"holds a run with other options \(optim.learning_rate: 0.01 -> 0.02\)"),
        ("trainer", {"precision": "bf16-mixed"}, "was trained with precision=32-true, and going on with bf16-mixed"),
    ):
        other = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **change)})
        with pytest.raises(ValueError, match=message):
            train(other)
