"""How `expectation`'s kernels are launched, for `tools.offline.compile`: N = 256 draws of D = 512 features, the
gigapixel workload, and N = 10 of 64."""

import triton
import triton.language as tl

from ats_kernels.pooling.triton import _bwd_blocks, _expectation_bwd_kernel, _expectation_fwd_kernel, _fwd_blocks
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
    return cases


def _forward(name: str, n_draws: int, n_features: int, *, given: bool = False) -> OfflineCase:
    block_n, block_d = _fwd_blocks(n_draws, n_features)
    # The code for the weights runs once a step and is spread over a tile.
    budget = (16, 32) if given else (45, 125)
    return OfflineCase(
        name=f"fwd {name} N={n_draws} D={n_features}{', given weights' if given else ''}",
        kernel=_expectation_fwd_kernel,
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
        needs=(r"ld\.global\S*\.v4",),
        workload=_workload(n_draws, n_features),
    )


def _backward(name: str, n_draws: int, n_features: int) -> OfflineCase:
    block_n, block_d = _bwd_blocks(n_features)
    return OfflineCase(
        name=f"bwd {name} N={n_draws} D={n_features}",
        kernel=_expectation_bwd_kernel,
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
