"""How the benchmarks measure: what takes turns, what is counted. No test looks at a time; one waits for a GPU."""

import numpy as np
import pytest
import torch

from bench import measure

CPU = torch.device("cpu")


def test_methods_take_turns_and_inputs_rotate() -> None:
    calls: list[tuple[str, int]] = []

    def method(name: str) -> measure.Method:
        return lambda index: calls.append((name, index))

    rounds = measure.compare({"a": method("a"), "b": method("b")}, CPU, seconds=1e-9)
    assert {len(seconds) for seconds in rounds.values()} == {7}
    assert len({index for name, index in calls if name == "a"}) >= 7
    rounds = [calls[start : start + 200] for start in range(4, len(calls), 200)]  # two methods, 100 calls each
    assert [a_first[0][0] for a_first in rounds] == ["a", "b"] * 3 + ["a"]


def test_slow_methods_take_part_in_some_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline of seconds a step must not decide how often a step of milliseconds is measured."""
    calls: list[str] = []
    seconds = {"quick": 0.02, "slow": 0.8, "once": 6.0}

    def pretend(method: measure.Method, device: torch.device, first: int = 0, repeats: int = 1) -> float:
        return seconds[method(first)]

    def method(name: str) -> measure.Method:
        return lambda index: calls.append(name) or name

    monkeypatch.setattr(measure, "seconds_a_call", pretend)
    rounds = measure.compare({name: method(name) for name in seconds}, CPU, seconds=6.0, settle=True)
    assert rounds["once"] == [6.0]  # it takes longer than a run has time to repeat
    assert len(rounds["slow"]) == 3  # as its share of 2 s allows, or three
    assert len(rounds["quick"]) == round(2.0 / (0.02 * 6))  # five calls and one to settle, of 20 ms
    places = [index for index, name in enumerate(calls) if name == "slow"][1:]  # after the warm-up
    assert [round(3 * place / len(calls)) for place in places] == [1, 2, 3]
    rounds = measure.compare({"slow": method("slow")}, CPU, seconds=1e-9, settle=True, slow_rounds=9)
    assert len(rounds["slow"]) == 9


def test_timing_is_in_milliseconds() -> None:
    assert measure.timing([0.004]) == measure.Timing(4.0, 4.0, 4.0, 4.0, 1)
    assert measure.timing([0.004, 0.001, 0.002, 0.003, 0.005]) == measure.Timing(3.0, 1.0, 2.0, 4.0, 5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scratch_is_what_a_call_takes_beyond_what_it_returns(device: str) -> None:
    x = torch.zeros(1000, 1024, device=device)
    scratch, returned = measure.scratch_bytes(lambda index: x.cos().exp(), torch.device(device))
    assert (scratch, returned) == (pytest.approx(4_096_000, abs=20_000), 4_096_000)  # Python's objects count too
    scratch, returned = measure.scratch_bytes(lambda index: x.cos().exp_(), torch.device(device))
    assert (scratch, returned) == (pytest.approx(0, abs=20_000), 4_096_000)
    if device == "cpu":
        scratch, returned = measure.scratch_bytes(lambda index: x + float(np.ones(10**6).sum()), torch.device(device))
        assert (scratch, returned) == (pytest.approx(8_000_000, abs=20_000), 4_096_000)


def test_calls_in_a_graph_count_each() -> None:
    """A graph's launch takes as long as a kernel of microseconds: it holds about ten calls."""
    replayed: list[int] = []

    class Graph:
        def __init__(self, number: int) -> None:
            self.number = number

        def replay(self) -> None:
            replayed.append(self.number)

    graphs = measure.Graphs([Graph(0), Graph(1)], calls=10, results=[])
    assert measure.calls_in(graphs) == 10
    assert measure.calls_in(lambda index: None) == 1
    for index in range(4):
        graphs(index)
    assert replayed == [0, 1, 0, 1]


def test_times_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "seconds_a_call", lambda method, device, first=0, calls=1: 0.02)
    graphs = measure.Graphs([], calls=10, results=[])
    rounds = measure.compare({"graphs": graphs, "plain": lambda index: None}, CPU, seconds=0.1)
    assert set(rounds["graphs"]) == {0.002}
    assert set(rounds["plain"]) == {0.02}


@pytest.mark.parametrize(
    ("copies", "graphs", "calls"),
    [(1, 1, 10), (4, 1, 8), (7, 1, 7), (11, 1, 11), (37, 4, 10), (100, 10, 10)],
)
def test_graphs_hold_about_ten_calls_and_all_inputs(copies: int, graphs: int, calls: int) -> None:
    assert measure.graphs_for(copies) == (graphs, calls)
    seen = {index % copies for index in range(graphs * calls)}
    assert seen == set(range(copies))


def test_inputs_that_take_turns_are_larger_than_the_cache() -> None:
    cache = 60 * 2**20
    mnist = 4 * 128 * 32_400
    assert measure.turns(cache, mnist) * mnist >= 3 * cache > (measure.turns(cache, mnist) - 1) * mnist
    assert measure.turns(cache, 2**40) == 2
    assert measure.turns(cache, 100) == 100
    assert measure.rotation(CPU, 100) == 4
