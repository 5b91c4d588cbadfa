"""Which implementation of an op runs: by the tensor's device, or as ``ATS_BACKEND`` says.

- CPU tensors run the lean PyTorch path (``"cpu"``), CUDA and HIP tensors the Triton kernels (``"triton"``), other
  devices, and any device where Triton is not installed, the plain PyTorch reference (``"reference"``).
- ``ATS_BACKEND=reference`` and ``ATS_BACKEND=triton`` override that. Triton runs on CPU tensors in its
  interpreter only, with ``TRITON_INTERPRET=1`` set before the first import.

On the CPU path sampling and pooling run as loops that numba compiles, where that is installed (the extra ``cpu``) and
imports; else, and with ``ATS_BACKEND=cpu``, as operations of NumPy and PyTorch. ``ATS_BACKEND=numba`` makes it an error
if the loops cannot run. Neither has a say about other devices.

A function compiled by ``torch.compile`` or captured in a CUDA graph keeps the choice it was made with.
"""

import contextlib
import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor
from torch.autograd import forward_ad

_CHOICES = ("reference", "triton", "cpu", "numba")
_OF_THE_CPU = ("", "cpu", "numba")  # which leave the choice of the backend to the device


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # an import hook that refuses it
        return False


_HAS_TRITON = _is_installed("triton")  # a constant, for torch.compile to trace


def backend_for(tensor: Tensor) -> str:
    """Return "cpu", "triton" or "reference", for an op whose main argument is `tensor`.

    Raises:
        ValueError: ATS_BACKEND is something else, or asks for Triton where it cannot run.
    """
    chosen = os.environ.get("ATS_BACKEND", "")
    kind = tensor.device.type
    if chosen == "numba" and not torch.compiler.is_compiling() and not _imports_numba():
        raise ValueError("ATS_BACKEND=numba, but numba does not import; pip install 'torch-ats[cpu]', or unset it")
    if chosen in _OF_THE_CPU:
        if kind == "cpu":
            return "cpu"
        return "triton" if kind == "cuda" and _HAS_TRITON else "reference"
    if chosen not in _CHOICES:
        raise ValueError(
            f"ATS_BACKEND={chosen!r}, expected one of {', '.join(map(repr, _CHOICES))}, or unset it to choose by device"
        )
    if chosen == "triton":
        if not _HAS_TRITON:
            raise ValueError("ATS_BACKEND=triton, but triton is not installed; pip install triton, or unset it")
        if kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "ATS_BACKEND=triton on a CPU tensor needs Triton's interpreter: set TRITON_INTERPRET=1 before the "
                "first import, or move the tensor to a GPU, or unset ATS_BACKEND"
            )
    return chosen


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, …) is at work, which takes PyTorch's own operators only.

    Forward-mode differentiation is one, too, and so is a trace, which would keep what NumPy works out as constants.
    """
    return not torch.compiler.is_compiling() and _transforms()


def _transforms() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._is_tracing()


def may_look(value: Tensor) -> bool:
    """Whether the host may look at the numbers in `value`: a GPU would make it wait, and a trace has none."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not _transforms()


def check_not_to_onnx(what: str) -> None:
    """Raise while a model is being exported to ONNX, which has no operators for what cannot be exported."""
    if not (torch.compiler.is_compiling() or torch._C._is_tracing()):  # a quicker question: one of them is how it goes
        return
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            f"{what} cannot be exported to ONNX; export the attention and the feature network, each by itself, and "
            "keep what is between them in Python (docs/compatibility.md)"
        )


def wants_graph() -> bool:
    """Inside of a backward: whether it was called with ``create_graph=True``, so that it must be differentiable itself.

    A compiled backward is traced once and is not.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def loops_run() -> bool:
    """Whether the CPU path runs compiled loops. The first call imports numba."""
    return os.environ.get("ATS_BACKEND", "") != "cpu" and _imports_numba()


@functools.cache
def _imports_numba() -> bool:
    if not _is_installed("numba"):
        return False
    try:
        importlib.import_module("ats_kernels.loops")
    except Exception:  # one that does not go with NumPy's version, or whose compiler does not load: all else works
        return False
    return True


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, on which Triton launches.

    A compiler's code does so by itself, and a compiler cannot trace this.
    """
    guarded = tensor.is_cuda and not torch.compiler.is_compiling()
    return torch.cuda.device(tensor.device) if guarded else contextlib.nullcontext()
