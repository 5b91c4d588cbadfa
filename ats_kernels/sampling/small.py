"""The CPU path of `sample` for few logits: starting an operation costs more than the numbers that it works on.

Hence no more than some sixty of NumPy's, on arrays that a thread keeps from call to call, and times in place of their
logarithms: with E the exponential variables of blocks and cells and a their masses relative to the row's largest,

    time_i = E_b / a_b + (E_i / a_i − min_j E_j / a_j)        i, j of block b

which is float64's whole precision as long as no mass that decides anything underflows. A row where one may have, which
has NaN or too few cells shows in the time of its last draw; then all is left to `ats_kernels.sampling.cpu`.
"""

import threading
from collections import OrderedDict

import numpy as np
import torch

from ats_kernels import philox
from ats_kernels.sampling.draws import block_size

_LOWEST = -690.0  # least logit relative to the row's largest: a mass of 2e-300, which adds nothing to any sum
_LATEST = 1e280  # no time of a cell whose mass is exact is later; those of the lowest are all later
_LEAST_TOTAL = 1.01  # 1 less than this total is not exact enough: the cells beside the largest are summed by themselves
_KEPT_SIZES = 4  # that a thread keeps arrays for

_kept = threading.local()


class SmallDraw:
    """Arrays for draws without replacement from (B, K) logits. Not for two threads at once."""

    def __init__(self, rows: int, cells: int) -> None:
        block = block_size(cells)
        n_blocks = -(-cells // block)
        shape = rows, n_blocks, block
        self.below = np.full((rows, n_blocks * block), -np.inf)  # logits less the row's largest
        self._logits = self.below[:, :cells]
        self._below = torch.from_numpy(self.below)
        self._past = self.below[:, cells:]
        self._mass = np.empty_like(self.below)
        self._mass_tensor = torch.from_numpy(self._mass)
        self._mass_blocks = self._mass.reshape(shape)
        self._block_mass = np.empty(shape[:2])
        self._mass_row, self._below_column = self._mass[:, None], self.below[:, :, None]
        self._spread = np.empty((rows, 1, 1))
        self._row = np.arange(rows)
        self._shift = np.empty(shape[:2])
        self._shift_3 = self._shift[..., None]

        block_pairs = -(-n_blocks // 2)
        pairs = block_pairs + n_blocks * block // 2  # a row
        pair = np.concatenate((np.arange(block_pairs), np.arange(pairs - block_pairs)))
        stream = np.repeat((philox.BLOCKS, philox.CELLS), (block_pairs, pairs - block_pairs))
        self._counters = philox.Counters(pair, self._row[:, None], stream)
        self._numbers = np.empty((rows * pairs, 2))
        numbers = self._numbers.reshape(rows, 2 * pairs)
        self._block_numbers = numbers[:, :n_blocks]
        self._cell_numbers = numbers[:, 2 * block_pairs :].reshape(shape)
        self._times = torch.empty(rows, n_blocks * block, dtype=torch.float64, device="cpu")
        self._times_blocks = self._times.numpy().reshape(shape)

    def draw(self, logits: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, ...]:
        """Indices (B, n), log a (B, n), and each row's largest logit, log Σ a and entropy (B,).

        The last but one is NaN in a row that takes other means.
        """
        below, mass = self.below, self._mass
        self._logits[...] = logits
        self._past.fill(-np.inf)
        top = np.maximum.reduce(below, -1, keepdims=True)  # (B, 1)
        np.subtract(below, top, below)
        np.maximum(below, _LOWEST, below)
        torch.exp(self._below, out=self._mass_tensor)
        block_mass = np.add.reduce(self._mass_blocks, -1, out=self._block_mass)
        total = np.add.reduce(block_mass, -1)  # (B,)
        np.matmul(self._mass_row, self._below_column, self._spread)
        self._counters.negative_exponentials(seed, self._numbers)
        # All negative from here on: the latest is the least.
        times = np.divide(self._cell_numbers, self._mass_blocks, self._times_blocks)
        shift = np.divide(self._block_numbers, block_mass, self._shift)
        np.subtract(shift, np.maximum.reduce(times, -1), shift)
        np.add(times, self._shift_3, times)
        latest, order = self._times.topk(n)
        log_total = np.log(total)
        entropy = np.divide(self._spread[:, 0, 0], total)
        np.subtract(log_total, entropy, entropy)
        if np.fmin.reduce(total) < _LEAST_TOTAL:
            peaked = total < _LEAST_TOTAL
            mass[self._row, below.argmax(-1)] = 0
            exact = np.log1p(np.add.reduce(mass, -1))
            entropy[peaked] += (exact - log_total)[peaked]
            log_total[peaked] = exact[peaked]
        last = latest.numpy()[:, -1]
        if not np.minimum.reduce(last) > -_LATEST:
            log_total[~(last > -_LATEST)] = np.nan
        log_attention = self._below.gather(-1, order).numpy()
        np.subtract(log_attention, log_total[:, None], log_attention)
        return order.numpy(), log_attention, top[:, 0], log_total, entropy


def small_draw(rows: int, cells: int) -> SmallDraw:
    """This thread's arrays for the size."""
    kept: OrderedDict[tuple[int, int], SmallDraw] | None = getattr(_kept, "sizes", None)
    if kept is None:
        kept = _kept.sizes = OrderedDict()
    size = rows, cells
    found = kept.get(size)
    if found is None:
        with torch.inference_mode(False):  # or it could not be written to later, outside of that mode
            found = kept[size] = SmallDraw(rows, cells)
        if len(kept) > _KEPT_SIZES:
            kept.popitem(last=False)
    else:
        kept.move_to_end(size)
    return found
