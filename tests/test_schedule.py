"""The learning rate, the entropy weight and the bound of attention's logits, step by step."""

import dataclasses
import itertools

import pytest

from ats.experiments.config import OptimConfig
from ats.experiments.schedule import bound_factor, entropy_weight, learning_rate_factor


def test_the_bound_widens_over_half_of_a_training_or_at_its_restart() -> None:
    optim = OptimConfig(widening=3.0)
    assert [bound_factor(step, 8, optim) for step in (0, 1, 2, 3, 4, 5, 8)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]
    assert bound_factor(0, 1, optim) == 1
    again = dataclasses.replace(optim, schedule="cosine", restart=0.25)
    assert [bound_factor(step, 8, again) for step in (0, 5, 6, 8)] == [1.0, 1.0, 3.0, 3.0]


def test_learning_rate_rises_then_falls() -> None:
    optim = OptimConfig(warmup=0.1, schedule="cosine")
    factors = [learning_rate_factor(step, 100, optim) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert factors[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert 0.02 <= factors[-1] < 0.03
    assert learning_rate_factor(99, 100, OptimConfig()) == 1.0


def test_after_a_restart_the_schedule_runs_once_more() -> None:
    once, again = OptimConfig(warmup=0.1, schedule="cosine"), OptimConfig(warmup=0.1, schedule="cosine", restart=0.2)
    rates = [learning_rate_factor(step, 100, again) for step in range(101)]
    assert rates[:80] == [learning_rate_factor(step, 80, once) for step in range(80)]
    assert rates[80:] == pytest.approx([0.6 * learning_rate_factor(step, 20, once) for step in range(21)])
    weights = [entropy_weight(step, 100, again) for step in range(101)]
    assert weights[80] == weights[0] == again.entropy_weight
    assert weights[90] == entropy_weight(10, 20, once)
    assert learning_rate_factor(1, 1, again) == pytest.approx(0.6 * 0.02)  # a training of one step
    assert learning_rate_factor(100, 100, once) == pytest.approx(0.02)


def test_a_constant_schedule_has_nothing_to_begin_again() -> None:
    with pytest.raises(ValueError, match=r"optim.restart has .* choose optim.schedule=cosine, or leave it at 0"):
        OptimConfig(restart=0.1)
