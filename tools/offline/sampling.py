"""How `sample`'s kernels are launched, for `tools.offline.compile`: 128 maps of 180×180 and one of 2^24 cells."""

from collections.abc import Mapping
from typing import Any

import triton

from ats_kernels.sampling.kernels import SIZES, statistics_kernel
from ats_kernels.sampling.kernels_bwd import bwd_drawn_kernel, bwd_kernel
from ats_kernels.sampling.kernels_draw import draw_kernel
from ats_kernels.sampling.kernels_large import select_kernel
from ats_kernels.sampling.triton import (
    MAX_REGISTERS,
    SELECT_REGISTERS,
    SELECT_TILES,
    SLOT_CELLS,
    SLOTS,
    group_size,
    slice_size,
    warps,
)
from tools.offline.compile import FP64_BUDGET, OfflineCase

# Triton 3.6 takes blocks whole: more instructions than slices need with 3.7, half of what slices would take there.
_SLICED = slice_size(512) < 512
_WIDE_LOAD, _WIDE_STORE = r"ld\.global\S*\.v4", r"st\.global\S*\.v4"

RARE_FP64 = 0.35  # of draw_kernel's code with the branch that one row in hundreds takes
LARGE_FP64 = 0.5  # of what only large maps and many draws take: float64 for their totals, and for a few of their cells

_SIZES = {*SIZES, "n_tiles"}
_SMALL = dict.fromkeys(("chunk_stats_ptr", "group_keys_ptr", "counters_ptr", "seed_ptr"))  # not wanted of small maps
_TYPES = {
    "indices_ptr": "*i64",
    "seed_ptr": "*i64",
    "repeats_ptr": "*i64",
    "group_keys_ptr": "*i64",
    "counters_ptr": "*i32",
    "totals_ptr": "*fp64",
    "keys_ptr": "*i64",
    "cells_ptr": "*i32",
}


def offline_cases() -> list[OfflineCase]:
    """Both ways through the forward, sampled and top-k, and the backward, in every dtype of logits."""
    cases = []
    for dtype, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        for block, chunks, budget in ((64, False, 22), (512, True, (26 if size == 4 else 33) if _SLICED else 38)):
            tile = 8192 if chunks else 4096
            cases.append(
                _case(
                    f"statistics {dtype} blocks of {block}",
                    statistics_kernel,
                    {
                        "BLOCK": block,
                        "BLOCKS": tile // block,
                        "SLICE": slice_size(block),
                        "UNIT": 16,
                        "WIDE": False,
                        "GROUP": group_size(2**15, tile // block, 256) if chunks else 1,
                        **({} if chunks else _SMALL),
                    },
                    dtype=dtype,
                    num_warps=warps(tile, 1024),
                    elements=tile,
                    bytes_per_element=size,
                    budget=budget,
                    amd_budget=50 if chunks else None,
                    needs=(_WIDE_LOAD,),
                )
            )
        cases.append(
            _case(
                f"bwd {dtype}",
                bwd_kernel,
                {"DRAWS": 16, "TILE": 4096, "UNIT": 16, "REPLACE": False, "BARRIER": True},
                dtype=dtype,
                num_warps=8,
                elements=4096,
                bytes_per_element=2 * size,
                budget=22,
                needs=(_WIDE_LOAD, _WIDE_STORE),
            )
        )
    wide: dict[str, object] = {
        "BLOCK": 512,
        "BLOCKS": 16,
        "SLICE": slice_size(512),
        "UNIT": 16,
        "WIDE": True,
        "GROUP": 16,
    }
    topk: dict[str, object] = {**wide, "WIDE": False, "seed_ptr": None}
    for name, constants, budget, share in (
        ("float64 sums", wide, 84 if _SLICED else 108, LARGE_FP64),
        ("topk", topk, 19 if _SLICED else 31, FP64_BUDGET),
    ):
        cases.append(
            _case(
                f"statistics fp32 blocks of 512, {name}",
                statistics_kernel,
                constants,
                wide=constants is wide,
                num_warps=8,
                elements=8192,
                bytes_per_element=4,
                budget=budget,
                amd_budget=88 if constants is wide else 40,
                fp64_budget=share,
            )
        )
    ways: dict[str, dict[str, object]] = {"sample": {"TOPK": False}, "topk": {"TOPK": True, "seed_ptr": None}}
    unrepeated = {"repeats_ptr": None, "repeats_log_attention_ptr": None}
    # What runs unless float32 cannot tell, and with float64's branch, which is rare.
    sizes = {"BLOCK": 64, "BLOCKS": 512, "SLOTS": SLOTS}
    draw: dict[str, Any] = {"kernel": draw_kernel, "num_warps": 4, "elements": 512 * 64}
    for decide, budget, repeats_budget, branch in ((False, 14, 15, ", main path"), (True, 33, 38, "")):
        share = RARE_FP64 if decide else FP64_BUDGET
        cases.append(
            _case(
                f"draw with replacement, 507 blocks, N up to 16{branch}",
                constexprs={**sizes, "DRAWS": 16, "TOPK": False, "DECIDE": decide},
                bytes_per_element=24 / 64,
                budget=repeats_budget,
                fp64_budget=share,
                **draw,
            )
        )
        cases += [
            _case(
                f"draw sample, 507 blocks, N up to {draws}{branch}",
                constexprs={**sizes, "DRAWS": draws, "TOPK": False, "DECIDE": decide, **unrepeated},
                bytes_per_element=12 / 64,
                budget=budget + (draws == 64) * 5,
                fp64_budget=share,
                **draw,
            )
            for draws in (16, 64)
        ]
    cases += [
        _case(
            f"draw topk, 507 blocks, N up to {draws}",
            constexprs={**sizes, "DRAWS": draws, "DECIDE": True, **unrepeated, **ways["topk"]},
            bytes_per_element=12 / 64,
            budget=8 if draws == 16 else 10,
            **draw,
        )
        for draws in (16, 64)
    ]
    select: dict[str, Any] = {
        "BLOCK": 512, "SPAN": 8192, "CHUNKS": 2048, "GROUPS": 2048, "SLOTS": SLOT_CELLS // 512, "PADDED": 1,
        **SELECT_TILES,
    }  # fmt: skip
    for name, constants, budget in (
        ("sample", {**ways["sample"], **unrepeated}, 5600),
        ("topk", {**ways["topk"], **unrepeated}, 2300),
        ("with replacement", {**ways["sample"], "PADDED": 256}, 5900),
    ):
        cases.append(
            _case(
                f"select {name}",
                select_kernel,
                {**select, **constants},
                num_warps=8,
                elements=SLOT_CELLS,
                bytes_per_element=4,
                budget=budget,
                amd_budget=1.2 * budget,
                fp64_budget=LARGE_FP64,
                wide="PADDED" in constants,
            )
        )
    cases += [
        _case(
            "bwd of 256 drawn",
            bwd_drawn_kernel,
            {"DRAWS": 256, "TILE": 64, "REPLACE": True},
            num_warps=4,
            elements=64,
            bytes_per_element=24,
            budget=2000,
            fp64_budget=LARGE_FP64,
        ),
    ]
    return cases


def _case(
    name: str,
    kernel: triton.JITFunction,
    constexprs: Mapping[str, Any],
    *,
    num_warps: int,
    elements: int,
    bytes_per_element: float,
    budget: float,
    dtype: str = "fp32",
    wide: bool = False,
    amd_budget: float | None = None,
    needs: tuple[str, ...] = (),
    fp64_budget: float = FP64_BUDGET,
) -> OfflineCase:
    types = _TYPES | {"logits_ptr": f"*{dtype}", "grad_logits_ptr": f"*{dtype}"}
    if wide:
        types |= dict.fromkeys(("stats_ptr", "chunk_stats_ptr", "log_attention_ptr"), "*fp64")
    signature = {
        arg: types.get(arg, "i32" if arg in _SIZES or arg.startswith("stride") else "*fp32")
        for arg in kernel.arg_names
        if arg not in constexprs
    }
    registers = None
    if kernel is draw_kernel:
        registers = MAX_REGISTERS[constexprs["DRAWS"]]
    elif kernel is select_kernel:
        registers = SELECT_REGISTERS
    return OfflineCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=dict(constexprs),
        # Strides in units of 16 elements are any number; pointers come from torch, aligned.
        divisible_by_16=tuple(arg for arg in signature if arg.endswith("_ptr")),
        num_warps=num_warps,
        elements=elements,
        bytes_per_element=bytes_per_element,
        budget=budget,
        amd_budget=amd_budget,
        needs=needs,
        fp64_budget=fp64_budget,
        max_registers=registers,
    )
