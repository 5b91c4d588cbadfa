"""Colon cancer and speed limits, on synthetic images: every method trains, and a stopped run ends as any other."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from ats.datasets.synthetic.write import write_colon_cancer, write_german
from ats.experiments.colon_cancer import ColonCancerConfig
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig, ModelConfig, OptimConfig, TrainerConfig
from ats.experiments.evaluation import evaluate
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.photographs import ImageData
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.experiments.speed_limits import SpeedLimitsConfig
from ats.experiments.trained import load
from ats.experiments.training import AveragedWeights, InterruptedRunError, train
from ats.models import ATSClassifier
from tests.test_training import StopAt, assert_same, weights

CPU = TrainerConfig(accelerator="cpu", devices="1")
METHODS = ("ats", "uniform", "mil", "gated-mil", "cnn")


@pytest.fixture(scope="module")
def colon_cancer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "colon-cancer"
    write_colon_cancer(folder, 12, size=100)
    return folder


@pytest.fixture(scope="module")
def speed_limits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "speed-limits"
    write_german(folder, 8, 4, size=(160, 240), sign_size=(12, 30), limits=(30, 50, 70))
    return folder


def small_colon(data: Path, output: Path, *, model: ModelConfig | None = None, **changes: object) -> ExperimentConfig:
    paper = EXPERIMENTS["colon-cancer"].presets["paper"]
    config = dataclasses.replace(
        paper,
        output=output,
        data=ColonCancerConfig(folder=data, folds=3, symmetries=True),
        model=model or dataclasses.replace(paper.model, n_patches=3, grid_step=40),
        optim=OptimConfig(epochs=3, batch_size=4),
        trainer=CPU,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("networks", ["paper", "modern"])
def test_every_method_trains_and_evaluates(colon_cancer: Path, tmp_path: Path, method: str, networks: str) -> None:
    model = ModelConfig(method=method, networks=networks, n_patches=3, patch_size=27, view_scale=0.2, grid_step=40)
    config = small_colon(colon_cancer, tmp_path / "run", model=model, optim=OptimConfig(epochs=1, batch_size=4))
    torch.manual_seed(config.seed)
    checkpoint = train(config)
    trained = weights(checkpoint)
    before = ClassificationTask(config).state_dict()
    parts = {name.split(".")[1] for name in trained if name.startswith("model.")}
    for part in parts:  # each has learned something: all parts are in the graph of the loss
        names = [name for name in trained if name.startswith(f"model.{part}.") and trained[name].is_floating_point()]
        assert any(not torch.equal(trained[name], before[name]) for name in names), part
    result = evaluate(load(checkpoint))
    assert result.images == 4
    assert result.method == ("sample" if method in ("ats", "uniform") else method)
    assert result.n_patches == (3 if method in ("ats", "uniform") else 0)
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert summary["data"].startswith("synthetic")
    assert (summary["train_images"], summary["test_images"]) == (8, 4)


def test_a_run_with_dropout_and_random_changes_resumes_bit_for_bit(colon_cancer: Path, tmp_path: Path) -> None:
    """Dropout and augmentation draw at random as well: neither may depend on where a run was stopped."""
    whole = train(small_colon(colon_cancer, tmp_path / "whole"))
    config = small_colon(colon_cancer, tmp_path / "stopped")
    assert ClassificationTask(config).has_dropout
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=2 * 2 + 1),))
    torch.rand(3)  # whatever else has drawn from the global stream
    assert_same(weights(train(config)), weights(whole))


def test_averaged_weights_are_evaluated_and_survive_an_interruption(colon_cancer: Path, tmp_path: Path) -> None:
    """The average is over all steps so far: a resumed run that began it anew would end with other weights."""
    optim = OptimConfig(epochs=3, batch_size=4, average=0.5)
    model = ModelConfig(networks="modern", n_patches=3, patch_size=27, view_scale=0.2)
    whole = train(small_colon(colon_cancer, tmp_path / "whole", optim=optim, model=model))
    config = small_colon(colon_cancer, tmp_path / "stopped", optim=optim, model=model)
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=2 * 2 + 1),))
    assert_same(weights(train(config)), weights(whole))
    content = torch.load(whole, weights_only=True)
    averaged, last = content["state_dict"]["model.head.weight"], content["current_model_state"]["model.head.weight"]
    assert not torch.equal(averaged, last)
    assert torch.equal(load(whole).model.head.weight, averaged)
    plain = train(
        small_colon(colon_cancer, tmp_path / "plain", optim=dataclasses.replace(optim, average=0), model=model)
    )
    assert torch.equal(weights(plain)["model.head.weight"], last)  # averaging watches, and changes nothing


def test_the_average_forgets_its_start_and_counts_nothing() -> None:
    average = AveragedWeights(0.9)._kwargs["avg_fn"]
    old, new = torch.tensor([0.0]), torch.tensor([1.0])
    assert float(average(old, new, 0)) == pytest.approx(0.9)  # 1 − 1/10
    assert float(average(old, new, torch.tensor(10_000))) == pytest.approx(0.1)
    assert int(average(torch.tensor(3), torch.tensor(7), 5)) == 7


def test_modern_networks_see_normalised_views_and_patches_alike(colon_cancer: Path) -> None:
    for method in METHODS:
        model = ModelConfig(method=method, networks="modern", n_patches=3, patch_size=27, view_scale=0.2, grid_step=40)
        config = small_colon(colon_cancer, Path("unused"), model=model)
        networks = config.data.networks_for(config.model)
        mean, std = networks.mean, networks.std
        task = ClassificationTask(config)
        view, image, _ = experiment_data(config).load("test", torch.tensor([0]))
        pixels = (image.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        if method in ("ats", "uniform", "cnn"):
            expected = torch.nn.functional.adaptive_avg_pool2d(pixels, view.shape[-2:])
            torch.testing.assert_close(view, expected.float(), rtol=1e-4, atol=1e-4)
        if method != "cnn":
            seen = []
            feature = task.model.feature if method.endswith("mil") else task.model.sampling.feature
            feature.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            task.eval().model(view, image)
            low, high = pixels.amin().float(), pixels.amax().float()
            assert float(seen[0].amin()) >= min(0.0, float(low)) - 1e-4
            assert float(seen[0].amin()) < -1  # not in [0, 1] any more
            assert float(seen[0].amax()) <= max(0.0, float(high)) + 1e-4


def test_updates_stop_a_run_within_an_epoch_and_are_kept(colon_cancer: Path, tmp_path: Path) -> None:
    config = small_colon(colon_cancer, tmp_path / "run", optim=OptimConfig(updates=5, batch_size=4))
    config = dataclasses.replace(config, trainer=dataclasses.replace(CPU, checkpoint_seconds=1e9))
    checkpoint = train(config)
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 5
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 5


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_does_not_go_on_with_other_images(colon_cancer: Path, tmp_path: Path, complete: bool) -> None:
    """Whoever tries synthetic images first must not get their model for the real ones."""
    config = small_colon(colon_cancer, tmp_path / "run")
    if complete:
        train(config)
    else:
        with pytest.raises(InterruptedRunError):
            train(config, callbacks=(StopAt(step=2 * 2 + 1),))
    write_colon_cancer(tmp_path / "others", 15, size=100)
    others = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=tmp_path / "others"))
    message = (
        r"synthetic CRCHistoPhenotypes \(8 training and 4 test images\), not on .* \(10 training and 5 test images"
    )
    with pytest.raises(ValueError, match=message):
        train(others)
    moved = tmp_path / "moved"
    shutil.copytree(colon_cancer, moved)
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, folder=moved)))


def test_a_complete_run_needs_no_images(tmp_path: Path) -> None:
    write_colon_cancer(tmp_path / "data", 12, size=100)
    config = small_colon(tmp_path / "data", tmp_path / "run")
    checkpoint = train(config)
    shutil.rmtree(tmp_path / "data")
    assert train(config) == checkpoint


def test_fewer_channels_than_a_cnn_can_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.cnn_channels must be at least 16, got 8"):
        ModelConfig(method="cnn", cnn_channels=8)


def test_checkpoints_are_written_no_more_often_than_asked_for(colon_cancer: Path, tmp_path: Path) -> None:
    """A checkpoint an epoch would cost more than an epoch of a hundred small images; the last epoch's is needed."""
    config = small_colon(colon_cancer, tmp_path / "run")
    config = dataclasses.replace(config, trainer=dataclasses.replace(CPU, checkpoint_seconds=1e9))
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=2 * 2 + 1),))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 0  # the first one, then none for a while
    assert torch.load(train(config), weights_only=True)["epoch"] == 2


def test_a_seed_is_a_fold_and_folds_part_the_images(colon_cancer: Path) -> None:
    def test_names(seed: int) -> set[str]:
        data = experiment_data(small_colon(colon_cancer, Path("unused"), seed=seed))
        assert isinstance(data, ImageData)
        trained, tested = ({example.name for example in data.split(name).examples} for name in ("train", "test"))
        assert not trained & tested
        assert len(trained | tested) == 12
        return tested

    first, second = ([test_names(seed) for seed in seeds] for seeds in (range(3), range(3, 6)))
    for partition in (first, second):
        assert len(set.union(*partition)) == sum(map(len, partition)) == 12
    assert first != second  # seeds beyond the folds part the images anew


def test_training_images_change_from_epoch_to_epoch_and_test_images_never(colon_cancer: Path) -> None:
    data = experiment_data(small_colon(colon_cancer, Path("unused")))
    indices = torch.tensor([2, 0])
    first, second = (data.load("train", indices, epoch=epoch) for epoch in (0, 1))
    assert not torch.equal(first[1], second[1])
    assert torch.equal(first[1], data.load("train", indices, epoch=0)[1])
    one = data.load("train", torch.tensor([0]), epoch=0)
    assert torch.equal(one[1][0], first[1][1])  # whatever else is in the batch
    plain = data.load("test", indices)
    assert isinstance(data, ImageData)
    assert torch.equal(plain[1][1], data.split("test").image(0))
    torch.testing.assert_close(  # the view is of the changed image
        first[0], torch.nn.functional.adaptive_avg_pool2d(first[1].float() / 255, first[0].shape[-2:])
    )


def test_speed_limits_train_with_class_weights(speed_limits: Path, tmp_path: Path) -> None:
    preset = EXPERIMENTS["speed-limits"].presets["quick"]
    config = dataclasses.replace(
        preset,
        output=tmp_path / "run",
        data=SpeedLimitsConfig(folder=speed_limits, translation=20),
        optim=dataclasses.replace(preset.optim, epochs=1, batch_size=4),
        trainer=CPU,
    )
    checkpoint = train(config)
    assert evaluate(load(checkpoint)).images == 4
    data = experiment_data(config)
    counts = torch.bincount(data.labels("train"))
    class_weights = data.class_weights()
    torch.testing.assert_close(class_weights * counts, torch.full((4,), float(counts.sum()) / 4, dtype=torch.float64))


def test_the_loss_weighs_classes_by_their_rarity() -> None:
    task = ClassificationTask(EXPERIMENTS["speed-limits"].presets["quick"])
    logits, label = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 3])
    plain = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    torch.testing.assert_close(task.loss(logits, label), plain.mean())
    task.class_weights = torch.tensor([0.5, 1.0, 1.0, 3.0])
    torch.testing.assert_close(task.loss(logits, label), (plain[0] * 0.5 + plain[1] * 3 + plain[2] * 3) / 3)


def test_all_of_it_from_the_command_line(
    colon_cancer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        f"train colon-cancer --preset quick --data.folder {colon_cancer} --data.folds 3 --output {tmp_path / 'run'} "
        "--optim.epochs 1 --model.method gated-mil --model.grid-step 40 --trainer.accelerator cpu"
    )
    assert run(options.split()) == 0
    assert run(["evaluate", str(tmp_path / "run")]) == 0
    assert "4 test images, gated-mil. Data: synthetic CRCHistoPhenotypes" in " ".join(capsys.readouterr().out.split())
    assert run(["evaluate", str(tmp_path / "run"), "--n-patches", "3"]) == 1
    assert "gated-mil draws no patches" in capsys.readouterr().err
    assert run(["evaluate", str(tmp_path / "run"), "--images", "5"]) == 1
    assert "images must be between 1 and 4" in capsys.readouterr().err


def test_images_that_are_nowhere_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ATS_DATA", raising=False)
    assert run(["train", "colon-cancer", "--output", str(tmp_path / "run")]) == 1
    assert "ATS_DATA" in capsys.readouterr().err
    assert run(["train", "colon-cancer", "--preset", "demo"]) == 1
    assert "unknown preset 'demo' of colon-cancer" in capsys.readouterr().err


def test_presets_of_the_image_experiments_are_the_papers_where_they_say_so() -> None:
    colon, speed = EXPERIMENTS["colon-cancer"].presets["paper"], EXPERIMENTS["speed-limits"].presets["paper"]
    assert (colon.optim.updates, colon.optim.learning_rate, colon.optim.entropy_weight) == (30_000, 1e-3, 0.01)
    assert (colon.model.view_scale, colon.model.patch_size, colon.model.grid_step) == (0.2, 27, 10)
    assert (speed.optim.updates, speed.optim.batch_size, speed.optim.entropy_weight) == (300_000, 32, 0.05)
    assert (speed.model.view_scale, speed.model.patch_size, speed.model.grid_step) == (0.3, 100, 80)
    assert isinstance(speed.data, SpeedLimitsConfig)
    assert speed.data.translation == 100
    for config in (colon, speed):
        assert (config.model.networks, config.model.feature_scale) == ("paper", 1.0)
        assert config.optim.class_weights == (config is speed)


def test_several_draws_of_a_step_share_one_attention(colon_cancer: Path, tmp_path: Path) -> None:
    """The first is the draw that a step of one would make, the others are drawn anew; each counts in the loss."""
    config = small_colon(colon_cancer, tmp_path / "run", optim=OptimConfig(epochs=1, batch_size=4, draws=3))
    model = ClassificationTask(config).model.eval()
    assert isinstance(model, ATSClassifier)
    calls: list[int] = []
    model.sampling.attention.register_forward_hook(lambda *_: calls.append(1))
    view, image, _ = experiment_data(config).load("train", torch.arange(2))
    several, _ = model(view, image, generator=torch.Generator().manual_seed(5), draws=3)
    assert len(calls) == 1
    one, _ = model(view, image, generator=torch.Generator().manual_seed(5))
    assert several.shape == (6, 2)
    torch.testing.assert_close(several[:2], one)
    assert not torch.equal(several[:2], several[2:4])
    assert not torch.equal(several[2:4], several[4:])
    train(config)
    logged = json.loads((tmp_path / "run" / "training.json").read_text())["metrics"]
    assert 0 < logged["train/loss"] < 2


def test_the_loss_of_several_draws_is_their_mean(colon_cancer: Path, tmp_path: Path) -> None:
    config = small_colon(colon_cancer, tmp_path / "run")
    task, label = ClassificationTask(config), torch.tensor([0, 1])
    logits = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    each = torch.stack([task.loss(draw, label) for draw in logits])
    torch.testing.assert_close(task.loss(logits.flatten(0, 1), label.repeat(3)), each.mean())
