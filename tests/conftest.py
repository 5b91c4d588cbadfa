"""Where a test can run: on a GPU, in Triton's interpreter, or on the CPU.

- ``gpu``: needs a CUDA or HIP device.
- ``interpreter``: runs Triton kernels: compiled on a GPU where there is one, else in Triton's interpreter on CPU
  tensors. The interpreter must be chosen before Triton is imported, hence for a whole process: test_interpreter.py
  starts one for each file of these tests. By hand: ``TRITON_INTERPRET=1 pytest -m interpreter``.
"""

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED

NO_GPU = "NOT RUN, needs a GPU: make gpu-check runs it where there is one"
NO_INTERPRETER = "needs TRITON_INTERPRET=1: tests/test_interpreter.py runs it, in a process of its own"

CPU_SECONDS = 240.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs Triton kernels, on a GPU or with TRITON_INTERPRET=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first, beside all others.
    items.sort(key=lambda item: not any(name in item.nodeid for name in ("_rehearsed_whole_", "test_interpreter.py")))
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if item.get_closest_marker("interpreter") and not (HAS_GPU or INTERPRETED):
            item.add_marker(pytest.mark.skip(reason=NO_INTERPRETER))


@contextmanager
def cpu_time_limit(seconds: float) -> Iterator[None]:
    """Fails a test whose process computes for longer, wherever it is; waiting, and other processes, do not count."""

    def fail(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"one test computed for {seconds:g} s: give it smaller data; a page's command may be read alone")

    handler = signal.signal(signal.SIGPROF, fail)
    outer = signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        signal.setitimer(signal.ITIMER_PROF, *outer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with cpu_time_limit(CPU_SECONDS):
        return (yield)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run in this process: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["cpu", "numba"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of the CPU path: operations of NumPy and PyTorch, and compiled loops."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="NOT RUN, needs numba: pip install 'torch-ats[cpu]'")
    monkeypatch.setenv("ATS_BACKEND", request.param)
