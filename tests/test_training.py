"""Training: a seed repeats a run, a run that stopped ends as if it had not, and nothing is overwritten."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from ats.experiments.build import build_model, view_size
from ats.experiments.config import DiagnosticsConfig, ExperimentConfig, OptimConfig, TrainerConfig, differences, to_dict
from ats.experiments.experiment import Batch
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.megapixel_mnist import MegapixelMNISTConfig, MegapixelMNISTData
from ats.experiments.progress import ProgressLines
from ats.experiments.registry import EXPERIMENTS, experiment_data, from_dict
from ats.experiments.training import InterruptedRunError, train

EPOCHS = 4


def tiny(folder: Path, **changes: object) -> ExperimentConfig:
    config = ExperimentConfig(
        preset="demo",
        output=folder,
        data=MegapixelMNISTConfig(digits="bundled", image_size=140, n_noise=2, train_images=24, test_images=8),
        optim=OptimConfig(epochs=EPOCHS, batch_size=8, learning_rate=1e-2, warmup=0.2, schedule="cosine"),
        trainer=TrainerConfig(accelerator="cpu", devices="1"),
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


class StopAt(L.Callback):
    """Interrupt as Ctrl-C does, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("runs") / "whole"))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_a_run_that_was_interrupted_ends_with_the_same_weights(uninterrupted: Path, tmp_path: Path) -> None:
    """Resuming would lose or repeat draws, batches, optimiser state or schedule if a single bit differed."""
    config = tiny(tmp_path / "stopped")
    with pytest.raises(InterruptedRunError, match="same command"):
        train(config, callbacks=(StopAt(step=3 * 2 + 1),))
    assert not (config.run_folder / "training.json").exists()
    assert_same(weights(train(config)), weights(uninterrupted))
    summary = json.loads((config.run_folder / "training.json").read_text())
    assert summary["steps"] == 3 * EPOCHS


def test_a_run_that_was_killed_ends_with_the_same_weights(uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL gives no chance to write anything: what is on disk must be enough, and never half written."""
    config = tiny(tmp_path / "killed")
    script = (
        "import json, sys, time, lightning as L\n"
        "from ats.experiments.registry import from_dict\n"
        "from ats.experiments.training import train\n"
        "class Slow(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *_):\n"
        "        if trainer.current_epoch >= 2: time.sleep(600)\n"
        "train(from_dict(json.loads(sys.argv[1])), callbacks=(Slow(),))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(to_dict(config))])
    last = config.run_folder / "checkpoints" / "last.ckpt"
    try:
        deadline = time.monotonic() + 600
        while not (last.exists() and torch.load(last, weights_only=True)["epoch"] == 1):
            assert process.poll() is None, "the training ended by itself"
            assert time.monotonic() < deadline, "no checkpoint within ten minutes"
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert_same(weights(train(config)), weights(uninterrupted))


def test_diagnostics_change_nothing_and_a_watched_run_goes_on_as_it_was(uninterrupted: Path, tmp_path: Path) -> None:
    """Looked at on every other step, gradients included, stopped and resumed: the weights of a run nobody watched."""
    config = tiny(tmp_path / "watched", diagnostics=DiagnosticsConfig(every=2, gradient_draws=2))
    with pytest.raises(InterruptedRunError):
        train(config, callbacks=(StopAt(step=3 * 2 + 1),))
    assert_same(weights(train(config)), weights(uninterrupted))
    (log,) = (config.run_folder / "csv").glob("version_*/metrics.csv")
    header = log.read_text().splitlines()[0].split(",")
    assert {"attention/covered_mass", "attention/gradient_snr", "attention/border_mass"} <= set(header)
    assert differences(config, tiny(config.run_folder)) == []


def test_the_first_epochs_can_have_smaller_images(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    larger = dataclasses.replace(config.data, small_epochs=2, medium_epochs=1, image_size=420, n_noise=5)
    config = dataclasses.replace(config, data=larger, optim=dataclasses.replace(config.optim, epochs=4))
    data = experiment_data(config)
    assert isinstance(data, MegapixelMNISTData)
    indices = torch.tensor([3, 0, 5])
    for name, epoch, expected in (
        ("train", 0, 140), ("train", 1, 140), ("train", 2, 210), ("train", 3, 420), ("train", None, 420),
        ("test", None, 420),
    ):  # fmt: skip
        view, image, label = data.load(name, indices, epoch=epoch)
        assert image.shape == (3, 1, expected, expected)
        assert view.shape[2:] == view_size(config, (expected, expected))
        split = data.split(name) if epoch is None else data.trained_on(epoch)
        assert torch.equal(label, split.labels[indices])
        assert split.glyph_ids.shape == (len(data.split(name)), 5 + (1 if expected == 140 else 5))
    assert data.trained_on(3) is data.split("train")
    used = [data.trained_on(epoch).glyph_ids[:, :5].tolist() for epoch in (0, 1, 2, 3, 0)]
    assert used[0] == used[4]  # whether the epoch before was seen, as in a run that goes on, or not
    assert len({str(ids) for ids in used}) == 4
    shapes = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, index: int) -> None:
            shapes.append(batch[1].shape[-1])

    train(config, callbacks=(Note(),))
    assert shapes == [140] * 6 + [210] * 3 + [420] * 3
    with pytest.raises(ValueError, match=r"data\.small_epochs must be at least 0"):
        MegapixelMNISTConfig(small_epochs=-1)
    with pytest.raises(ValueError, match=r"small_epochs=2 and data\.medium_epochs=1 are more than optim\.epochs=2"):
        dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=2))
    smaller = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=3))  # none of full size
    assert experiment_data(smaller).stages() == [("small", 6), ("medium", 3)]


@pytest.mark.parametrize(("option", "value"), [("every", -1), ("gradient_draws", -1), ("gradient_draws", 1)])
def test_diagnostics_that_mean_nothing_are_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"diagnostics.{option} must be"):
        DiagnosticsConfig(**{option: value})


def test_a_seed_repeats_a_run_and_another_does_not(uninterrupted: Path, tmp_path: Path) -> None:
    assert_same(weights(train(tiny(tmp_path / "again"))), weights(uninterrupted))
    other = weights(train(tiny(tmp_path / "other", seed=1)))
    assert not torch.equal(other["model.head.weight"], weights(uninterrupted)["model.head.weight"])


def test_a_complete_run_is_left_alone(uninterrupted: Path) -> None:
    before = uninterrupted.stat().st_mtime_ns
    assert train(tiny(uninterrupted.parent.parent)) == uninterrupted
    assert uninterrupted.stat().st_mtime_ns == before


def test_a_folder_of_another_run_is_refused(uninterrupted: Path) -> None:
    config = tiny(uninterrupted.parent.parent, seed=5)
    with pytest.raises(ValueError, match=r"seed: 0 -> 5.*--output"):
        train(config)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        train(tiny(tmp_path))


def test_a_first_attempt_that_failed_does_not_lock_its_folder(tmp_path: Path) -> None:
    """The advice in the error would be impossible to follow if config.json of nothing at all stood in its way."""
    config = tiny(tmp_path / "run")
    impossible = dataclasses.replace(config, model=dataclasses.replace(config.model, n_patches=101))
    with pytest.raises(ValueError, match="n=101"):
        train(impossible)
    train(config)
    assert json.loads((config.run_folder / "config.json").read_text())["model"]["n_patches"] == 10


def test_a_damaged_configuration_is_named(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(uninterrupted.parent.parent, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        train(tiny(folder))


def test_views_are_whole_cells() -> None:
    config = tiny(Path("unused"))
    assert view_size(config, (140, 140)) == (18, 18)  # of 140 · 0.12 = 16.8 pixels, in cells of 3
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, networks="paper"))
    assert view_size(config, (140, 140)) == (17, 17)


def test_logs_hold_every_epoch(uninterrupted: Path) -> None:
    """Without them nobody can plot a curve: loss, error and entropy, epoch by epoch, as CSV and for TensorBoard."""
    folder = uninterrupted.parent.parent
    rows = (folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    losses = [row.split(",")[header.index("train/loss")] for row in rows[1:]]
    assert sum(bool(loss) for loss in losses) == EPOCHS
    assert {"train/error", "train/entropy"} <= set(header)
    assert list((folder / "tensorboard").rglob("events.out.tfevents.*"))


def test_progress_is_told_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(tmp_path / "run"), callbacks=(ProgressLines(every=0),))
    printed = capsys.readouterr().out
    assert f"step 5/{3 * EPOCHS}  loss of this batch" in printed
    assert f"epoch {EPOCHS}/{EPOCHS}  train/entropy" in printed


def test_validation_is_logged_where_it_is_asked_for(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_images=8))
    train(config)
    summary = json.loads((config.run_folder / "training.json").read_text())
    assert 0 <= summary["metrics"]["validation/error"] <= 1


ALL_PRESETS = [config for experiment in EXPERIMENTS.values() for config in experiment.presets.values()]


@pytest.mark.parametrize("config", ALL_PRESETS, ids=lambda config: config.run_folder.name)
def test_configurations_survive_json(config: ExperimentConfig) -> None:
    config = dataclasses.replace(config, output=Path("somewhere"))
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert differences(config, again) == []


def test_estimator_and_control_variate_reach_the_model() -> None:
    """Both change nothing but noise: a run that ignored them would look well."""
    config = EXPERIMENTS["megapixel-mnist"].presets["demo"]
    for estimator, control_variate in (("ordered", False), ("unordered", True)):
        model = dataclasses.replace(config.model, estimator=estimator, control_variate=control_variate)
        sampling = build_model(dataclasses.replace(config, model=model)).sampling
        assert (sampling.estimator, sampling.control_variate) == (estimator, control_variate)


def test_a_configuration_of_another_version_is_named_as_such() -> None:
    with pytest.raises(ValueError, match="not a configuration of this version"):
        from_dict({"seed": 0})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "train_images", 0),
        ("optim", "batch_size", 0),
        ("model", "n_patches", 0),
        ("model", "view_scale", 1.5),
        ("data", "n_noise", -1),
        ("data", "validation_images", -1),
        ("optim", "learning_rate", -1.0),
        ("optim", "warmup", 1.0),
        ("optim", "widening", 0.5),
        ("optim", "restart", 1.0),
    ],
)
def test_impossible_options_are_refused(section: str, name: str, value: float) -> None:
    config = EXPERIMENTS["megapixel-mnist"].presets["demo"]
    with pytest.raises(ValueError, match=f"{section}.{name}"):
        dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def test_a_bound_that_is_not_there_cannot_widen() -> None:
    config = EXPERIMENTS["megapixel-mnist"].presets["paper"]
    with pytest.raises(ValueError, match=r"optim.widening=2.0 widens .* this model has none; leave it at 1"):
        ClassificationTask(dataclasses.replace(config, optim=dataclasses.replace(config.optim, widening=2.0)))


def test_draws_differ_between_steps_ranks_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that drew alike would waste their work; steps that did would never see the rest of an image."""
    task = ClassificationTask(tiny(Path("unused")))

    def draw(step: int) -> float:
        return float(torch.rand((), generator=task.draw_generator(0, step)))

    values = [draw(0), draw(1)]
    assert draw(0) == values[0]
    monkeypatch.setattr(ClassificationTask, "global_rank", 1)
    values += [draw(0)]
    monkeypatch.setattr(ClassificationTask, "global_rank", 0)
    task.config = dataclasses.replace(task.config, seed=1)
    values += [draw(0)]
    assert len(set(values)) == 4


def test_mnist_is_looked_for_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ATS_DATA", raising=False)
    assert MegapixelMNISTConfig().find_folder() == tmp_path / "torch-ats" / "mnist"
    monkeypatch.setenv("ATS_DATA", "/data")
    assert MegapixelMNISTConfig().find_folder() == Path("/data/mnist")
    assert MegapixelMNISTConfig(folder=Path("/mine")).find_folder() == Path("/mine")


def test_two_processes_train_together(tmp_path: Path) -> None:
    """Data-parallel training by Lightning's own flags: it ends, and both ranks hold the weights that were saved."""
    config = tiny(tmp_path / "ddp", trainer=TrainerConfig(accelerator="cpu", devices="2", strategy="ddp"))
    script = (
        "import json, sys\n"
        "from ats.experiments.registry import from_dict\n"
        "from ats.experiments.training import train\n"
        "train(from_dict(json.loads(sys.argv[1])))\n"
    )
    path = tmp_path / "ddp.py"
    path.write_text(script)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path), json.dumps(to_dict(config))],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((config.run_folder / "training.json").read_text())["steps"]
    assert steps == 12 // 8 * EPOCHS  # each rank has half of the 24 images, in batches of 8, the rest dropped
