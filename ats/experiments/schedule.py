"""How the learning rate, the entropy weight and the bound of attention's logits change over a training."""

import math

from ats.experiments.config import OptimConfig

_AGAIN = 0.6
"""The learning rate's height in the round of a restart; no other was tried."""


def entropy_weight(step: int, total: int, optim: OptimConfig) -> float:
    """λ at a step of `total`: as configured while there is little to go by, less once there is much."""
    step, total, _ = _of_round(step, total, optim)
    return optim.entropy_weight * _fall(step / total, optim)


def bound_factor(step: int, total: int, optim: OptimConfig) -> float:
    """How many times as wide as at the start the bound of the attention's logits is at a step of `total`.

    It is at its widest after half of them, or from the restart on: what the wide bound ranks is learned while the
    learning rate is high.
    """
    if optim.restart:
        return optim.widening if step >= _first_round(total, optim) else 1.0
    return 1 + (optim.widening - 1) * min(1.0, step / max(1, total // 2))


def learning_rate_factor(step: int, total: int, optim: OptimConfig) -> float:
    """What the learning rate is multiplied with at a step of `total`."""
    step, total, height = _of_round(step, total, optim)
    warmup = round(optim.warmup * total)
    if step < warmup:
        return height * (step + 1) / warmup
    return height * _fall((step - warmup) / max(1, total - warmup), optim)


def _first_round(total: int, optim: OptimConfig) -> int:
    """Steps before the restart: all, where there is none."""
    return total - max(1, round(optim.restart * total)) if optim.restart else total


def _of_round(step: int, total: int, optim: OptimConfig) -> tuple[int, int, float]:
    """A step's number in its round, the round's steps, and the learning rate's height in it."""
    first = _first_round(total, optim)
    if step < first or not optim.restart:
        return step, first, 1.0
    return step - first, total - first, _AGAIN


def _fall(progress: float, optim: OptimConfig) -> float:
    if optim.schedule == "constant":
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
