"""The CPU path of `expectation` where compiled loops run; else PyTorch's operators do all."""

import functools
import importlib
import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ats_kernels.backend import loops_run
from ats_kernels.pooling.unordered import ACCURACY, node_steps

_FEW = 2**20  # numbers in the features: of more, PyTorch's products use all cores


@functools.cache
def _loops() -> ModuleType:
    return importlib.import_module("ats_kernels.pooling.loops")


def fit_loops(features: Tensor, log_attention: Tensor) -> bool:
    """Whether the loops pool these."""
    return (
        features.dtype == log_attention.dtype
        and features.dtype in (torch.float32, torch.float64)
        and features.numel() <= _FEW
        and weighs_in_loops()
    )


def weighs_in_loops() -> bool:
    """Whether the loops weigh draws."""
    return not torch.compiler.is_compiling() and loops_run()


def weigh_cpu(log_attention: Tensor, dtype: torch.dtype, *, replace: bool, estimator: str) -> Tensor:
    """The weights (B, N) of `dtype`, from log a (B, N)."""
    log_a = log_attention.detach().to(torch.promote_types(log_attention.dtype, dtype)).contiguous()
    weights = torch.empty(log_a.shape, dtype=dtype, device="cpu")
    _loops().weigh(log_a.numpy(), *_way(log_a.shape[1], dtype, replace, estimator), weights.numpy())
    return weights


def pool_cpu(features: Tensor, log_attention: Tensor, *, replace: bool, estimator: str) -> tuple[Tensor, Tensor]:
    """Pooled features (B, …) and weights (B, N)."""
    shape = features.shape
    flat, log_a = _flat(features), _numpy(log_attention)
    weights, out = np.empty_like(log_a), np.empty((shape[0], flat.shape[2]), flat.dtype)
    _loops().pool(flat, log_a, *_way(shape[1], features.dtype, replace, estimator), weights, out)
    pooled = torch.from_numpy(out)
    return pooled if len(shape) == 3 else pooled.view(shape[:1] + shape[2:]), torch.from_numpy(weights)


def pool_grad_cpu(
    grad: Tensor,  # (B, …)
    features: Tensor,  # (B, N, …)
    log_attention: Tensor,
    weights: Tensor,
    *,
    replace: bool,
    estimator: str,
    centred: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of features and of log_attention; None for one that is not needed."""
    shape = features.shape
    flat, log_a = _flat(features), _numpy(log_attention)
    flat_grad = _numpy(grad.reshape(shape[0], flat.shape[2]))
    grad_features = np.empty(flat.shape if needs[0] else (0, 0, 0), flat.dtype)
    grad_log_attention = np.empty(log_a.shape if needs[1] else (0, 0), log_a.dtype)
    way = _way(shape[1], features.dtype, replace, estimator)
    arguments = flat_grad, flat, log_a, weights.numpy(), *way, centred, grad_features, grad_log_attention
    _loops().pool_grad(*arguments)
    return (
        torch.from_numpy(grad_features).view(shape) if needs[0] else None,
        torch.from_numpy(grad_log_attention) if needs[1] else None,
    )


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
    loops = _loops()
    if replace or estimator != "unordered":
        return loops.REPLACE if replace else loops.ORDERED, np.empty(0), np.empty(0)
    step, count = node_steps(n, dtype)
    nodes = np.arange(count) * step - ACCURACY[dtype]
    return loops.UNORDERED, nodes, np.exp(nodes)
