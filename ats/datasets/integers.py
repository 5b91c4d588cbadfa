"""Random integers that are the same on every machine and with every version of the libraries below."""

from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Integers:
    """Integers from a bit generator's raw stream, which NumPy promises to keep as it is.

    Args:
        bits: the generator, seeded.
        block: how many integers to take from it at once.
    """

    def __init__(self, bits: np.random.Philox, block: int = 256) -> None:
        self._bits, self._block = bits, block
        self._raw: list[int] = []

    def below(self, bound: int) -> int:
        """One of 0 … bound − 1, each as likely as 64 bits can tell."""
        if not self._raw:
            self._raw = self._bits.random_raw(self._block).tolist()[::-1]
        return self._raw.pop() % bound

    def between(self, low: int, high: int) -> int:
        """One of low … high."""
        return low + self.below(high - low + 1)

    def shuffled(self, items: list[T]) -> list[T]:
        """A copy in random order (Fisher and Yates)."""
        items = list(items)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items

    def bytes(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """`count` random bytes, (count,) uint8."""
        words = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return words.view(np.uint8)[:count]
