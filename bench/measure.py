"""Compare methods in one run: interleaved, so that a noisy neighbour slows all of them; medians, with their spread."""

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Method = Callable[[int], Any]  # takes the number of the call, to rotate its inputs by; caches then don't flatter

_LEAST_SECONDS = 2e-3  # of one measurement; quicker methods are called several times in it
_LEAST_ROUNDS = 7


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median of all rounds, their quartiles and the quickest."""

    median: float
    best: float
    low: float
    high: float
    rounds: int


def compare(methods: Mapping[str, Method], device: torch.device, seconds: float = 3.0) -> dict[str, Timing]:
    """Time methods in turn, every round in another order, for about `seconds` in all and at least seven rounds."""
    repeats, expected = {}, 0.0
    for name, method in methods.items():
        _measure(method, device, 0, 1)  # caches, lazy initialisation, compilation
        once = _measure(method, device, 1, 2)
        repeats[name] = max(1, min(100, round(_LEAST_SECONDS / max(once, 1e-6))))
        expected += once * repeats[name]
    times: dict[str, list[float]] = {name: [] for name in methods}
    names = list(methods)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(max(_LEAST_ROUNDS, min(200, round(seconds / expected)))):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_measure(methods[name], device, round_ * repeats[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: timing(values) for name, values in times.items()}


def timing(seconds: list[float]) -> Timing:
    """At least two measurements in seconds, put together."""
    low, median, high = (1e3 * value for value in statistics.quantiles(seconds, n=4, method="inclusive"))
    return Timing(median, 1e3 * min(seconds), low, high, len(seconds))


def _measure(method: Method, device: torch.device, first: int, calls: int) -> float:
    """Seconds a call. On a GPU, from the launch to the end of the last kernel."""
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


def graphed(method: Method, copies: int) -> Method:
    """`method` as CUDA graphs, one for each of its `copies` inputs: what it costs without the host's part."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and workspaces allocated before the capture
        for index in range(copies):
            method(index)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a capture has a pool of its own and cannot take what is cached
    graphs = []
    for index in range(copies):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            method(index)
        graphs.append(graph)
    return lambda index: graphs[index % copies].replay()


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
