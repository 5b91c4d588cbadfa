"""Compare methods in one run: interleaved, so that a noisy neighbour slows all of them; medians, with their spread."""

import gc
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import rehearsal

Method = Callable[[int], Any]  # takes the number of the call, to rotate its inputs by; caches then don't flatter

Rounds = dict[str, list[float]]  # seconds a call of each method, by round

_LEAST_SECONDS = 2e-3  # of one measurement; quicker methods are called several times in it
_SETTLED_SECONDS = 0.1  # the same for steps that settle
_LEAST_ROUNDS = 7
SLOW_ROUNDS = 3  # at least, of a method that takes half a second or more
_MOST_ROUNDS = 200
_SLOW = 0.5  # seconds: such a method needs no second warm-up, and no settling
A_GRAPH = 10  # calls: starting a graph takes as long as a kernel of microseconds
ONCE = 4.0  # seconds: on a CPU, a method whose first call takes longer is not called again


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median of all rounds, their quartiles and the quickest."""

    median: float
    best: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class _Plan:
    repeats: int  # calls that are timed together
    settle: bool  # one call before them, which is not timed
    rounds: int


def compare(
    methods: Mapping[str, Method],
    device: torch.device,
    seconds: float = 1.5,
    *,
    settle: bool = False,
    slow_rounds: int = SLOW_ROUNDS,
) -> Rounds:
    """Time methods in turn, every round in another order.

    Each takes part in as many rounds as its share of `seconds` allows, at least seven, or `slow_rounds` if it is slow;
    they are spread evenly over the rounds of the others.

    Args:
        methods: by name.
        device: that is waited for.
        seconds: in all, about.
        settle: call a method once before it is timed. What another method left in caches and in the allocator would
            otherwise count; in a training, step follows step.
        slow_rounds: at least, of a method that takes half a second or more.
    """
    rounds: Rounds = {}
    plans: dict[str, _Plan] = {}
    for name, method in methods.items():
        once = seconds_a_call(method, device)  # caches, lazy initialisation, compilation; of a graph, all its calls
        if once > ONCE and device.type == "cpu":
            rounds[name] = [once]
            continue
        if once < _SLOW or device.type != "cpu":
            once = seconds_a_call(method, device, 1, 1)
        plans[name] = _plan(once, seconds / len(methods), settle, slow_rounds)
        rounds[name] = []
    names = list(plans)
    most = max((plan.rounds for plan in plans.values()), default=0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(most):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                plan = plans[name]
                if (round_ + 1) * plan.rounds // most > round_ * plan.rounds // most:
                    start = round_ * (plan.repeats + plan.settle)
                    if plan.settle:
                        methods[name](start)
                    rounds[name].append(seconds_a_call(methods[name], device, start + plan.settle, plan.repeats))
    finally:
        if collecting:
            gc.enable()
    return {name: [value / calls_in(methods[name]) for value in values] for name, values in rounds.items()}


def calls_in(method: Method) -> int:
    """How many calls of what is measured one call of a method makes."""
    return method.calls if isinstance(method, Graphs) else 1


def _plan(once: float, share: float, settle: bool, slow_rounds: int) -> _Plan:
    settle = settle and once < _SLOW
    if rehearsal.active:
        return _Plan(1, settle, rehearsal.ROUNDS)
    repeats = max(1, min(100, round((_SETTLED_SECONDS if settle else _LEAST_SECONDS) / max(once, 1e-6))))
    cost = once * (repeats + settle)
    least = _LEAST_ROUNDS if cost < _SLOW else slow_rounds
    return _Plan(repeats, settle, max(least, min(_MOST_ROUNDS, round(share / cost))))


def timing(seconds: list[float]) -> Timing:
    """Measurements in seconds, put together."""
    if len(seconds) == 1:
        only = 1e3 * seconds[0]
        return Timing(only, only, only, only, 1)
    low, median, high = (1e3 * value for value in statistics.quantiles(seconds, n=4, method="inclusive"))
    return Timing(median, 1e3 * min(seconds), low, high, len(seconds))


def seconds_a_call(method: Method, device: torch.device, first: int = 0, calls: int = 1) -> float:
    """Measured over calls number `first` and following. On a GPU, from the launch to the end of the last kernel."""
    synchronise(device)
    start = time.perf_counter()
    for index in range(first, first + calls):
        method(index)
    synchronise(device)
    return (time.perf_counter() - start) / calls


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy moves, read and written: the best of some."""
    size, calls = 2**28, 1
    if device.type == "cuda":  # so large that neither a cache nor a launch counts
        size, calls = min(2**30, available_bytes(device) // 8), 8
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_a_call(lambda index: target.copy_(source), device, calls=calls) for _ in range(8))
    return 2 * source.numel() / seconds


def rotation(device: torch.device, touched: int, on_cpu: int = 4) -> int:
    """Inputs to take in turn so that none is in the cache when it comes again: on a GPU three times its L2's size.

    Args:
        device: that has the cache.
        touched: bytes that one call reads and writes.
        on_cpu: inputs on a CPU, whose caches are the user's as well.
    """
    if not rehearsal.on_gpu(device):
        return on_cpu
    cache = rehearsal.CACHE if rehearsal.active else torch.cuda.get_device_properties(device).L2_cache_size
    return turns(cache, touched)


def turns(cache: int, touched: int) -> int:
    """Calls after which three times the cache's size has been touched: at least two, at most a hundred."""
    return max(2, min(100, -(-3 * cache // max(1, touched))))


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU, or that the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class Graphs:
    """CUDA graphs of several calls each, which are replayed in turn.

    Args:
        graphs: to replay, of `calls` calls each.
        calls: in one graph.
        results: what the calls return, which the graphs write anew.
    """

    def __init__(self, graphs: list[Any], calls: int, results: list[Any]) -> None:
        self.graphs = graphs
        self.calls = calls
        self.results = results

    def __call__(self, index: int) -> None:
        """Replay one of them."""
        self.graphs[index % len(self.graphs)].replay()


def graphed(method: Method, copies: int) -> Graphs:
    """`method` as CUDA graphs: what it costs without the host's part.

    A graph holds about ten calls, and all graphs together one for each of the `copies` inputs, or more. Each call
    writes to memory of its own while that takes no more than a quarter of what is free.
    """
    size = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(_warmed_up(method, copies)))
    number, calls = graphs_for(copies)
    device = torch.device("cpu" if rehearsal.active else "cuda")
    keep = size * number * calls <= available_bytes(device) // 4
    graphs: list[Any] = []
    results: list[Any] = []

    def run(first: int, kept: list[Any] | None = None) -> None:
        for index in range(first, first + calls):
            result = method(index)
            if kept is not None:
                kept.append(result)

    for first in range(0, number * calls, calls):
        if rehearsal.active:
            run(first, results if keep else None)
            graphs.append(rehearsal.Graph(partial(run, first)))
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(first, results if keep else None)
        graphs.append(graph)
    return Graphs(graphs, calls, results)


def _warmed_up(method: Method, copies: int) -> Any:
    """What the last of a few calls returns; kernels are compiled and workspaces allocated before a capture."""
    if rehearsal.active:
        return [method(index) for index in range(min(copies, 3))][-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(min(copies, 3)):
            result = method(index)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a capture has a pool of its own and cannot take what is cached
    return result


def graphs_for(copies: int) -> tuple[int, int]:
    """Graphs, and calls in each: about ten, and over all graphs each of the inputs the same number of times.

    Where there are more inputs than ten, a graph has one call for each of its share; else each comes several times.
    """
    if copies <= A_GRAPH:
        return 1, copies * max(1, round(A_GRAPH / copies))
    number = round(copies / A_GRAPH)
    return number, -(-copies // number)


def scratch_bytes(method: Method, device: torch.device) -> tuple[int, int]:
    """Peak bytes that a call allocates beyond what it returns, and the bytes that it returns.

    By torch's allocator and NumPy's (their peaks added, though they need not be at once); what libraries allocate past
    them is not seen.
    """
    method(0)  # what is kept for the next calls does not count
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = method(1)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            method(1)
        tracemalloc.start()  # sees NumPy's arrays; a call of its own, for what the profiler allocates
        before = tracemalloc.get_traced_memory()[0]
        result = method(2)
        numpy_peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        peak = allocated = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        peak += numpy_peak
    returned = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(result))
    return max(0, peak - returned), returned


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)] if isinstance(result, tuple | list) else []
