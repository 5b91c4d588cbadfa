"""The GPU path of `expectation`: it launches the Triton kernels.

Pooling is one launch, and one more for the weights of the unordered estimator; the gradients are one, and one more for
the control variate's coefficients.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ats_kernels.backend import device_guard
from ats_kernels.checks import compute_dtype
from ats_kernels.pooling.kernels import (
    expectation_bwd_kernel,
    expectation_fwd_kernel,
    ordered_coefficients_kernel,
)
from ats_kernels.pooling.kernels_unordered import unordered_coefficients_kernel, unordered_weights_kernel
from ats_kernels.pooling.unordered import ACCURACY, node_steps


def expectation_triton(
    features: Tensor,  # (B, N, D), any strides
    log_attention: Tensor,  # (B, N), any strides
    *,
    replace: bool = False,
    unordered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Φ̂ (B, D) of the features' dtype and the weights (B, N) in float32, or float64 where an argument is."""
    batch, n_draws, n_features = features.shape
    compute = compute_dtype(features.dtype, log_attention.dtype)
    out = torch.empty(batch, n_features, dtype=features.dtype, device=features.device)
    if unordered:
        weights = unordered_weights_triton(log_attention, compute)
    else:
        weights = torch.empty(batch, n_draws, dtype=compute, device=features.device)
    if batch == 0:
        return out, weights
    block_n, block_d = fwd_blocks(n_draws, n_features)
    with device_guard(features):
        # At least one program a row, even without features: it writes the weights.
        expectation_fwd_kernel[(batch * max(1, triton.cdiv(n_features, block_d)),)](
            features,
            log_attention,
            weights,
            out,
            n_draws,
            n_features,
            *features.stride(),
            *log_attention.stride(),
            REPLACE=replace,
            GIVEN=unordered,
            COMPUTE=_triton_dtype(compute),
            BLOCK_ROW=triton.next_power_of_2(n_draws),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out, weights


def expectation_backward_triton(
    grad_out: Tensor,  # (B, D), any strides
    features: Tensor,  # (B, N, D), any strides
    weights: Tensor,  # (B, N), contiguous
    *,
    needs_features: bool,
    needs_log_attention: bool,
    weighted: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """w_k g, contiguous and as the features are, and w_k ⟨g, f_k⟩ or, unless `weighted`, ⟨g, f_k⟩, as the weights are;
    None for one not needed."""
    batch, n_draws, n_features = features.shape
    grad_features = grad_log_attention = None
    if needs_features:
        grad_features = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    if needs_log_attention:
        grad_log_attention = torch.empty_like(weights)
    if batch == 0 or not (needs_features or needs_log_attention):
        return grad_features, grad_log_attention
    block_n, block_d = bwd_blocks(n_features)
    with device_guard(features):
        expectation_bwd_kernel[(batch * triton.cdiv(n_draws, block_n),)](
            grad_out,
            features if needs_log_attention else None,
            weights,
            grad_features,
            grad_log_attention,
            n_draws,
            n_features,
            *grad_out.stride(),
            *features.stride(),
            WEIGHTED=weighted,
            COMPUTE=_triton_dtype(weights.dtype),
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return grad_features, grad_log_attention


def unordered_weights_triton(log_attention: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights w (B, N) of `dtype`, from log a (B, N) of any strides."""
    weights = torch.empty(log_attention.shape, dtype=dtype, device=log_attention.device)
    batch, n_draws = log_attention.shape
    if batch:
        with device_guard(log_attention):
            unordered_weights_kernel[(batch,)](
                log_attention, weights, *_nodes(log_attention, dtype), **_options(n_draws, dtype)
            )
    return weights


def coefficients_triton(
    inner: Tensor,  # (B, N), contiguous
    weights: Tensor,  # (B, N), contiguous
    log_attention: Tensor,  # (B, N), any strides
    *,
    replace: bool,
    estimator: str,
) -> Tensor:
    """`centred_coefficients` of log_attention's dtype."""
    coefficients = torch.empty(log_attention.shape, dtype=log_attention.dtype, device=log_attention.device)
    batch, n_draws = log_attention.shape
    if batch == 0:
        return coefficients
    with device_guard(log_attention):
        if estimator == "unordered":
            unordered_coefficients_kernel[(batch,)](
                inner,
                weights,
                log_attention,
                coefficients,
                *_nodes(log_attention, weights.dtype),
                **_options(n_draws, weights.dtype),
            )
        else:
            ordered_coefficients_kernel[(batch,)](
                inner,
                log_attention,
                coefficients,
                n_draws,
                *log_attention.stride(),
                REPLACE=replace,
                COMPUTE=_triton_dtype(weights.dtype),
                BLOCK_N=triton.next_power_of_2(n_draws),
                num_warps=warps_of_row(n_draws),
            )
    return coefficients


def _nodes(log_attention: Tensor, dtype: torch.dtype) -> tuple[float, ...]:
    """Numbers of draws and of nodes, the nodes' step, and log_attention's strides."""
    n_draws = log_attention.shape[1]
    step, count = node_steps(n_draws, dtype)
    return n_draws, count, step, *log_attention.stride()


def _options(n_draws: int, dtype: torch.dtype) -> dict[str, Any]:
    nodes = triton.next_power_of_2(node_steps(n_draws, dtype)[1])
    return {
        "ACCURACY": ACCURACY[dtype],
        "NODES": nodes,
        "COMPUTE": _triton_dtype(dtype),
        "num_warps": warps_of_row(nodes),
    }


def warps_of_row(lanes: int) -> int:
    """Warps of a program that holds one row: a thread a lane, 8 at most."""
    return min(8, max(1, triton.next_power_of_2(lanes) // 32))


def fwd_blocks(n_draws: int, n_features: int) -> tuple[int, int]:
    """Draws and features of a tile: narrow, so that one row still makes several programs, and tall, so that each
    takes few steps, whose running sums follow one another."""
    block_d = min(64, max(16, triton.next_power_of_2(n_features)))
    return min(triton.next_power_of_2(n_draws), 4096 // block_d), block_d


def bwd_blocks(n_features: int) -> tuple[int, int]:
    """Draws and features of a tile; few draws, so that a small batch still makes enough programs."""
    block_d = min(1024, max(64, triton.next_power_of_2(n_features)))
    return max(1, 1024 // block_d), block_d


def _triton_dtype(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32
