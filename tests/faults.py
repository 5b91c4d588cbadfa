"""A tiny run, and a process that runs it again and again, killed at one file after the other; used by test_faults.py.

As a program: ``python -m tests.faults FOLDER``. It imports once and forks for each run, which costs a second less each.
"""

import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import ats._files
from ats.experiments import training
from ats.experiments.checkpoints import read_checkpoint
from ats.experiments.config import ExperimentConfig, OptimConfig, TrainerConfig
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.megapixel_mnist import MegapixelMNISTConfig
from ats.experiments.registry import EXPERIMENTS, experiment_data

KILLED = 9
EVENTS = [("open", "config.json"), ("write", "last.ckpt"), ("fsync", "step-0000004.ckpt"), ("folder", "last.ckpt"),
          ("write", "training.json")]  # fmt: skip


def tiny(folder: Path, **trainer: Any) -> ExperimentConfig:
    """Two epochs of two steps, a snapshot after each."""
    data = MegapixelMNISTConfig(digits="bundled", image_size=140, n_noise=0, train_images=8, test_images=2)
    options = TrainerConfig(accelerator="cpu", devices="1", snapshots=2)
    model = EXPERIMENTS["megapixel-mnist"].presets["demo"].model
    return ExperimentConfig(
        preset="demo",
        output=folder,
        data=data,
        model=dataclasses.replace(model, n_patches=2),
        optim=OptimConfig(epochs=2, batch_size=4, learning_rate=1e-2, schedule="cosine"),
        trainer=dataclasses.replace(options, **trainer),
    )


def trained(place: Path) -> Path:
    """A complete run's folder, not to be changed."""
    config = tiny(place / "whole")
    training.train(config)
    return config.run_folder


def stopped_copy(whole: Path, place: Path) -> ExperimentConfig:
    """A copy of a run that was stopped after its last checkpoint, to be broken."""
    shutil.copytree(whole, place / "run")
    (place / "run" / "training.json").unlink()
    return tiny(place / "run")


def evaluated(devices: int) -> dict[str, float]:
    """Error and loss on five images, a batch each, by the most probable cells: without any chance."""
    config = tiny(Path("unused"))
    data = dataclasses.replace(config.data, validation_images=5, test_images=5)
    config = dataclasses.replace(config, data=data, optim=dataclasses.replace(config.optim, batch_size=1))
    L.seed_everything(0, verbose=False)
    task = ClassificationTask(config)
    task.model.sampling.sampler.selection = "topk"
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        use_distributed_sampler=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    found: dict[str, float] = {}
    for run in (trainer.validate, trainer.test):
        found |= run(task, datamodule=experiment_data(config), verbose=False)[0]
    return found


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def records(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for seconds and where it is."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".ckpt":
            content = read_checkpoint(path)
            found[name] = {part: content[part] for part in ("state_dict", "optimizer_states", "epoch", "global_step")}
            found[name]["rows"] = content["callbacks"]["EpochCheckpoint"]
        elif path.suffix == ".csv":
            found[name] = path.read_text()
        elif path.suffix == ".json":
            values = json.loads(path.read_text())
            found[name] = {key: value for key, value in values.items() if key not in ("seconds", "output")}
        elif path.is_file() and "tfevents" not in name and path.name != "hparams.yaml":
            found[name] = "there"
    return found


def kill_at(replacement: int) -> None:
    """Kill this process where it would rename its file number `replacement`: others are in place, this one is not."""
    real, counted = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        counted[0] += 1
        if counted[0] == replacement:
            os._exit(KILLED)
        real(source, target)

    ats._files.os.replace = replace  # type: ignore[attr-defined]


def kill_in(event: str, file: str, nth: int = 1) -> None:
    """Kill this process as it opens, writes half of, flushes or puts in its place the n-th file of that name.

    With "folder": as it flushes the folder's list of names, once the file is in its place.
    """
    real_open, real_fsync, counted = Path.open, os.fsync, [0]
    path = [""]

    def opened(self: Path, mode: str = "r", **more: Any) -> Any:
        part = mode in ("wb", "w+b") and ats._files.is_part(self) and self.name.startswith(f".{file}.")
        counted[0] += part
        path[0] = str(self) if part and counted[0] == nth else ""
        if not path[0]:
            return real_open(self, mode, **more)
        if event == "open":
            os._exit(KILLED)
        found: Any = real_open(self, mode, **more)
        if event == "write":
            real = found.write

            class Half:
                fileno, flush = found.fileno, found.flush

                def __enter__(self) -> "Half":
                    return self

                def __exit__(self, *_: object) -> None: ...

                def write(self, data: Any) -> None:
                    real(data[: len(data) // 2])
                    found.flush()
                    os._exit(KILLED)

            return Half()
        return found

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        if path[0] and event == ("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync"):
            os._exit(KILLED)

    Path.open = opened  # type: ignore[method-assign, assignment]
    ats._files.os.fsync = fsync  # type: ignore[attr-defined]


def fill_disk(config: ExperimentConfig) -> None:
    """Train where no file may have more than 50 kB, as near as a test comes to a full disk; the first checkpoint has.

    Raises:
        AssertionError: the error does not name the file, or something of it is left.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with pytest.raises(OSError, match="File too large") as caught:
        training.train(config)
    assert caught.value.filename == str(config.run_folder / "checkpoints" / "step-0000002.ckpt")
    assert not any(map(ats._files.is_part, config.run_folder.rglob("*")))


def forked(work: Callable[[], Any]) -> int:
    """Do `work` in a process of its own; its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(place: Path) -> None:
    """Run whole, then killed at each file and resumed; prints a line of JSON a killed run: file, and both statuses."""
    config = tiny(place / "whole")
    data = experiment_data(config)
    for name in ("train", "validation", "test"):
        data.labels(name)  # made once, for all processes
    training.experiment_data = lambda _: data
    assert forked(lambda: training.train(config)) == 0
    full = dataclasses.replace(config, output=place / "full")
    print(
        json.dumps({"full": forked(lambda: fill_disk(full)), "after": forked(lambda: training.train(full))}), flush=True
    )
    for event, file in EVENTS:
        again = dataclasses.replace(config, output=place / f"{event} {file}")

        def killed_in(again: ExperimentConfig = again, event: str = event, file: str = file) -> None:
            kill_in(event, file)
            training.train(again)

        statuses = {"killed": forked(killed_in), "resumed": forked(lambda again=again: training.train(again))}
        print(json.dumps({"folder": str(again.run_folder)} | statuses), flush=True)
    for number in itertools.count(1):
        again = dataclasses.replace(config, output=place / str(number))

        def killed(again: ExperimentConfig = again, number: int = number) -> None:
            kill_at(number)
            training.train(again)

        status = forked(killed)
        if status == 0:
            return
        resumed = forked(lambda again=again: training.train(again))
        print(json.dumps({"folder": str(again.run_folder), "killed": status, "resumed": resumed}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
