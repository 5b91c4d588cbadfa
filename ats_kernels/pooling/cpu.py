"""The CPU path of `expectation`: compiled loops where they run, NumPy for few numbers; else PyTorch's operators."""

import functools
import importlib
import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ats_kernels.backend import loops_run
from ats_kernels.pooling import small
from ats_kernels.pooling.unordered import ACCURACY, node_steps

# Up to so many numbers in the features, and draws: of more, PyTorch's products use all cores, and its operators' start
# costs less than what they work on.
_FEW = {"loops": (2**20, 2**20), "small": (2**15, 2**10)}
# From so many draws a row, and in all, PyTorch's vectors do an unordered estimate's quadrature sooner than loops.
_MANY_NODES = 33, 256
_PLAIN = (Tensor, torch.nn.Parameter)  # others may be fake, or have ways of their own


@functools.cache
def _loops() -> ModuleType:
    return importlib.import_module("ats_kernels.pooling.loops")


def pools_on_cpu(features: Tensor, log_attention: Tensor, *, unordered: bool) -> str:
    """What pools these: "loops", "small", or "" for PyTorch's operators."""
    if (
        features.dtype != log_attention.dtype
        or features.dtype not in (torch.float32, torch.float64)
        or type(features) not in _PLAIN
    ):
        return ""
    way = weighs_on_cpu(log_attention, unordered=unordered)
    return way if way and features.numel() <= _FEW[way][0] else ""


def weighs_on_cpu(log_attention: Tensor, *, unordered: bool) -> str:
    """What weighs draws with these log a, likewise."""
    if torch.compiler.is_compiling() or type(log_attention) not in _PLAIN:
        return ""
    slow = unordered and log_attention.shape[1] >= _MANY_NODES[0] and log_attention.numel() >= _MANY_NODES[1]
    way = "loops" if loops_run() and not slow else "small"
    return way if log_attention.numel() <= _FEW[way][1] else ""


def _functions(way: str) -> ModuleType:
    return _loops() if way == "loops" else small


def weigh_cpu(log_attention: Tensor, dtype: torch.dtype, by: str, *, replace: bool, estimator: str) -> Tensor:
    """The weights (B, N) of `dtype`, from log a (B, N), as `weighs_on_cpu` said."""
    log_a = log_attention.detach().to(torch.promote_types(log_attention.dtype, dtype)).contiguous()
    weights = torch.empty(log_a.shape, dtype=dtype, device="cpu")
    _functions(by).weigh(log_a.numpy(), *_way(log_a.shape[1], dtype, replace, estimator), weights.numpy())
    return weights


def pool_cpu(
    features: Tensor, log_attention: Tensor, by: str, *, replace: bool, estimator: str
) -> tuple[Tensor, Tensor]:
    """Pooled features (B, …) and weights (B, N), as `pools_on_cpu` said."""
    shape = features.shape
    flat, log_a = _flat(features), _numpy(log_attention)
    weights, out = np.empty(log_a.shape, log_a.dtype), np.empty((shape[0], flat.shape[2]), flat.dtype)
    _functions(by).pool(flat, log_a, *_way(shape[1], features.dtype, replace, estimator), weights, out)
    return _shaped(torch.from_numpy(out), shape[:1] + shape[2:]), torch.from_numpy(weights)


def pool_grad_cpu(
    grad: Tensor,  # (B, …)
    features: Tensor,  # (B, N, …)
    log_attention: Tensor,
    weights: Tensor,
    by: str,
    *,
    replace: bool,
    estimator: str,
    centred: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of features and of log_attention; None for one that is not needed."""
    shape = features.shape
    flat, log_a = _flat(features), _numpy(log_attention)
    flat_grad = _numpy(grad if grad.ndim == 2 else grad.reshape(shape[0], flat.shape[2]))
    grad_features = np.empty(flat.shape if needs[0] else (0, 0, 0), flat.dtype)
    grad_log_attention = np.empty(log_a.shape if needs[1] else (0, 0), log_a.dtype)
    way = _way(shape[1], features.dtype, replace, estimator)
    arguments = flat_grad, flat, log_a, weights.numpy(), *way, centred, grad_features, grad_log_attention
    _functions(by).pool_grad(*arguments)
    return (
        _shaped(torch.from_numpy(grad_features), shape) if needs[0] else None,
        torch.from_numpy(grad_log_attention) if needs[1] else None,
    )


def _shaped(values: Tensor, shape: torch.Size) -> Tensor:
    return values if values.shape == shape else values.view(shape)


def _flat(features: Tensor) -> np.ndarray:
    """(B, N, …) as contiguous (B, N, D)."""
    if features.ndim != 3:
        features = features.reshape(*features.shape[:2], math.prod(features.shape[2:]))
    return _numpy(features)


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().contiguous().numpy()


@functools.lru_cache
def _way(n: int, dtype: torch.dtype, replace: bool, estimator: str) -> tuple[int, np.ndarray, np.ndarray]:
    """The number of the estimator, and the nodes of its quadrature with their exponentials."""
    if replace or estimator != "unordered":
        return small.REPLACE if replace else small.ORDERED, np.empty(0), np.empty(0)
    step, count = node_steps(n, dtype)
    nodes = np.arange(count) * step - ACCURACY[dtype]
    return small.UNORDERED, nodes, np.exp(nodes)
