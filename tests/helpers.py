"""What several test files share: the table of tolerances and a patch cut by plain slicing."""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

# How far two computations of one quantity may lie apart, by the dtype they end in.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare values within the tolerance of `dtype`, by default that of `actual`; NaN equals NaN."""
    tolerance = TOLERANCES[actual.dtype if dtype is None else dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), equal_nan=True, **tolerance)


def cut(image: Tensor, top: int, left: int, size: tuple[int, int], mode: str = "constant") -> Tensor:
    """The patch (C, ph, pw) of one image (C, H, W), sliced out of a padded copy."""
    margin = max(size) + max(0, -top, -left, top + size[0] - image.shape[1], left + size[1] - image.shape[2])
    padded = F.pad(image[None].double(), [margin] * 4, mode=mode)[0]
    return padded[:, top + margin : top + margin + size[0], left + margin : left + margin + size[1]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers, the same in every dtype but for rounding."""
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed)).to(dtype)


def alone(**more: str) -> dict[str, str]:
    """The environment of a process that pytest-xdist and coverage shall know nothing of.

    pytest-benchmark does nothing in one of several workers, nor in their children; and coverage, which sees every line
    of every library, makes Triton's interpreter twice as slow.
    """
    told = "PYTEST_XDIST", "COVERAGE_PROCESS"
    return {name: value for name, value in os.environ.items() if not name.startswith(told)} | more
