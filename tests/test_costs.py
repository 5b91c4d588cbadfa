"""What a sample costs: published sizes and networks, every weight reached, memory that grows with what is kept."""

import dataclasses

import pytest
import torch

from ats.experiments import cost
from ats.experiments.config import ModelConfig
from ats.experiments.registry import EXPERIMENTS, tables

SMALL = (100, 100)


def test_costs_are_of_the_published_networks_and_sizes() -> None:
    """Whatever a preset shrinks, the cost stays that of the paper's model."""
    model = dataclasses.replace(EXPERIMENTS["colon-cancer"].presets["quick"].model, method="mil")
    config = cost.published("colon-cancer", model)
    assert (config.model.networks, config.model.grid_step, config.model.patch_size) == ("paper", 10, 27)
    assert config.model.method == "mil"
    slim = tables()["table2"]
    row = next(row for row in slim.rows if row.name == "CNN 0.3")
    assert slim.model(row, "quick").cnn_channels == 16
    assert cost.published("speed-limits", slim.model(row, "quick")).model.cnn_channels == 32
    assert {name: experiment.image_size for name, experiment in EXPERIMENTS.items()} == {
        "megapixel-mnist": (1500, 1500), "colon-cancer": (500, 500), "speed-limits": (960, 1280),
        "images": (1000, 1000), "gigapixel-mnist": (32_768, 32_768),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["ats", "mil", "cnn"])
def test_steps_that_are_timed_reach_every_weight(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that skipped a network would look cheap."""
    models = []
    build = cost.build_model
    monkeypatch.setattr(cost, "build_model", lambda config: models.append(build(config)) or models[-1])
    config = cost.published("colon-cancer", ModelConfig(method=method))  # type: ignore[arg-type]
    step = cost.training_step(config, image_size=SMALL)
    torch.manual_seed(0)
    step()
    assert all(weight.grad is not None for weight in models[0].parameters())
    timing = cost.measure_seconds({"one": config}, rounds=2, image_size=SMALL)["one"]
    assert 0 < timing.lower <= timing.median <= timing.upper
    assert timing.steps >= 2


def test_what_is_timed_has_the_same_images_and_feature_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that are compared must not differ in anything but the method."""
    models = []
    build = cost.build_model
    monkeypatch.setattr(cost, "build_model", lambda config: models.append(build(config)) or models[-1])
    configs = [cost.published("colon-cancer", ModelConfig(method=method)) for method in ("ats", "mil")]
    images, again = (cost.random_images(config, SMALL, batch=2, copies=2) for config in configs)
    assert torch.equal(torch.stack(images), torch.stack(again))
    assert not torch.equal(images[0], images[1])
    steps = [cost.training_step(config, images=images) for config in configs]
    features = [torch.cat([weight.flatten() for weight in model.parameters()]) for model in
                (models[0].sampling.feature, models[1].feature)]  # fmt: skip
    assert torch.equal(*features)
    seen = []
    for model, step in zip(models, steps, strict=True):
        model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[1]))
        for _ in range(3):
            step()
    assert [image is images[0] for image in seen] == [True, False, True] * 2


def test_memory_beyond_the_images_does_not_hold_them() -> None:
    """What a step takes beyond images and views that are given is the same for images of another size."""
    config = cost.published("megapixel-mnist", ModelConfig(n_patches=10))
    side = 3000  # 9 MB
    given, whole = (cost.measure_bytes(config, image_size=(side, side), given=given) for given in (True, False))
    assert 0.9 * side**2 < whole - given < 1.5 * side**2


def test_memory_grows_with_what_is_kept() -> None:
    """Deep MIL on four times the pixels keeps four times the activations; 2,500 patches' worth is tens of megabytes."""
    config = cost.published("colon-cancer", ModelConfig(method="mil"))
    small, large = (cost.measure_bytes(config, image_size=(side, side)) for side in (150, 300))
    # Every 27×27 patch keeps at least the two convolutions' outputs: (36·24² + 48·10²) floats; 900 patches at 300.
    kept = 900 * (36 * 24**2 + 48 * 10**2) * 4
    assert kept < large < 6 * kept
    assert 2 < large / small < 6  # and some that does not grow: the model and its gradients


def test_memory_that_cannot_be_measured_says_why() -> None:
    config = cost.published("colon-cancer", ModelConfig(n_patches=100_000))
    with pytest.raises(RuntimeError, match=r"(?s)measuring ats-100000 failed: .*cannot draw n=100000"):
        cost.measure_bytes(config, image_size=SMALL)
