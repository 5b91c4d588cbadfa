"""`sample` on the CPU as compiled loops: the algorithm of the reference, all in float64, a row after the other.

Each block is summed relative to its own largest logit, so nothing is lost to overflow or underflow. Only blocks that
ring before the N-th, and of their cells only those that may, are looked at closely.
"""

import math

import numpy as np

from ats_kernels.loops import SUMS, compiled, exp, kept, largest, log, log_exponentials, uniform
from ats_kernels.philox import BLOCKS, CELLS, REPEATS

_MAX, _MAX_32 = float(np.finfo(np.float64).max), float(np.finfo(np.float32).max)


@compiled(fastmath=SUMS)
def _sums(values, top):
    """Σ e^(z − top) and Σ (z − top) e^(z − top), NaN where a value is."""
    mass = spread = 0.0
    for i in range(len(values)):
        below = np.float64(values[i]) - top
        below = -708.0 if below < -708.0 else below  # adds nothing, and −inf must not meet 0
        part = exp(below)
        mass += part
        spread += below * part
    return mass, spread


@compiled()
def _less(value, top):
    """value − top, finite unless `value` is −inf."""
    below = np.float64(value) - top
    return -_MAX if below < -_MAX and value > -np.inf else below


@compiled()
def _sift(keys, places, count):
    """Let the root of a heap, whose largest key is on top, down to where it belongs."""
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= count:
            return
        if child + 1 < count and _after(keys, places, child + 1, child):
            child += 1
        if not _after(keys, places, child, parent):
            return
        keys[parent], keys[child] = keys[child], keys[parent]
        places[parent], places[child] = places[child], places[parent]
        parent = child


@compiled()
def _after(keys, places, one, other):
    return keys[one] > keys[other] or (keys[one] == keys[other] and places[one] > places[other])


@compiled()
def _offer(key, place, keys, places):
    """Put a key in the place of the largest if it is smaller; of equal keys the lower place comes first."""
    if key < keys[0] or (key == keys[0] and place < places[0]):
        keys[0], places[0] = key, place
        _sift(keys, places, len(keys))


@compiled()
def _sort(keys, places):
    for count in range(len(keys) - 1, 0, -1):
        keys[0], keys[count] = keys[count], keys[0]
        places[0], places[count] = places[count], places[0]
        _sift(keys, places, count)


@compiled()
def _rank_most_probable(values, keys, places):
    for cell in range(len(values)):
        if values[cell] >= -keys[0]:
            _offer(-np.float64(values[cell]), cell, keys, places)


@compiled()
def _rank_in_time(values, block, seed, row, top, tops, masses, keys, places):
    """The first cells to ring, from the blocks' largest logits and their sums relative to these."""
    cells, n_blocks = len(values), len(tops)
    times = np.empty(n_blocks + n_blocks % 2)
    log_exponentials(seed, 0, row, BLOCKS, times)
    for j in range(n_blocks):
        if tops[j] == -np.inf:
            times[j] = np.inf
        else:
            times[j] -= (tops[j] - top) + log(masses[j])
    # Blocks that ring later than as many as there are draws hold none of these.
    first_keys, first_places = np.full(min(len(keys), n_blocks), np.inf), np.full(min(len(keys), n_blocks), n_blocks)
    for j in range(n_blocks):
        if times[j] < first_keys[0]:
            _offer(times[j], j, first_keys, first_places)
    _sort(first_keys, first_places)
    last = first_keys[-1] if len(keys) <= n_blocks else np.inf
    alone = np.empty(block)
    for slot in range(len(first_keys)):
        block_time, start = first_keys[slot], first_places[slot] * block
        if block_time == np.inf or block_time > keys[0]:
            return
        log_exponentials(seed, start // 2, row, CELLS, alone)
        size = min(block, cells - start)
        part = values[start : start + size]
        for i in range(size):
            alone[i] -= _less(part[i], top)
        first = np.inf
        for i in range(size):
            first = alone[i] if alone[i] < first else first
        limit = max(first, min(last, keys[0])) + 0.7  # log(e^x + e^y) ≤ max(x, y) + log 2
        for i in range(size):
            # log(e^block_time + e^alone − e^first)
            if alone[i] <= limit:
                later = block_time
                if alone[i] > first:
                    excess = alone[i] + math.log(-math.expm1(first - alone[i]))
                    high, low = (excess, later) if excess > later else (later, excess)
                    later = high + math.log1p(math.exp(low - high))
                _offer(later, start + i, keys, places)


@compiled()
def _repeat(distinct_places, distinct_log_attention, seed, row, places, log_attention):
    """`ats_kernels.sampling.draws.repeats` of one row."""
    came = 0
    for k in range(len(places)):
        target = uniform(seed, k, row, REPEATS)
        share = 0.0
        cell = 0
        while cell < came:
            share += math.exp(distinct_log_attention[cell])
            last = cell + 1 == len(distinct_places) or not math.exp(distinct_log_attention[cell + 1]) > 0
            if last or share > target:
                break
            cell += 1
        came = max(came, cell + 1)
        places[k], log_attention[k] = distinct_places[cell], distinct_log_attention[cell]


@kept()
def draw(logits, block, seed, by_time, replace, indices, log_attention, logsumexp, entropy, statistics):
    """Draw from logits (B, K) to indices and log_attention (B, N), and to logsumexp and entropy (B,).

    `statistics` (3, B) float64 are the largest logit, log Σ e^(z − that) and the entropy. `by_time` is False for the
    most probable cells.
    """
    rows, cells = logits.shape
    n_blocks = (cells + block - 1) // block
    tops, masses, spreads = np.empty(n_blocks), np.empty(n_blocks), np.empty(n_blocks)
    count = min(indices.shape[1], cells)
    needed = 1 if replace else count
    keys, log_a, places = np.empty(count), np.empty(count), np.empty(count, np.int64)
    least = -_MAX if logits.itemsize == 8 else -_MAX_32
    for row in range(rows):
        values = logits[row]
        for j in range(n_blocks):
            part = values[j * block : min((j + 1) * block, cells)]
            tops[j] = largest(part)
            masses[j], spreads[j] = _sums(part, max(tops[j], -_MAX))
        top, log_total, own_entropy = _total(values, block, tops, masses, spreads)
        bad = log_total != log_total
        if not bad:
            keys[:] = np.inf
            places[:] = 0
            if by_time:
                _rank_in_time(values, block, seed, row, top, tops, masses, keys, places)
            else:
                _rank_most_probable(values, keys, places)
            _sort(keys, places)
            bad = keys[needed - 1] == np.inf
        if bad:
            indices[row, :] = -1
            log_attention[row, :] = np.nan
            log_total = own_entropy = np.nan
        else:
            for k in range(count):
                drawn = least if keys[k] == np.inf else _less(values[places[k]], top) - log_total
                log_a[k] = max(drawn, least)
            if replace:
                _repeat(places, log_a, seed, row, indices[row], log_attention[row])
            else:
                indices[row, :] = places
                log_attention[row, :] = log_a
        logsumexp[row], entropy[row] = top + log_total, own_entropy
        statistics[0, row], statistics[1, row], statistics[2, row] = top, log_total, own_entropy


@compiled()
def _total(values, block, tops, masses, spreads):
    """The largest logit, log Σ e^(z − that) and the entropy of a row; the latter NaN if it cannot be drawn from."""
    top, top_block = tops[0], 0
    for j in range(1, len(tops)):
        if not tops[j] <= top:
            top, top_block = tops[j], j
    if not -np.inf < top < np.inf:
        return top, np.nan, np.nan
    rest = spread = 0.0
    for j in range(len(tops)):
        below = max(tops[j] - top, -708.0)
        scale = exp(below)
        spread += scale * (spreads[j] + below * masses[j])
        if j != top_block:
            rest += scale * masses[j]
    # The largest logit's own 1 is left out of the sum: log a stays exact where one cell holds nearly all.
    met = False
    for i in range(top_block * block, min((top_block + 1) * block, len(values))):
        if values[i] == top and not met:
            met = True
        else:
            rest += exp(np.float64(values[i]) - top)
    log_total = math.log1p(rest)
    return top, log_total, log_total - spread / (1 + rest)


@kept()
def grad(logits, indices, peak, log_total, entropy, grad_log_attention, grad_logsumexp, grad_entropy, out):
    """The gradient (B, K) of float32 or float64 logits to `out`, by the formula of `grad_cpu`."""
    rows, draws = indices.shape
    for row in range(rows):
        constant = np.float64(grad_logsumexp[row]) - grad_entropy[row] * (entropy[row] - log_total[row])
        for k in range(draws):
            constant -= grad_log_attention[row, k]
        scale = math.exp(-log_total[row])
        constant *= scale
        slope = -grad_entropy[row] * scale
        _grad_row(logits[row], peak[row], constant, slope, out[row])
        for k in range(draws):
            out[row, max(indices[row, k], 0)] += grad_log_attention[row, k]


@compiled()
def _grad_row(values, peak, constant, slope, out):
    zero = 0.0 * constant  # NaN in a row that could not be drawn from
    for i in range(len(values)):
        below = np.float64(values[i]) - peak
        nothing = below < -708.0
        below = -708.0 if nothing else below
        part = exp(below) * (constant + slope * below)
        out[i] = zero if nothing else part
