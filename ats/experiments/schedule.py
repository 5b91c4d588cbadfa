"""How the learning rate and the entropy weight change over a training."""

import math

from ats.experiments.config import OptimConfig


def entropy_weight(step: int, total: int, optim: OptimConfig) -> float:
    """λ at a step of `total`: as configured while there is little to go by, less once there is much."""
    return optim.entropy_weight * _fall(step / total, optim)


def bound_factor(step: int, total: int, optim: OptimConfig) -> float:
    """How many times as wide as at the start the bound of the attention's logits is at a step of `total`.

    It is at its widest after half of them: what the wide bound ranks is learned while the learning rate is high.
    """
    return 1 + (optim.widening - 1) * min(1.0, step / max(1, total // 2))


def learning_rate_factor(step: int, total: int, optim: OptimConfig) -> float:
    """What the learning rate is multiplied with at a step of `total`."""
    warmup = round(optim.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    return _fall((step - warmup) / max(1, total - warmup), optim)


def _fall(progress: float, optim: OptimConfig) -> float:
    if optim.schedule == "constant":
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
