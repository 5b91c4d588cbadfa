"""What a table of methods is made of: rows, what was published in each, and the runs that fill it."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ats.experiments.config import ExperimentConfig, ModelConfig, Precision

SNAPSHOTS = 10
"""Checkpoints that each run keeps on the way, for curves and pictures."""
SHORT = "quick", "view-300"
"""Presets of which rows may have options of their own."""


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
        quick: options by name, e.g. "optim.epochs", that presets in `SHORT` have otherwise for this method.
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
        presets: of the experiment, by name.
        rows: in the paper's order.
        few: what presets in `SHORT` train unless told otherwise; the other rows' costs are still measured.
        note: (configuration, images tested in all) -> what must be known of the data, for the notes below the table.
        swept: the row that `ats reproduce figures` trains with several entropy weights.
        tested: numbers of patches that the runs of a row, by its name, are tested with beside their own.
    """

    name: str
    title: str
    presets: Mapping[str, ExperimentConfig]
    rows: tuple[Row, ...]
    few: tuple[str, ...]
    note: Callable[[ExperimentConfig, int], str] | None = None
    swept: str | None = None
    tested: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """As for `ats train`."""
        return next(iter(self.presets.values())).experiment

    @property
    def is_published(self) -> bool:
        """Whether the paper has it."""
        return any(row.published is not None for row in self.rows)

    def chosen(self, preset: str, names: tuple[str, ...], minutes: float = 0.0) -> tuple[Row, ...]:
        """The rows to train: those named, or the preset's; of a given length, all of them.

        Raises:
            ValueError: a name that is none of the table's.
        """
        known = [row.name for row in self.rows]
        for name in names:
            if name not in known:
                raise ValueError(f"{self.name} has no method {name!r}, expected some of {', '.join(map(repr, known))}")
        names = names or (self.few if preset in SHORT and not minutes else tuple(known))
        return tuple(row for row in self.rows if row.name in names)

    def scale(self, row: Row, preset: str) -> str:
        """What a row's model sees relative to the image: view and patches, or the one image."""
        model = self.model(row, preset)
        return f"{model.view_scale:g}/1" if model.method in ("ats", "uniform") else row.scale

    def model(self, row: Row, preset: str) -> ModelConfig:
        """A row's model, by a preset."""
        model = self.presets[preset].model
        return model.with_method(**{"method": model.method} | row.model | _own(row, preset, "model"))

    def config(
        self, row: Row, preset: str, seed: int, output: Path, data: Path | None, precision: Precision = "32-true"
    ) -> ExperimentConfig:
        """The run of a row with a seed.

        Args:
            row: of this table.
            preset: of the experiment.
            seed: of the run.
            output: folder of all runs.
            data: the folder of the experiment's data, where it is not found by ATS_DATA.
            precision: of the training; runs of other than single precision have a folder of their own.
        """
        base = self.presets[preset]
        kind = preset if precision == "32-true" else f"{preset}-{precision}"
        return dataclasses.replace(
            base,
            output=output / self.name / kind / f"{row.slug}-seed-{seed}",
            seed=seed,
            data=dataclasses.replace(base.data, folder=data),
            model=self.model(row, preset),
            optim=dataclasses.replace(base.optim, **_own(row, preset, "optim")),
            trainer=dataclasses.replace(base.trainer, devices="1", snapshots=SNAPSHOTS, precision=precision),
        )


def _own(row: Row, preset: str, section: str) -> dict[str, Any]:
    """The options of a section that a row has otherwise than its preset."""
    own = row.quick if preset in SHORT else {}
    return {name.removeprefix(f"{section}."): value for name, value in own.items() if name.startswith(f"{section}.")}


def as_published(loss: float, loss_sem: float, error: float, error_sem: float, ms: float, mb: int) -> Published:
    """A published row: loss and error with their standard errors, milliseconds and megabytes a sample."""
    return Published(loss, loss_sem, error, error_sem, ms / 1000, mb * 1_000_000)


def draws_row(name: str, scale: str, published: Published | None = None, quick: dict[str, Any] | None = None) -> Row:
    """The row ATS-N or U-N."""
    letters, count = name.split("-")
    method = {"U": "uniform", "ATS": "ats"}[letters]
    return Row(name, scale, {"method": method, "n_patches": int(count)}, published, quick or {})


def cnn_row(scale: float, published: Published | None = None, quick: dict[str, Any] | None = None) -> Row:
    """The row of a CNN on images of a scale."""
    return Row(f"CNN {scale:g}", f"{scale:g}", {"method": "cnn", "cnn_scale": scale}, published, quick or {})
