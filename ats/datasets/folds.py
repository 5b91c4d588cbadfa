"""Cross-validation where images belong together: a group is never on both sides, and labels are spread evenly."""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ats.datasets.integers import Integers


def grouped_folds(
    counts: NDArray[np.float64], groups: Sequence[Hashable], folds: int, *, seed: int = 0
) -> NDArray[np.int64]:
    """The fold of each image, (n,), from 0 to folds − 1.

    Groups are dealt one by one, those that are hardest to place first and equal ones in a random order, each to the
    fold that has the least of what the group has: of each label its share, squared. Without groups of several images
    folds differ by one image of a class at most.

    Args:
        counts: (n, labels) how much of each label an image has, e.g. 1 in the column of its class.
        groups: (n,) what must stay together; a value of its own for each image where nothing must.
        folds: parts.
        seed: decides the order.

    Raises:
        ValueError: fewer than two folds, or fewer groups than folds.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    if not 2 <= folds <= len(numbers):
        raise ValueError(f"folds must be at least 2, and at most the groups there are, {len(numbers)}; got {folds}")
    member = np.array([numbers[group] for group in groups])
    sums = np.zeros((len(numbers), counts.shape[1]))
    np.add.at(sums, member, counts)
    shares = sums / np.maximum(sums.sum(0), 1e-300)  # of all that there is of a label
    order = Integers(np.random.Philox(key=seed)).shuffled(list(range(len(numbers))))
    # The largest first; among equals those of one label after the other, so that each label is dealt in turn.
    order.sort(key=lambda group: (-round(float((shares[group] ** 2).sum()), 12), *(-sums[group])))
    images = np.bincount(member)
    placed, sizes, fold = (
        np.zeros((folds, counts.shape[1])),
        np.zeros(folds, dtype=np.int64),
        np.empty(len(numbers), int),
    )
    for group in order:
        cost = np.round(placed @ shares[group], 12)
        fold[group] = min(range(folds), key=lambda part: (cost[part], sizes[part]))
        placed[fold[group]] += shares[group]
        sizes[fold[group]] += images[group]
    return fold[member]
