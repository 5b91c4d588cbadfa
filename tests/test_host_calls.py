"""What a small problem costs the host, counted: calls of our functions and operators of PyTorch's, and no clock.

Bounds are what was counted and little more: what raises one shall say why.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ats
import ats_kernels
from tests.helpers import randn, seeded

OURS = tuple(str(Path(package.__path__[0])) for package in (ats, ats_kernels))


class Operators(TorchDispatchMode):
    """Counts operators, in the backward, too."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def count(step: Callable[[], Any]) -> tuple[int, int]:
    """Our functions that a step calls, and the operators that it starts, once all is kept that is kept."""
    for _ in range(2):
        step()
    calls = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(OURS)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    with Operators() as operators:
        step()
    return calls, operators.count


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes, logits that leave the border alone, and features."""
    image = torch.randint(256, (batch, 1, 500, 500), generator=seeded(), dtype=torch.uint8)
    maps = randn(batch, 30, 50)
    for border in (maps[:, :2], maps[:, -2:], maps[:, :, :3], maps[:, :, -3:]):
        border.fill_(-30.0)
    return image, maps.requires_grad_(), randn(batch, 10, 32).requires_grad_()


@pytest.mark.parametrize("batch", [1, 2])
def test_the_chain(batch: int, cpu_path: None) -> None:
    image, maps, features = inputs(batch)

    def step() -> None:
        sample = ats.sample_patches(image, maps, 10, 27)
        pooled = ats.expectation(features, sample.log_attention)
        torch.autograd.grad(pooled.sum(), [maps, features])

    calls, operators = count(step)
    assert calls <= 150
    assert operators <= 64


def test_a_draw(cpu_path: None) -> None:
    logits = randn(1, 1500)
    calls, operators = count(lambda: ats_kernels.sample(logits, 10))
    assert calls <= 35
    assert operators <= 22


@pytest.mark.parametrize("way", [{}, {"estimator": "unordered", "control_variate": True}])
def test_pooling(way: dict[str, Any], cpu_path: None) -> None:
    leaves = [randn(1, 10, 32).requires_grad_(), (randn(1, 10) - 4).requires_grad_()]
    calls, operators = count(lambda: torch.autograd.grad(ats.expectation(*leaves, **way).sum(), leaves))
    assert calls <= 46
    assert operators <= 31
