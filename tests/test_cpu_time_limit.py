"""A test that computes for minutes fails by name, and the limit around it holds again afterwards."""

import signal
import time

import pytest

from tests.conftest import cpu_time_limit


def compute_for_ever() -> None:
    while True:
        pass


def test_a_test_that_computes_for_too_long_fails() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"one test computed for 0\.05 s"), cpu_time_limit(0.05):
        compute_for_ever()
    left, _ = signal.getitimer(signal.ITIMER_PROF)
    assert left > 0  # this test's own limit


def test_waiting_does_not_count() -> None:
    with cpu_time_limit(0.05):
        time.sleep(0.2)
        left, _ = signal.getitimer(signal.ITIMER_PROF)
        assert left > 0
