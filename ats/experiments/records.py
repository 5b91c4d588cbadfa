"""What a training logs, as CSV: part of its checkpoints, so that a run that goes on has all rows, each once."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ats._files import write_whole


class MetricsRecord(Logger):
    """csv/version_N/metrics.csv: a row a step at which anything was logged, written whole with each checkpoint.

    Args:
        folder: of the run.
        resumes: whether the run goes on from a checkpoint. One written by an ats that did not yet keep rows in it has
            them in another version's file; the next number is taken.
    """

    def __init__(self, folder: Path, *, resumes: bool) -> None:
        super().__init__()
        self._folder = folder / "csv"
        self._version = 0
        if resumes:
            taken = [int(path.name[8:]) for path in self._folder.glob("version_*") if path.name[8:].isdigit()]
            self._version = max(taken, default=-1) + 1
        self._rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> int:
        return self._version

    @property
    def path(self) -> Path:
        """Where the rows go."""
        return self._folder / f"version_{self._version}" / "metrics.csv"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        row = self._rows.setdefault(len(self._rows) if step is None else int(step), {})
        row |= {name: float(value) for name, value in metrics.items()}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.json."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file. Lightning calls it when it likes, too."""
        if self._rows:
            names = ["step", *sorted(set().union(*self._rows.values()))]
            text = io.StringIO()
            writer = csv.DictWriter(text, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows({"step": step} | self._rows[step] for step in sorted(self._rows))
            write_whole(self.path, text.getvalue().encode())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def latest(self) -> dict[str, float]:
        """The last value of each mean over an epoch."""
        found: dict[str, float] = {}
        for step in sorted(self._rows):
            found |= {name: value for name, value in self._rows[step].items() if name.startswith(("train/", "valid"))}
        return found

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"version": self._version, "rows": {step: dict(row) for step, row in self._rows.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; what was logged after it will be logged again."""
        self._version = int(state_dict["version"])
        self._rows = {int(step): dict(row) for step, row in state_dict["rows"].items()}
