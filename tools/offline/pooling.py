"""How `expectation`'s kernels are launched, for `tools.offline.compile`: N = 256 draws of D = 512 features, the
gigapixel workload, and N = 10 of 64."""

import triton
import triton.language as tl

from ats_kernels.pooling.kernels import (
    expectation_bwd_kernel,
    expectation_fwd_kernel,
    ordered_coefficients_kernel,
)
from ats_kernels.pooling.kernels_unordered import unordered_coefficients_kernel, unordered_weights_kernel
from ats_kernels.pooling.triton import bwd_blocks, fwd_blocks, warps_of_row
from tools.offline.compile import OfflineCase

_SHAPES = (256, 512), (10, 64)  # N, D
_POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
_SIZES = {"n_draws": "i32", "n_features": "i32"}
_STRIDES = {"stride_features_b": "i32", "stride_features_n": "i32"}


def offline_cases() -> list[OfflineCase]:
    """Both kernels at each shape in each dtype; the forward also with weights that are given to it."""
    cases = []
    for name in _POINTERS:
        for shape in _SHAPES:
            cases += [_forward(name, *shape), _forward(name, *shape, given=True), _backward(name, *shape)]
    for kernel, budget in ((unordered_weights_kernel, 1350), (unordered_coefficients_kernel, 1350)):
        cases.append(_row(kernel, budget, 128, {"ACCURACY": 18.0, "NODES": 128, "COMPUTE": tl.float32}))
    cases.append(_row(ordered_coefficients_kernel, 1900, 16, {"REPLACE": False, "COMPUTE": tl.float32, "BLOCK_N": 16}))
    return cases


def _row(kernel: triton.JITFunction, budget: float, lanes: int, constants: dict[str, object]) -> OfflineCase:
    """A program a row, N = 10; an element is a node of the quadrature, or a draw."""
    constants = {"stride_log_attention_n": 1, **constants}
    types = {"step": "fp32", "n_draws": "i32", "n_nodes": "i32", "stride_log_attention_b": "i32"}
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
    return OfflineCase(
        name=f"{kernel.__name__.removesuffix('_kernel').replace('_', ' ')}, N=10",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        divisible_by_16=tuple(name for name in signature if name.endswith("_ptr")),
        num_warps=warps_of_row(lanes),
        elements=lanes,
        bytes_per_element=8 * 10 / lanes,
        budget=budget,
        amd_budget=2600 if lanes > 16 else 5000,  # wavefronts are twice as wide as a row of 16 needs
        workload=("128 rows", 128 * lanes),
    )


def _forward(name: str, n_draws: int, n_features: int, *, given: bool = False) -> OfflineCase:
    block_n, block_d = fwd_blocks(n_draws, n_features)
    # The code for the weights runs once a step and is spread over a tile.
    budget = (16, 32) if given else (45, 125)
    return OfflineCase(
        name=f"fwd {name} N={n_draws} D={n_features}{', given weights' if given else ''}",
        kernel=expectation_fwd_kernel,
        signature={
            "features_ptr": _POINTERS[name],
            "log_attention_ptr": "*fp32",
            "weights_ptr": "*fp32",
            "out_ptr": _POINTERS[name],
            **_SIZES,
            **_STRIDES,
            "stride_log_attention_b": "i32",
        },
        constexprs={
            "stride_features_d": 1,
            "stride_log_attention_n": 1,
            "REPLACE": False,
            "GIVEN": given,
            "COMPUTE": tl.float32,
            "BLOCK_ROW": triton.next_power_of_2(n_draws),
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
        },
        divisible_by_16=("features_ptr", "weights_ptr", "out_ptr", "n_features", *_STRIDES),
        num_warps=4,
        elements=block_n * block_d,
        bytes_per_element=4 if name == "fp32" else 2,
        budget=budget[n_draws < 256],
        amd_budget=None if given else (75, 270)[n_draws < 256],
        needs=(r"ld\.global\S*\.v4",),
        workload=_workload(n_draws, n_features),
    )


def _backward(name: str, n_draws: int, n_features: int) -> OfflineCase:
    block_n, block_d = bwd_blocks(n_features)
    return OfflineCase(
        name=f"bwd {name} N={n_draws} D={n_features}",
        kernel=expectation_bwd_kernel,
        signature={
            "grad_out_ptr": _POINTERS[name],
            "features_ptr": _POINTERS[name],
            "weights_ptr": "*fp32",
            "grad_features_ptr": _POINTERS[name],
            "grad_log_attention_ptr": "*fp32",
            **_SIZES,
            "stride_grad_out_b": "i32",
            **_STRIDES,
        },
        constexprs={
            "stride_grad_out_d": 1,
            "stride_features_d": 1,
            "WEIGHTED": True,
            "COMPUTE": tl.float32,
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
        },
        divisible_by_16=(
            "grad_out_ptr",
            "features_ptr",
            "grad_features_ptr",
            "n_features",
            "stride_grad_out_b",
            *_STRIDES,
        ),
        num_warps=4,
        elements=block_n * block_d,
        bytes_per_element=8 if name == "fp32" else 4,
        budget=36,
        needs=(r"ld\.global\S*\.v4", r"st\.global\S*\.v4"),
        workload=_workload(n_draws, n_features),
    )


def _workload(n_draws: int, n_features: int) -> tuple[str, int]:
    return f"128 x {n_draws} x {n_features}", 128 * n_draws * n_features
