"""What a manifest's labels mean, and which of its images are for training, validation and testing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ats.datasets.folds import grouped_folds
from ats.datasets.manifest import SPLITS, Manifest, Row, to_number
from ats.experiments.objectives import Task


@dataclass(frozen=True)
class Truth:
    """What the labels of a manifest mean.

    Attributes:
        task: whether they are classes, sets of labels or numbers.
        classes: the names of classes or labels, in the order of the model's outputs; none of a value.
    """

    task: Task
    classes: tuple[str, ...] = ()

    def values(self, rows: Sequence[Row]) -> Tensor:
        """What rows say: classes (n,) int64, labels (n, C) float32 of 0 and 1, or values (n, 1) float32."""
        if self.task == "value":
            return torch.tensor([[float(row.label)] for row in rows], dtype=torch.float32, device="cpu").view(-1, 1)
        number = {name: index for index, name in enumerate(self.classes)}
        if self.task == "classes":
            return torch.tensor([number[row.label] for row in rows], dtype=torch.int64, device="cpu")
        found = torch.zeros(len(rows), len(self.classes), device="cpu")
        for row, mine in zip(rows, found, strict=True):
            for name in labels_of(row):
                mine[number[name]] = 1
        return found


def labels_of(row: Row) -> list[str]:
    """The labels that a row has, separated by ";"."""
    return [name for name in (part.strip() for part in row.label.split(";")) if name]


def read_truth(manifest: Manifest, task: Task, classes: Sequence[str] = ()) -> Truth:
    """What the labels mean.

    Args:
        manifest: the rows.
        task: what a label is.
        classes: the names, in the order wanted; those that are found, sorted, where there are none.

    Raises:
        ValueError: a label that is missing, no number, or none of `classes`; fewer than two classes.
    """
    if task == "value":
        for row in manifest.rows:
            if to_number(row.label) is None:
                raise ValueError(
                    f"{manifest.where(row)}: the label {row.label!r} is no number, as --data.task value expects (with "
                    "a point, not a comma)"
                )
        return Truth(task)
    seen: dict[str, Row] = {}
    for row in manifest.rows:
        names = [row.label] if task == "classes" else labels_of(row)
        if names == [""]:
            raise ValueError(f"{manifest.where(row)}: has no label; name the image's class, or remove the line")
        for name in names:
            if classes and name not in classes:
                raise ValueError(
                    f"{manifest.where(row)}: the label {name!r} is none of --data.classes {' '.join(classes)}"
                )
            seen.setdefault(name, row)
    found = tuple(classes) or _sorted(seen)
    if len(found) < (2 if task == "classes" else 1):
        what = f"all images are of class {found[0]!r}" if found else "no image has a label"
        raise ValueError(f"{manifest.path}: {what}; there is nothing to tell apart")
    return Truth(task, found)


def _sorted(names: dict[str, Row]) -> tuple[str, ...]:
    """In the order of their numbers, where all are numbers; else by letters."""
    numbers = {name: to_number(name) for name in names}
    if all(number is not None for number in numbers.values()):
        return tuple(sorted(names, key=lambda name: (numbers[name], name)))
    return tuple(sorted(names))


@dataclass(frozen=True)
class Splits:
    """Which rows of a manifest are for what."""

    manifest: Manifest
    truth: Truth
    by_name: dict[str, tuple[Row, ...]]

    def rows(self, name: str) -> tuple[Row, ...]:
        """Those of a split, in the manifest's order."""
        return self.by_name[name]

    def check_classes(self, rows: Sequence[Row], name: str) -> None:
        """Raise ValueError where the rows of training lack a class, or there are none."""
        if name != "train":
            return
        path = self.manifest.path
        if not rows:
            raise ValueError(f"{path}: there are no images to train on")
        if self.truth.task == "value":
            return
        have: Counter[str] = Counter()
        for row in rows:
            have.update([row.label] if self.truth.task == "classes" else labels_of(row))
        for missing in (each for each in self.truth.classes if each not in have):
            where = next((row for row in self.manifest.rows if missing in (row.label, *labels_of(row))), None)
            seen = "which is on no line" if where is None else f"which line {where.line} has"
            raise ValueError(
                f"{path}: no training image has the label {missing!r}, {seen}; a class is learned from images alone: "
                "add some, or remove it"
            )


def split_rows(manifest: Manifest, truth: Truth, folds: int, validation: bool, seed: int) -> Splits:
    """Part the rows as the manifest says or, where it does not, by folds that keep groups together.

    Args:
        manifest: the rows.
        truth: what their labels mean; labels are spread evenly over the folds.
        folds: parts.
        validation: keep a part of the training rows for validation where none are given.
        seed: s tests on part s mod `folds` of partition s // `folds`.

    Raises:
        ValueError: fewer groups than folds, a class without training images.
    """
    partition, fold = divmod(seed, folds)
    if manifest.has_splits:
        by_name = {name: manifest.select(name) for name in SPLITS}
    else:
        test, train = _apart(manifest, manifest.rows, truth, folds, partition, {fold})
        by_name = {"train": train, "validation": (), "test": test}
    if validation and not by_name["validation"]:
        kept, train = _apart(manifest, by_name["train"], truth, folds, partition + (1 << 32), {0})
        by_name |= {"train": train, "validation": kept}
    splits = Splits(manifest, truth, by_name)
    splits.check_classes(by_name["train"], "train")
    return splits


def _apart(
    manifest: Manifest, rows: Sequence[Row], truth: Truth, folds: int, seed: int, chosen: set[int]
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows of some folds, and the others."""
    groups = [(row.group, -1) if row.group is not None else ("", row.line) for row in rows]
    if len(set(groups)) < folds:
        raise ValueError(
            f"{manifest.path}: {len(set(groups))} groups (or images, without a column group) cannot be parted into "
            f"{folds} folds; choose fewer with --data.folds, or add a column split"
        )
    number = grouped_folds(_strata(truth, rows, folds), groups, folds, seed=seed)
    inside = [int(fold) in chosen for fold in number]
    return tuple(r for r, i in zip(rows, inside, strict=True) if i), tuple(
        r for r, i in zip(rows, inside, strict=True) if not i
    )


def _strata(truth: Truth, rows: Sequence[Row], bins: int) -> NDArray[np.float64]:
    """What is to be spread evenly, (n, S): classes, labels, or ranges of values with as many images each."""
    values = truth.values(rows)
    if truth.task == "labels":
        return values.double().numpy()
    if truth.task == "value":
        order = values.flatten().argsort(stable=True).argsort(stable=True)  # ranks
        values = order * bins // len(rows)
    return torch.nn.functional.one_hot(values, max(bins, len(truth.classes))).double().numpy()
