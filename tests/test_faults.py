"""Faults provoked in tiny runs: kills, full disks, damaged and foreign files, two starts at once."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from ats import _files
from ats._files import remove_parts, write_whole
from ats.experiments.checkpoints import read_checkpoint, write_checkpoint
from ats.experiments.commands.command_line import run
from ats.experiments.config import DiagnosticsConfig, ExperimentConfig
from ats.experiments.run_folder import RunFolder
from ats.experiments.schedule import learning_rate_factor
from ats.experiments.training import InterruptedRunError, LostRankError, train
from tests.faults import KILLED, equal, records, stopped_copy, tiny, trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> ExperimentConfig:
    return stopped_copy(whole, tmp_path)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder of runs that `tests.faults` broke, and what it tells of them."""
    place = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", str(place)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return place, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_kill_at_any_file_ends_bit_equal_with_complete_records(faulty: tuple[Path, list[dict[str, Any]]]) -> None:
    """Weights, optimiser, snapshots, rows and summary; nothing is left over, and nothing in the way."""
    place, told = faulty
    expected = records(place / "whole")
    assert {name for name in expected if name.endswith((".ckpt", ".csv", "training.json"))} == {
        "checkpoints/last.ckpt", "checkpoints/step-0000002.ckpt", "checkpoints/step-0000004.ckpt",
        "csv/version_0/metrics.csv", "training.json",
    }  # fmt: skip
    kills = [each for each in told if "killed" in each]
    assert len(kills) >= 9, "nine files and more are written"
    for kill in kills:
        assert (kill["killed"], kill["resumed"]) == (KILLED, 0), kill
        found = records(Path(kill["folder"]))
        assert found.keys() == expected.keys(), kill
        for name, value in expected.items():
            assert equal(found[name], value), (kill, name)


def test_a_run_on_a_disk_that_fills_goes_on_once_there_is_room(faulty: tuple[Path, list[dict[str, Any]]]) -> None:
    place, told = faulty
    assert [each for each in told if "full" in each] == [{"full": 0, "after": 0}]
    assert equal(records(place / "full"), records(place / "whole"))


def test_every_epoch_has_its_row_and_the_summary_its_metrics(whole: Path) -> None:
    header, *rows = [line.split(",") for line in (whole / "csv/version_0/metrics.csv").read_text().splitlines()]
    losses = {row[header.index("step")]: row[header.index("train/loss")] for row in rows}
    assert list(losses) == ["1", "3"]
    summary = json.loads((whole / "training.json").read_text())
    assert float(losses["3"]) == summary["metrics"]["train/loss"]
    assert summary["ran_on"] == {
        "devices": 1, "precision": "32-true", "sync_batchnorm": False, "images_a_step": 4,
    }  # fmt: skip


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, {"step": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, call, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert read_checkpoint(path) == {"step": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_left_overs_are_nobodys_work(tmp_path: Path) -> None:
    """Those of a dead process go, those of a living one stay; neither keeps a run from its folder."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = _files._host()
    dead = [f".config.json.{ended.pid}.part", f".last.ckpt.{host}.{ended.pid}-7.part"]
    living = [f".config.json.{host}.{os.getppid()}-1.part", f".config.json.elsewhere.{ended.pid}-1.part"]
    for name in (*dead, *living, "my.part", ".7.part"):
        (tmp_path / name).write_bytes(b"half")
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*living, "my.part", ".7.part"}
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        RunFolder(tmp_path).check(tiny(tmp_path))
    for name in ("my.part", ".7.part"):
        (tmp_path / name).unlink()
    assert RunFolder(tmp_path).check(tiny(tmp_path)) is False


def test_long_names_are_written_too(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120 + ".json")
    write_whole(path, b"{}")
    assert path.read_bytes() == b"{}"


def test_a_second_command_in_the_same_folder_gets_a_line(copy: ExperimentConfig) -> None:
    """From another process: it sees who is there, and once that is gone, killed, the run goes on."""
    folder = RunFolder(copy.run_folder)
    told, tell = os.pipe()
    other = os.fork()
    if not other:
        with folder.held():
            os.write(tell, b"held")
            time.sleep(600)
        os._exit(1)
    try:
        assert os.read(told, 4) == b"held"
        with pytest.raises(ValueError, match=rf"run is in use by process {other} on .*, since 20.*--output"):
            train(copy)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    train(copy)
    assert not {".lock", ".holder.json"} & {path.name for path in folder.path.iterdir()}


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "runs" / "run"
    nowhere = tmp_path / "nowhere"
    assert run(["train", "colon-cancer", "--data.folder", str(nowhere), "--output", str(place)]) == 1
    assert str(nowhere) in capsys.readouterr().err
    crowded = dataclasses.replace(tiny(place), data=dataclasses.replace(tiny(place).data, image_size=60))
    with pytest.raises(ValueError, match="make the images larger"):
        train(crowded)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_options_is_refused(copy: ExperimentConfig, tmp_path: Path) -> None:
    """config.json says one thing, the weights another: somebody copied, or two commands met."""
    other = dataclasses.replace(copy, output=tmp_path / "other", seed=1)
    last = train(other)
    shutil.copy(last, copy.run_folder / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is of a run with other options \(seed: 1 -> 0\).*--output"):
        train(copy)


@pytest.mark.parametrize(("option", "value"), [("devices", 2), ("precision", "bf16-mixed"), ("sync_batchnorm", True)])
def test_what_a_run_ran_on_is_part_of_it(copy: ExperimentConfig, option: str, value: Any) -> None:
    last = copy.run_folder / "checkpoints" / "last.ckpt"
    content = read_checkpoint(last)
    before = content["ran_on"][option]
    write_checkpoint(last, content | {"ran_on": content["ran_on"] | {option: value}})
    advice = f"trained with {option}={value}, and going on with {before} .*--trainer.{option} {value}"
    with pytest.raises(ValueError, match=advice):
        train(copy)


def test_a_complete_run_without_its_checkpoint_says_so_and_can_be_trained_anew(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ValueError, match=r"last\.ckpt is gone; put it back, or remove training\.json"):
        train(tiny(folder))
    (folder / "training.json").unlink()
    assert train(tiny(folder)).exists()
    assert equal(records(folder), records(whole))


def test_a_complete_run_is_trained_on(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a constant rate, two epochs and two more are four; what told of the shorter training is kept aside."""

    def of(name: str, epochs: int, **trainer: Any) -> ExperimentConfig:
        config = tiny(tmp_path / name, snapshots=0, **trainer)
        return dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=epochs, schedule="constant"))

    train(of("run", 2))
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match=r"optim\.epochs: 2 -> 4\); to train it on, add --trainer\.extend"):
        train(of("run", 4))
    with pytest.raises(ValueError, match=r"optim\.epochs: 2 -> 1\); name another folder"):
        train(of("run", 1, extend=True))
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 4
    train(of("run", 4, extend=True))
    assert {path.name for path in (tmp_path / "run" / "until-step-4").iterdir()} == {"training.json", "evaluation.json"}
    shutil.rmtree(tmp_path / "run" / "until-step-4")
    train(of("straight", 4))
    found, expected = records(tmp_path / "run"), records(tmp_path / "straight")
    del found["config.json"]["trainer"], expected["config.json"]["trainer"]
    assert equal(found, expected)
    capsys.readouterr()
    train(of("run", 4))
    assert "is complete" in capsys.readouterr().out


def test_a_longer_cosine_is_entered_where_the_run_stands(tmp_path: Path) -> None:
    """The rate had fallen to a fiftieth; half of the longer schedule is over, where it is at about a half."""
    rates = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    config = tiny(tmp_path / "run")
    train(config, callbacks=(Note(),))
    longer = dataclasses.replace(config.optim, epochs=4)
    train(dataclasses.replace(tiny(tmp_path / "run", extend=True), optim=longer), callbacks=(Note(),))
    short = [config.optim.learning_rate * learning_rate_factor(step, 4, config.optim) for step in range(4)]
    long = [config.optim.learning_rate * learning_rate_factor(step, 8, longer) for step in range(4, 8)]
    assert rates == pytest.approx(short + long)


class StopAt(L.Callback):
    """Interrupt as Ctrl-C does, or fail."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def test_what_diagnostics_remember_goes_on_too(tmp_path: Path) -> None:
    """The look at step 3 is at the losses since step 0, some of them from before the stop."""

    def watched(name: str) -> ExperimentConfig:
        watch = DiagnosticsConfig(every=3, gradient_draws=2)
        return dataclasses.replace(tiny(tmp_path / name), diagnostics=watch)

    train(watched("whole"))
    with pytest.raises(InterruptedRunError):
        train(watched("stopped"), callbacks=(StopAt(2, KeyboardInterrupt()),))
    train(watched("stopped"))
    found, expected = records(tmp_path / "stopped"), records(tmp_path / "whole")
    assert "attention/covered_mass" in expected["csv/version_0/metrics.csv"]
    assert equal(found, expected)
    states = [
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["callbacks"]["AttentionDiagnostics"]
        for name in ("stopped", "whole")
    ]
    assert states[0] == states[1]
    assert states[0]["step"] == 3
    assert len(states[0]["losses"]) == 0


def test_a_rank_that_died_is_told_in_a_line(tmp_path: Path) -> None:
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]")
    with pytest.raises(LostRankError, match=r"a process of the training in .* ended.*the same command goes on"):
        train(tiny(tmp_path / "run"), callbacks=(StopAt(1, lost),))
    with pytest.raises(RuntimeError, match=r"^a defect of a callback$"):
        train(tiny(tmp_path / "other"), callbacks=(StopAt(1, RuntimeError("a defect of a callback")),))
