"""Evaluation, the demo and its picture, and the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ats
from ats.experiments.build import view_size
from ats.experiments.commands.command_line import run
from ats.experiments.commands.demo import run_demo
from ats.experiments.config import ExperimentConfig, to_dict
from ats.experiments.evaluation import evaluate, held_out_data
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.study.inference import InferenceOptions, measure
from ats.experiments.trained import TrainedModel, load
from ats.experiments.training import train
from ats.models import ATSClassifier
from ats.models.classifier import PlacedFeatures
from tests.helpers import seeded
from tests.test_training import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("evaluation") / "run"))


def fresh(config: ExperimentConfig) -> TrainedModel:
    """As `ats.load` would give it, with weights that nothing has trained."""
    task = ClassificationTask(config).eval()
    return TrainedModel(config, task.model, task.classes)


def small_demo(folder: Path) -> ExperimentConfig:
    return dataclasses.replace(tiny(folder), optim=dataclasses.replace(tiny(folder).optim, epochs=1))


def test_evaluation_repeats_with_its_seed_and_not_with_another(checkpoint: Path) -> None:
    task = load(checkpoint)
    first, again, other = (evaluate(task, repeats=2, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.loss != other.loss
    assert first.images == 8
    assert first.n_patches == 10


def test_averages_are_those_of_the_single_draws(checkpoint: Path) -> None:
    """error and loss are means over draws; by Jensen's inequality the averaged prediction has no larger loss."""
    task = load(checkpoint)
    result = evaluate(task, repeats=4)
    assert result.averaged_loss <= result.loss
    assert (result.error * 4 * result.images) == pytest.approx(round(result.error * 4 * result.images))
    single = evaluate(task, repeats=1)
    assert single.loss == pytest.approx(single.averaged_loss)
    assert single.error == single.averaged_error


def test_topk_needs_no_seed_and_leaves_the_model_as_it_was(checkpoint: Path) -> None:
    task = load(checkpoint)
    results = [evaluate(task, method="topk", n_patches=4, seed=seed) for seed in (0, 1)]
    assert results[0] == results[1]
    assert results[0].n_patches == 4
    assert task.model.sampling.sampler.n_patches == 10
    assert task.model.sampling.sampler.selection == "sample"
    with pytest.raises(ValueError, match="repeats=2"):
        evaluate(task, method="topk", repeats=2)


def test_anytime_reads_what_it_needs(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tolerance that is always met stops at the first look, one that never is spends the budget; a seed repeats."""
    task = load(checkpoint)
    loose, tight = (evaluate(task, method="anytime", budget=12, tolerance=t, repeats=2) for t in (1e6, 0.0))
    assert (loose.n_patches, tight.n_patches) == (8, 12)
    assert tight == evaluate(task, method="anytime", budget=12, tolerance=0.0, repeats=2)
    result = tmp_path / "result.json"
    line = f"evaluate {checkpoint} --method anytime --lead 2 --budget 14 --images 6 --output {result}"
    assert run(line.split()) == 0
    assert "patches, anytime" in " ".join(capsys.readouterr().out.split())
    (written,) = json.loads(result.read_text())
    assert 8 <= written["n_patches"] <= 14
    for options, message in [
        ({"method": "anytime"}, "needs a tolerance or a lead"),
        ({"method": "anytime", "lead": 2.0, "n_patches": 5}, "give it a budget, not n_patches=5"),
        ({"lead": 2.0}, "a tolerance or a lead is for method='anytime', got method='sample'"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(task, **options)  # type: ignore[arg-type]


def test_topk_works_for_a_model_trained_with_replacement() -> None:
    config = tiny(Path("unused"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, replace=True))
    task = fresh(config)
    assert evaluate(task, method="topk").images == 8
    assert task.model.sampling.sampler.replace


def test_fewer_images_are_the_first_ones_and_zero_draws_are_refused(checkpoint: Path) -> None:
    task = load(checkpoint)
    assert evaluate(task, images=3).images == 3
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        evaluate(task, repeats=0)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        load(tmp_path / "nothing.ckpt")
    other = tmp_path / "other.ckpt"
    torch.save({"weights": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"other\.ckpt is not a checkpoint"):
        load(other)


def test_the_demo_writes_its_numbers_and_picture_and_keeps_an_older_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    config = small_demo(folder)
    run_demo(folder, seed=3, config=config)
    printed = capsys.readouterr().out
    assert "ATS-16" in printed
    assert "uniform-16" in printed
    metrics = json.loads((folder / "metrics.json").read_text())
    first = f"It errs on {metrics['test_error']:.3f} of 8 unseen images. What it looked at: {folder / 'attention.png'}"
    assert first in printed.partition("Training with uniform attention")[0]  # there while the other one trains
    promised = {"test_error", "uniform_test_error", "seconds", "n_patches", "image_size", "train_images", "seed"}
    assert promised <= metrics.keys()
    assert (metrics["seed"], metrics["image_size"], metrics["train_images"]) == (3, 140, 24)
    learned = load(folder / "learned" / "checkpoints" / "last.ckpt")
    options = {"n_patches": metrics["n_patches"], "repeats": metrics["repeats"]}
    assert metrics["test_error"] == evaluate(learned, **options, seed=3).error
    with Image.open(folder / "attention.png") as picture:
        assert min(picture.size) > 800  # labels of 7.5 points are readable from there
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 100  # not a blank page

    run_demo(folder, seed=3, config=config)
    kept = json.loads((tmp_path / "demo-1" / "metrics.json").read_text())
    again = json.loads((folder / "metrics.json").read_text())
    assert {k: v for k, v in kept.items() if "seconds" not in k} == {
        k: v for k, v in again.items() if "seconds" not in k
    }


def test_training_and_evaluating_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    options = (
        "train megapixel-mnist --preset demo --data.image-size 140 --data.n-noise 2 --data.train-images 16 "
        f"--data.test-images 8 --optim.epochs 1 --optim.batch-size 8 --output {folder} --seed 4 --model.n-patches 3"
    )
    assert run(options.split()) == 0
    recorded = json.loads((folder / "config.json").read_text())
    assert (recorded["seed"], recorded["data"]["image_size"], recorded["model"]["n_patches"]) == (4, 140, 3)
    assert recorded["optim"]["learning_rate"] == EXPERIMENTS["megapixel-mnist"].presets["demo"].optim.learning_rate
    checkpoint, result = folder / "checkpoints" / "last.ckpt", tmp_path / "result.json"
    evaluation = f"evaluate {checkpoint} --method topk --n-patches 5 --images 6 --n-patches 2 --output {result}"
    assert run(evaluation.split()) == 0
    assert "6 test images, 5 patches, topk. Data: Megapixel MNIST of the bundled digits" in " ".join(
        capsys.readouterr().out.split()
    )
    written = json.loads(result.read_text())
    assert [(row["n_patches"], row["images"]) for row in written] == [(5, 6), (2, 6)]
    assert all(0 <= row["error"] <= 1 for row in written)


def test_positions_from_the_command_line(tmp_path: Path) -> None:
    """Trained, watched, resumed from its configuration, and evaluated in each way that reads patches."""
    folder = tmp_path / "folder"
    options = (
        "train megapixel-mnist --preset demo --data.image-size 140 --data.n-noise 2 --data.train-images 16 "
        f"--data.test-images 8 --optim.epochs 1 --optim.batch-size 8 --output {folder} --model.positions "
        "--diagnostics.every 1 --diagnostics.gradient-draws 2"
    )
    assert run(options.split()) == 0
    task = load(folder)
    assert isinstance(task.model, ATSClassifier)
    assert isinstance(task.model.sampling.feature, PlacedFeatures)
    for ways in ("--n-patches 5", "--method topk", "--method anytime --lead 2 --budget 9"):
        assert run(f"evaluate {folder} {ways}".split()) == 0


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("fly", 2, "unknown command 'fly'"),
        ("train cifar", 1, "unknown experiment 'cifar'"),
        ("train megapixel-mnist --preset huge", 1, "unknown preset 'huge'"),
        ("train megapixel-mnist --preset demo --optim.epochs 0", 2, "optim.epochs must be at least 1, got 0"),
        ("train megapixel-mnist --preset demo --seed -1", 2, "seed must be at least 0, got -1"),
        (
            "train megapixel-mnist --preset demo --model.replace --model.estimator unordered",
            2,
            "unordered needs model.replace=False",
        ),
        ("evaluate", 2, "name a run, or a checkpoint"),
        ("evaluate nowhere.ckpt", 1, "no checkpoint at nowhere.ckpt"),
    ],
)
def test_mistakes_get_a_line_that_says_what_is_wrong(
    line: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == status
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("output", "message"),
    [(".", "--output . is the current folder"), ("..", "or one around it"), ("file", "--output file is a file")],
)
def test_a_demo_needs_a_folder_of_its_own(
    output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is renamed when the next one begins, which the current folder cannot be."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert run(["demo", "--output", output]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_device_that_is_not_there_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(checkpoint), "--device", "gpu"]) == 1
    assert "--device gpu cannot be used here" in capsys.readouterr().err


def test_a_runs_folder_stands_for_its_checkpoint_and_no_patches_are_none(checkpoint: Path) -> None:
    task = load(checkpoint.parent.parent)
    assert torch.equal(task.model.head.weight, load(checkpoint).model.head.weight)
    with pytest.raises(ValueError, match="n_patches must be at least 1, got 0"):
        evaluate(task, n_patches=0)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "ats", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ats.__version__


def test_help_lists_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "evaluate RUN" in capsys.readouterr().out
    assert run(["train", "--help"]) == 0
    assert "megapixel-mnist" in capsys.readouterr().out
    assert run(["train", "megapixel-mnist", "--help"]) == 0
    assert "--optim.entropy-weight" in capsys.readouterr().out


def test_presets_are_the_papers_where_they_say_so() -> None:
    """Settings of the paper's Megapixel MNIST that a change must not drift away from."""
    values = to_dict(EXPERIMENTS["megapixel-mnist"].presets["paper"])
    assert values["data"] | {"folder": None} == {
        "digits": "full", "folder": None, "image_size": 1500, "n_noise": 50,
        "train_images": 5000, "validation_images": 0, "test_images": 1000, "small_epochs": 0, "medium_epochs": 0,
    }  # fmt: skip
    assert values["optim"] == {
        "epochs": 500, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup": 0.0,
        "schedule": "constant", "gradient_clip": 1.0, "entropy_weight": 1e-4,
        "updates": 0, "class_weights": False, "average": 0.0, "draws": 1, "keep": "last", "patience": 0,
        "widening": 1.0,
        "restart": 0.0,
    }  # fmt: skip
    model = values["model"]
    assert (model["networks"], model["feature_scale"]) == ("paper", 1.0)
    assert view_size(EXPERIMENTS["megapixel-mnist"].presets["paper"], (1500, 1500)) == (180, 180)


@pytest.mark.parametrize("options", [{}, {"replace": True}, {"estimator": "unordered"}])
def test_a_draw_is_pooled_by_the_estimator_that_the_run_was_trained_with(options: dict[str, object]) -> None:
    """The logits are those that the model itself gives for the same draw, whatever it was trained with."""
    config = tiny(Path("unused"))
    model = dataclasses.replace(config.model, **options)  # type: ignore[arg-type]
    trained = fresh(dataclasses.replace(config, model=model))
    _, image, _ = held_out_data(trained, 3, None).load("test", torch.arange(3))
    with torch.no_grad():
        own, sample = trained.model(trained.view(image), image, generator=seeded(5))
    prediction = trained.predict(image, generator=seeded(5))
    torch.testing.assert_close(prediction.logits, own.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained(image, generator=seeded(5)), prediction.logits)
    torch.testing.assert_close(trained(image[0], generator=seeded(5))[0].shape, own[0].shape)
    other = trained.model.sampling.estimator == "ordered" and not trained.model.sampling.sampler.replace
    pooled = ats.predict(
        trained.model.sampling, trained.model.classify, trained.view(image), image, generator=seeded(5)
    )
    assert other != torch.allclose(pooled.logits, own.double(), rtol=1e-5, atol=1e-5)  # the control
    assert sample is not None


def test_evaluating_changes_nothing_of_a_model(checkpoint: Path) -> None:
    trained = load(checkpoint)
    before = repr(trained.model), {name: value.clone() for name, value in trained.model.state_dict().items()}
    options = (
        {"method": "sample", "n_patches": 3},
        {"method": "topk", "n_patches": 2},
        {"method": "anytime", "lead": 2.0},
    )
    for some in options:
        evaluate(trained, images=2, **some)  # type: ignore[arg-type]
    measure(1, trained, InferenceOptions(images=2, draws=1, n_patches=(4,)), None)
    assert repr(trained.model) == before[0]
    assert trained.model.sampling.estimator == "ordered"
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, before[1][name]), name


def test_images_of_other_channels_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"takes images \(B, 1, H, W\) or \(1, H, W\), got \(3, 60, 60\)"):
        load(checkpoint).predict(torch.zeros(3, 60, 60, dtype=torch.uint8))


def test_a_model_that_reads_all_predicts_too_and_draws_nothing() -> None:
    config = tiny(Path("unused"))
    trained = fresh(dataclasses.replace(config, model=dataclasses.replace(config.model, method="cnn")))
    image = torch.rand(2, 1, 64, 64, generator=seeded())
    prediction = trained.predict(image)
    assert prediction.standard_error is None
    torch.testing.assert_close(prediction.logits, trained.model(trained.view(image), image)[0].double())
    with pytest.raises(ValueError, match="a CNN draws no patches"):
        trained.predict(image, n_patches=3)
