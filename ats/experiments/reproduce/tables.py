"""The paper's tables: their rows, and what was published in each."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.experiments.presets import PRESETS

SNAPSHOTS = 10
"""Checkpoints that each run keeps on the way, for curves and pictures."""


@dataclass(frozen=True)
class Published:
    """A row as published: means and standard errors over runs, on the authors' GPU."""

    train_loss: float
    train_loss_sem: float
    test_error: float
    test_error_sem: float
    seconds_per_sample: float
    bytes_per_sample: int


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Args:
        name: as in the paper.
        scale: of the image it sees, as in the paper.
        model: the options of the model that make it this method.
        published: None where the paper has no such row.
        quick: options by name, e.g. "optim.epochs", that the preset "quick" has otherwise for this method.
    """

    name: str
    scale: str
    model: dict[str, Any]
    published: Published | None = None
    quick: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return self.name.lower().replace(" ", "-")


@dataclass(frozen=True)
class Table:
    """The rows of an experiment.

    Args:
        name: on the command line and of its files.
        title: for the report.
        experiment: as for `ats train`.
        rows: in the paper's order.
        few: what the preset "quick" trains unless it is told to; the other rows' costs are still measured.
    """

    name: str
    title: str
    experiment: str
    rows: tuple[Row, ...]
    few: tuple[str, ...]

    def chosen(self, preset: str, names: tuple[str, ...]) -> tuple[Row, ...]:
        """The rows to train: those named, or the preset's.

        Raises:
            ValueError: a name that is none of the table's.
        """
        known = [row.name for row in self.rows]
        for name in names:
            if name not in known:
                raise ValueError(f"{self.name} has no method {name!r}, expected some of {', '.join(map(repr, known))}")
        names = names or (self.few if preset == "quick" else tuple(known))
        return tuple(row for row in self.rows if row.name in names)

    def model(self, row: Row, preset: str) -> ModelConfig:
        """A row's model, by a preset."""
        return dataclasses.replace(PRESETS[self.experiment][preset].model, **row.model, **_own(row, preset, "model"))

    def config(self, row: Row, preset: str, seed: int, output: Path, data: Path | None) -> ExperimentConfig:
        """The run of a row with a seed.

        Args:
            row: of this table.
            preset: of the experiment.
            seed: of the run.
            output: folder of all runs.
            data: the folder of the experiment's data, where it is not found by ATS_DATA.
        """
        base = PRESETS[self.experiment][preset]
        return dataclasses.replace(
            base,
            output=output / self.name / preset / f"{row.slug}-seed-{seed}",
            seed=seed,
            data=dataclasses.replace(base.data, folder=data),
            model=self.model(row, preset),
            optim=dataclasses.replace(base.optim, **_own(row, preset, "optim")),
            trainer=dataclasses.replace(base.trainer, devices="1", snapshots=SNAPSHOTS),
        )


def _own(row: Row, preset: str, section: str) -> dict[str, Any]:
    """The options of a section that a row has otherwise than its preset."""
    own = row.quick if preset == "quick" else {}
    return {name.removeprefix(f"{section}."): value for name, value in own.items() if name.startswith(f"{section}.")}


def _published(loss: float, loss_sem: float, error: float, error_sem: float, ms: float, mb: int) -> Published:
    return Published(loss, loss_sem, error, error_sem, ms / 1000, mb * 1_000_000)


def _draws(name: str, scale: str, published: Published | None = None, quick: dict[str, Any] | None = None) -> Row:
    letters, count = name.split("-")
    method = {"U": "uniform", "ATS": "ats"}[letters]
    return Row(name, scale, {"method": method, "n_patches": int(count)}, published, quick or {})


def _cnn(scale: float, published: Published | None = None, quick: dict[str, Any] | None = None) -> Row:
    return Row(f"CNN {scale:g}", f"{scale:g}", {"method": "cnn", "cnn_scale": scale}, published, quick or {})


# An epoch that reads all of every image takes long: fewer of them, and smaller steps or networks.
_SHORTER = {"optim.epochs": 60, "optim.batch_size": 7}
_BAGS = {"optim.epochs": 20, "optim.batch_size": 2, "optim.learning_rate": 1e-3}  # as many steps from fewer images
_SLIMMER = {"optim.epochs": 12, "model.cnn_channels": 16}
_FEWER = {"optim.epochs": 20}  # of bags of 286 patches
_BLIND = {"optim.epochs": 40}  # of street scenes: uniform draws hardly ever show the sign, more epochs learn by heart


TABLE_1 = Table(
    "table1",
    "Colon cancer",
    "colon-cancer",
    (
        _draws("U-10", "0.2/1", _published(0.210, 0.031, 0.156, 0.006, 1.8, 19)),
        _draws("U-50", "0.2/1", _published(0.075, 0.000, 0.124, 0.010, 4.6, 24)),
        _cnn(0.5, _published(0.002, 0.000, 0.104, 0.009, 4.8, 65), _SHORTER),
        _cnn(1, _published(0.002, 0.000, 0.092, 0.012, 18.7, 250), _SHORTER),
        Row("Deep MIL", "1", {"method": "mil"}, _published(0.007, 0.000, 0.093, 0.004, 48.5, 644), _BAGS),
        Row("Gated Deep MIL", "1", {"method": "gated-mil"}, quick=_BAGS),
        _draws("ATS-10", "0.2/1", _published(0.083, 0.019, 0.093, 0.014, 1.8, 21)),
        _draws("ATS-50", "0.2/1", _published(0.028, 0.002, 0.093, 0.019, 4.5, 26)),
    ),
    few=("U-10", "CNN 0.5", "Deep MIL", "ATS-10"),
)

TABLE_2 = Table(
    "table2",
    "Speed limits",
    "speed-limits",
    (
        _draws("U-5", "0.3/1", _published(1.468, 0.317, 0.531, 0.004, 7.8, 39), _BLIND),
        _draws("U-10", "0.3/1", _published(0.851, 0.408, 0.472, 0.008, 10.8, 78), _BLIND),
        _cnn(0.3, _published(0.003, 0.001, 0.311, 0.049, 6.6, 86), _SLIMMER),
        _cnn(0.5, _published(0.002, 0.001, 0.295, 0.039, 15.6, 239), _SLIMMER),
        _cnn(1, _published(0.002, 0.000, 0.247, 0.001, 64.2, 958), _SLIMMER),
        Row("Deep MIL", "1", {"method": "mil"}, _published(0.077, 0.089, 0.083, 0.006, 97.2, 1497), _FEWER),
        Row("Gated Deep MIL", "1", {"method": "gated-mil"}, quick=_FEWER),
        _draws("ATS-5", "0.3/1", _published(0.162, 0.124, 0.089, 0.002, 8.5, 86)),
        _draws("ATS-10", "0.3/1", _published(0.082, 0.032, 0.095, 0.008, 10.3, 118)),
    ),
    few=("U-5", "CNN 0.3", "ATS-5"),
)

MNIST = Table(
    "mnist",
    "Megapixel MNIST",
    "megapixel-mnist",
    (
        _draws("U-10", "0.12/1"),
        _cnn(1),
        Row("Deep MIL", "1", {"method": "mil"}),
        *(_draws(f"ATS-{n}", "0.12/1") for n in (5, 10, 25, 50, 100)),
    ),
    few=("ATS-10",),
)

TABLES = {table.name: table for table in (TABLE_1, TABLE_2, MNIST)}
