"""Which images a process evaluates."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

NOT_COUNTED = -100
"""Label of an image that another process counts; `cross_entropy` leaves it out, too."""


class Indices(Dataset[int]):
    """Numbers in place of images, which are made once a batch is on its device: whatever a sampler gives."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class EachOnce(Sampler[int]):
    """The indices of one process's share, each counted by one process alone.

    All processes get equally many, and so equally many batches, since they may wait for each other in each. What is
    there for that alone is the complement ~index: it is read, and not counted.
    """

    def __init__(self, count: int, processes: int = 1, rank: int = 0) -> None:
        self.count, self.processes, self.rank = count, processes, rank

    def __len__(self) -> int:
        return -(-self.count // self.processes)

    def __iter__(self) -> Iterator[int]:
        for index in range(self.rank, len(self) * self.processes, self.processes):
            yield index if index < self.count else ~(index % self.count)


def read_and_counted(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Split what `EachOnce` gave: the images' indices, and which of them count."""
    counted = indices >= 0
    return torch.where(counted, indices, ~indices), counted
