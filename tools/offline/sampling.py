"""How `sample`'s kernels are launched, for `tools.offline.compile`: 128 maps of 180×180 and one of 2^24 cells."""

from collections.abc import Mapping

import triton

from ats_kernels.sampling.kernels import SIZES, draw_kernel, repeats_kernel, statistics_kernel
from ats_kernels.sampling.kernels_bwd import bwd_drawn_kernel, bwd_kernel
from ats_kernels.sampling.kernels_large import block_times_kernel, cell_times_kernel, finish_kernel
from ats_kernels.sampling.triton import MAX_REGISTERS, SLOTS, slice_size, warps
from tools.offline.compile import OfflineCase

# Triton 3.6 takes blocks whole: more instructions than slices need with 3.7, half of what slices would take there.
_SLICED = slice_size(512) < 512
_WIDE_LOAD, _WIDE_STORE = r"ld\.global\S*\.v4", r"st\.global\S*\.v4"

_SIZES = set(SIZES)
_TYPES = {
    "indices_ptr": "*i64",
    "seed_ptr": "*i64",
    "chosen_ptr": "*i64",
    "order_ptr": "*i64",
    "distinct_ptr": "*i64",
    "repeats_ptr": "*i64",
    "keys_ptr": "*fp64",
    "tops_ptr": "*fp64",
    "distinct_log_attention_ptr": "*fp64",
}


def offline_cases() -> list[OfflineCase]:
    """Both ways through the forward, sampled and top-k, and the backward, in every dtype of logits."""
    cases = []
    for dtype, size in (("fp32", 4), ("fp16", 2), ("bf16", 2)):
        for block, chunks, budget in ((64, False, 22), (512, True, 21 if size == 4 and _SLICED else 36)):
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
                        "CHUNKS": chunks,
                    },
                    dtype=dtype,
                    num_warps=warps(tile, 1024),
                    elements=tile,
                    bytes_per_element=size,
                    budget=budget,
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
    cases.append(
        _case(
            "statistics fp32, float64 sums",
            statistics_kernel,
            {"BLOCK": 64, "BLOCKS": 64, "SLICE": 64, "UNIT": 16, "WIDE": True, "CHUNKS": False},
            wide=True,
            num_warps=4,
            elements=4096,
            bytes_per_element=4,
            budget=80,
        )
    )
    ways: dict[str, dict[str, object]] = {"sample": {"TOPK": False}, "topk": {"TOPK": True, "seed_ptr": None}}
    unrepeated = {"repeats_ptr": None, "repeats_log_attention_ptr": None}
    cases.append(
        _case(
            "draw with replacement, 507 blocks, N up to 16",
            draw_kernel,
            {"BLOCK": 64, "BLOCKS": 512, "SLOTS": SLOTS, "DRAWS": 16, "TOPK": False},
            wide=True,
            num_warps=4,
            elements=512 * 64,
            bytes_per_element=24 / 64,
            budget=30,
        )
    )
    for way, topk in ways.items():
        cases += [
            *(
                _case(
                    f"draw {way}, 507 blocks, N up to {draws}",
                    draw_kernel,
                    {"BLOCK": 64, "BLOCKS": 512, "SLOTS": SLOTS, "DRAWS": draws, **unrepeated, **topk},
                    num_warps=4,
                    elements=512 * 64,
                    bytes_per_element=12 / 64,
                    budget=25,
                )
                for draws in (16, 64)
            ),
            _case(
                f"block times {way}",
                block_times_kernel,
                {"CHUNKS": 2048, "TILE": 1024, **topk},
                num_warps=8,
                elements=1024 * 512,
                bytes_per_element=20 / 512,
                budget=2,
            ),
            _case(
                f"cell times {way}",
                cell_times_kernel,
                {"BLOCK": 512, **topk},
                num_warps=4,
                elements=512,
                bytes_per_element=12,
                budget=1000,
            ),
        ]
    cases += [
        _case(
            "finish",
            finish_kernel,
            {"BLOCK": 512, "SPAN": 8192, "TILE": 1024, "CHUNKS": 2048, "DRAWS": 256},
            num_warps=8,
            elements=2048 * 8192,
            bytes_per_element=12 / 8192,
            budget=2,
        ),
        _case(
            "repeats",
            repeats_kernel,
            {"PADDED": 16},
            num_warps=4,
            elements=10,
            bytes_per_element=40,
            budget=4500,
        ),
        _case(
            "bwd of 256 drawn",
            bwd_drawn_kernel,
            {"DRAWS": 256, "TILE": 64, "REPLACE": True},
            num_warps=4,
            elements=64,
            bytes_per_element=24,
            budget=2000,
        ),
    ]
    return cases


def _case(
    name: str,
    kernel: triton.JITFunction,
    constexprs: Mapping[str, object],
    *,
    num_warps: int,
    elements: int,
    bytes_per_element: float,
    budget: float,
    dtype: str = "fp32",
    wide: bool = False,
    needs: tuple[str, ...] = (),
) -> OfflineCase:
    types = _TYPES | {"logits_ptr": f"*{dtype}", "grad_logits_ptr": f"*{dtype}"}
    if wide:
        types |= dict.fromkeys(("stats_ptr", "chunk_stats_ptr", "log_attention_ptr"), "*fp64")
    if constexprs.get("TOPK"):
        types["keys_ptr"] = "*i64"  # in place of times
    signature = {
        arg: types.get(arg, "i32" if arg in _SIZES or arg.startswith("stride") else "*fp32")
        for arg in kernel.arg_names
        if arg not in constexprs
    }
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
        needs=needs,
        max_registers=MAX_REGISTERS if kernel is draw_kernel else None,
    )
