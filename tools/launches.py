"""Count what each call launches, and the variants of kernels that are compiled, without a GPU.

``python -m tools.launches`` runs every call on CPU tensors with launches that only take notes: Triton's own binder says
which variant of a kernel each would compile and run, and PyTorch's dispatcher which other operators start work on a
device. Results are not computed, so nothing may depend on them: a call that read a value back would show as one that
waits. docs/kernels.md has the table.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tools.offline.compile import ops

# Operators that start no work on a device: views, allocations, and what only autograd sees.
_FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute", "select",
    "slice", "split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view",
    "_reshape_alias",     "unfold", "new_empty_strided", "split_with_sizes", "view_as_real",
}  # fmt: skip

# Operators that make the host wait for a GPU: they read a value, have a shape that depends on one, or copy from memory
# that is not pinned, as torch.tensor(…) does.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh", "item",
    "unique_consecutive", "bincount",
}  # fmt: skip


@dataclass
class Notes:
    """What was launched, in order."""

    kernels: list[str] = field(default_factory=list)  # names of Triton kernels
    variants: set[str] = field(default_factory=set)  # what each would be compiled for
    grids: list[tuple[int, ...]] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)  # PyTorch's
    waits: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all."""
        for notes in (self.kernels, self.variants, self.grids, self.operators, self.waits):
            notes.clear()


class _Operators(TorchDispatchMode):
    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.notes.waits.append(name)
        result = func(*args, **kwargs or {})
        if name not in _FREE and not (name == "_to_copy" and result is args[0]):
            self.notes.operators.append(name)
        return result


@contextmanager
def taking_notes() -> Iterator[Notes]:
    """Run the kernels' paths on CPU tensors, with launches that only take notes. Not where Triton interprets."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    for op in ops():  # before the environment says that kernels are interpreted, which is settled by their import
        importlib.import_module(f"ats_kernels.{op}.triton")
    backend = make_backend(GPUTarget("cuda", 90, 32))
    notes = Notes()

    def run(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = binder(*arguments, **options)
        constants = {
            name: bound[name] for name, (kind, _) in zip(bound, specialization, strict=True) if kind == "constexpr"
        }
        notes.kernels.append(kernel.__name__)
        notes.grids.append(grid)
        kinds = [kind for kind in specialization if kind[0] != "constexpr"]
        notes.variants.add(f"{kernel.__name__} {kinds} {constants} {rest}")

    environment = {"ATS_BACKEND": "triton", "TRITON_INTERPRET": "1"}  # lets CPU tensors take the kernels' paths
    with mock.patch.dict(os.environ, environment), mock.patch.object(JITFunction, "run", run), _Operators(notes):
        yield notes


@dataclass(frozen=True)
class Row:
    """What one call launches."""

    call: str
    kernels: tuple[str, ...]
    operators: tuple[str, ...]
    waits: tuple[str, ...]


def _sample_patches(cells: int, n: int, **options: Any) -> None:
    import ats

    image = torch.empty(1, 1, 2048, 2048, dtype=torch.uint8)
    ats.sample_patches(image, torch.empty(1, cells, cells), n, 50, mean=0.1, std=0.3, validate=False, **options)


def _sample(n: int, replace: bool) -> tuple[Tensor, ...]:
    import ats_kernels

    logits = torch.empty(2, 32400, requires_grad=True)
    return ats_kernels.sample(logits, n, replace=replace, validate=False)[1:]


def _read(learns: bool) -> tuple[Tensor, ...]:
    import ats_kernels

    image = torch.empty(2, 3, 240, 240, requires_grad=learns)
    return (ats_kernels.extract_patches(image, torch.empty(2, 10, 2, dtype=torch.int64), 50, std=0.3),)


def _view(learns: bool) -> tuple[Tensor, ...]:
    import ats

    return (ats.area_downsample(torch.empty(2, 3, 240, 240, requires_grad=learns), 60, mean=0.1, std=0.3),)


def _pool(n: int, **options: Any) -> tuple[Tensor, ...]:
    import ats

    features, log_attention = torch.empty(2, n, 64, requires_grad=True), torch.empty(2, n, requires_grad=True)
    return (ats.expectation(features, log_attention, **options),)


def calls() -> dict[str, tuple[Callable[[], Any], bool]]:
    """Each call of the table, ready to be made, and whether it is the backward pass of its outputs that counts."""
    found: dict[str, tuple[Callable[[], Any], bool]] = {}
    draws: dict[str, dict[str, Any]] = {
        "": {},
        ", with replacement": {"replace": True},
        ", topk": {"selection": "topk"},
    }
    for n in (10, 64, 256):
        for how, options in draws.items():
            found[f"sample_patches, N = {n}{how}"] = partial(_sample_patches, 180, n, **options), False
    for n in (10, 256):
        for how, options in draws.items():
            found[f"sample_patches, K = 2^20, N = {n}{how}"] = partial(_sample_patches, 1024, n, **options), False
    for n, replace in ((10, False), (64, True), (256, False)):
        how = ", with replacement" if replace else ""
        found[f"backward of sample, N = {n}{how}"] = partial(_sample, n, replace), True
    for name, call in (("extract_patches", _read), ("area_downsample", _view)):
        found[name] = partial(call, False), False
        found[f"backward of {name}"] = partial(call, True), True
    pooled: dict[str, dict[str, Any]] = {
        "": {},
        ", with replacement": {"replace": True},
        ", unordered": {"estimator": "unordered"},
    }
    for how, options in pooled.items():
        for control_variate in (False, True):
            call = partial(_pool, 10, control_variate=control_variate, **options)
            name = f"expectation{how}{', control variate' if control_variate else ''}"
            found |= {name: (call, False), f"backward of {name}": (call, True)}
    return found


def count() -> list[Row]:
    """Make every call once."""
    rows = []
    for name, (call, backward) in calls().items():
        with taking_notes() as notes:
            outputs = call()
            if backward:
                grads = [torch.empty_like(output) for output in outputs]
                notes.clear()
                torch.autograd.backward(outputs, grads)
        rows.append(Row(name, tuple(notes.kernels), tuple(notes.operators), tuple(notes.waits)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table, readable as text."""
    lines: list[tuple[str, ...]] = [("call", "Triton", "other operators", "which")]
    for row in rows:
        lines.append((row.call, f"{len(row.kernels)}", f"{len(row.operators)}", ", ".join(row.kernels + row.operators)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    argparse.ArgumentParser(prog="python -m tools.launches", description=__doc__.splitlines()[0]).parse_args(arguments)
    print(table(count()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
