"""`ats train images` on a published experiment's data is that experiment, to the last bit of every weight.

With the same images in the same order, the same networks, options and seed. On the real images of colon cancer this was
seen, too (docs/results.md); here they are synthetic.
"""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from ats.datasets.image_dataset import ImageDataset
from ats.datasets.synthetic.write import write_colon_cancer, write_german
from ats.experiments import colon_cancer, speed_limits
from ats.experiments.config import ExperimentConfig, TrainerConfig
from ats.experiments.images import PRESETS
from ats.experiments.images_config import ImagesConfig
from ats.experiments.photographs import ImageData
from ats.experiments.registry import experiment_data
from ats.experiments.training import train
from tests.test_training import assert_same, weights


def write_manifest(path: Path, splits: dict[str, ImageDataset]) -> Path:
    """The images of an experiment's splits, in their order."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for name, images in splits.items():
            for example in images.examples:
                writer.writerow([example.path, images.classes[example.label], name])
    return path


def colon(folder: Path) -> ExperimentConfig:
    write_colon_cancer(folder, 8, size=100)
    preset = colon_cancer.PRESETS["quick"]
    data = dataclasses.replace(preset.data, folder=folder, folds=2, translation=5)  # type: ignore[call-arg]
    return dataclasses.replace(preset, data=data, model=dataclasses.replace(preset.model, n_patches=3))


def german(folder: Path) -> ExperimentConfig:
    write_german(folder, 8, 4, size=(96, 144), limits=(30, 50, 70), sign_size=(12, 16))
    preset = speed_limits.PRESETS["quick"]
    own = {"drawn_limits": 0.0, "drawn_patches": 0, "limits": (30, 50, 70)}  # of that experiment alone
    data = dataclasses.replace(preset.data, folder=folder, source="german", **own)  # type: ignore[call-arg]
    return dataclasses.replace(preset, data=data, model=dataclasses.replace(preset.model, n_patches=2, patch_size=32))


@pytest.mark.parametrize("make", [colon, german], ids=["colon-cancer", "speed-limits"])
def test_the_same_images_are_the_same_training(
    make: Callable[[Path], ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make(tmp_path / "data")
    optim = dataclasses.replace(own.optim, epochs=2, batch_size=2)
    own = dataclasses.replace(own, optim=optim, output=tmp_path / "own", trainer=TrainerConfig(accelerator="cpu"))
    images = experiment_data(own)
    assert isinstance(images, ImageData)
    splits = {name: images.split(name) for name in ("train", "test")}
    shared = {field.name for field in dataclasses.fields(ImagesConfig)} - {"folder", "folds"}
    options = {name: value for name, value in vars(own.data).items() if name in shared}
    manifest = write_manifest(tmp_path / "labels.csv", splits)
    data = ImagesConfig(manifest=manifest, classes=splits["train"].classes, **options)
    monkeypatch.setattr(ImagesConfig, "networks_for", lambda self, model: own.data.networks_for(model))
    mine = dataclasses.replace(PRESETS["quick"], data=data, model=own.model, optim=optim, trainer=own.trainer)
    mine = dataclasses.replace(mine, output=tmp_path / "mine", seed=own.seed)
    assert_same(weights(train(own)), weights(train(mine)))
