"""A run's folder: which run it holds, how far that has come, and that one command at a time works in it."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ats._files import is_part, read_json, read_object, remove_parts, write_json
from ats.experiments.config import ExperimentConfig, differences, to_dict
from ats.experiments.experiment import ExperimentData
from ats.experiments.registry import from_dict

_LENGTH = ("optim.epochs", "optim.updates")
_OF_THE_END = ("evaluation.json", "localisation.json", "curve.json", "training.json")
"""Files about a run's end, none of which hold once it is trained on; the one that says it is complete comes last."""
_ELSEWHERE = "name another folder with --output, or remove that one"


class RunFolder:
    """The files of one run. Only its first process writes to them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.data, self.summary = (path / f"{name}.json" for name in ("config", "data", "training"))
        self.checkpoints = path / "checkpoints"
        self.last, self.taught = self.checkpoints / "last.ckpt", self.checkpoints / "taught.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self._lock, self._holder = path / ".lock", path / ".holder.json"

    def recorded(self) -> ExperimentConfig | None:
        """The configuration of the run that lies here, if one does.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            return from_dict(read_json(self.config))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            text = str(error) if str(self.config) in str(error) else f"{self.config} cannot be read ({error})"
            raise ValueError(f"{text}; name another folder with --output") from error

    @property
    def evaluated(self) -> Path:
        """The checkpoint that is evaluated."""
        return self.best if self.best.exists() else self.last

    def started(self) -> bool:
        """Whether the folder holds anything that was learned."""
        return any(path.exists() for path in (self.last, self.taught, self.summary))

    def check(self, config: ExperimentConfig) -> bool:
        """Refuse what is not the run of `config`, and say whether that is complete. Changes nothing.

        Raises:
            ValueError: a file, a folder of something else, a run with other options, one that lost its checkpoint.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; name a folder with --output")
        if not self.config.exists():
            ours = (self._lock, self._holder)
            if self.path.exists() and any(path not in ours and not is_part(path) for path in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no run; name another folder with --output")
            return False
        if not self.started():
            return False
        found = self.recorded()
        assert found is not None
        longer = self._check_options(found, config)
        if longer or not self.summary.exists():
            return False
        if not self.last.exists():
            raise ValueError(
                f"{self.summary} says that the run is complete, but {self.last} is gone; put it back, or remove "
                f"{self.summary.name} to train anew"
            )
        return True

    def _check_options(self, found: ExperimentConfig, config: ExperimentConfig) -> bool:
        """Raise ValueError unless two configurations are of one run; whether the second is to train it on."""
        other = differences(found, config)
        if not other:
            return False
        if all(text.startswith(_LENGTH) for text in other) and is_longer(found, config):
            if config.trainer.extend:
                return True
            raise ValueError(
                f"{self.path} holds a run with other options ({'; '.join(other)}); to train it on, add "
                f"--trainer.extend; to begin another, {_ELSEWHERE}"
            )
        raise ValueError(f"{self.path} holds a run with other options ({'; '.join(other)}); {_ELSEWHERE}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands out for a while. The system frees the lock of a process that dies.

        Raises:
            ValueError: another command is at work here; the message says which.
        """
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"{self.path} is in use by {self._held_by()}; wait for it, stop it, or name another folder with "
                "--output"
            ) from error
        try:
            for folder in (self.path, self.checkpoints, *self.path.glob("csv/version_*")):
                remove_parts(folder)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            write_json(self._holder, {"process": os.getpid(), "host": platform.node(), "started": started})
            yield
        finally:
            for path in (self._holder, self._lock):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            lock.release()
            if made:
                with suppress(OSError):  # not empty: the run has begun
                    self.path.rmdir()

    def _held_by(self) -> str:
        try:
            holder = read_json(self._holder)
            return f"process {holder['process']} on {holder['host']}, since {holder['started']}"
        except (OSError, ValueError, KeyError, TypeError):  # it is just starting or just ending
            return "another process"

    def claim(self, config: ExperimentConfig, data: dict[str, Any] | None) -> None:
        """Make the folder that of a run, on data as `described`; call it while `held`.

        Raises:
            ValueError: as `check`, or it holds a run on other data.
        """
        self.check(config)
        if data is not None and self.started() and self.data.exists():
            known = read_json(self.data)
            if known != data:
                old, new = _in_words(known), _in_words(data)
                other = f"not on {new}" if new != old else "of which labels, splits, groups, mpp or masks were others"
                raise ValueError(f"{self.path} holds a run on {old}, {other}; {_ELSEWHERE}")
        if self.started() and (before := self.recorded()) is not None:
            if not is_longer(before, config):
                return
            steps = read_object(self.summary, "steps")["steps"] if self.summary.exists() else None
            for name in _OF_THE_END:
                if (self.path / name).exists():
                    (self.path / f"until-step-{steps}").mkdir(exist_ok=True)
                    (self.path / name).replace(self.path / f"until-step-{steps}" / name)
        if data is not None and not self.started():
            write_json(self.data, data)
        write_json(self.config, to_dict(config))


def is_longer(before: ExperimentConfig, after: ExperimentConfig) -> bool:
    """Whether a configuration has more epochs, or updates, than one before."""
    if after.optim.updates or before.optim.updates:
        return 0 < before.optim.updates < after.optim.updates
    return before.optim.epochs < after.optim.epochs


def described(data: ExperimentData) -> dict[str, Any] | None:
    """Which images a run is of, where options alone do not say; they are read. Else None."""
    if not data.on_disk:
        return None
    found = {"source": data.source} | {f"{name}_images": len(data.labels(name)) for name in ("train", "test")}
    return found if data.digest is None else found | {"digest": data.digest}


def _in_words(data: Any) -> str:
    try:
        return f"{data['source']} ({data['train_images']} training and {data['test_images']} test images)"
    except (KeyError, TypeError):
        return json.dumps(data)[:200]
