"""How `area_downsample`'s kernels are launched, for `tools.offline.compile`."""

import triton.language as tl

from ats_kernels.device import SCALARS
from ats_kernels.views.kernels import area_downsample_bwd_kernel, area_downsample_fwd_kernel
from ats_kernels.views.triton import (
    BWD_TILE,
    OUT_ROWS,
    fwd_tile,
    longest_bin,
    row_unit,
    rows_in_flight,
)
from tools.offline.compile import OfflineCase


def offline_cases() -> list[OfflineCase]:
    """The MNIST and gigapixel views, whose rows are multiples of 4 and of 16 bytes, and a float image's gradient."""
    launches = [  # name, image, H = W, h = w, channels, interleaved, workload
        ("uint8 1500 -> 180", "u8", 1500, 180, 1, 1, ("MNIST", 128 * 1500**2)),
        ("uint8 40000 -> 4096", "u8", 40000, 4096, 3, 1, ("gigapixel", 3 * 40000**2)),
        ("uint8 40000 -> 4096 NHWC", "u8", 40000, 4096, 3, 3, ("gigapixel", 3 * 40000**2)),
        ("bf16 1280 -> 384", "bf16", 1280, 384, 3, 1, ("signs", 32 * 3 * 960 * 1280)),
        ("fp32 1280 -> 384", "fp32", 1280, 384, 3, 1, ("signs", 32 * 3 * 960 * 1280)),
    ]
    cases = []
    for name, image, side, view, channels, interleaved, workload in launches:
        item = {"u8": 1, "bf16": 2, "fp32": 4}[image]
        unit = row_unit(side * interleaved, side * interleaved, item)
        tile = fwd_tile(side, view, interleaved, unit, item)
        rows = rows_in_flight(longest_bin(side, view), tile, item, unit, True)
        sizes = dict.fromkeys(("in_height", "in_width", "out_height", "out_width"), "i32")
        strides = dict.fromkeys(("units_image_b", "units_image_c", "units_image_h"), "i32")
        out_strides = dict.fromkeys(("stride_out_b", "stride_out_c", "stride_out_h"), "i32")
        constants = {f"{what}_{c}": "fp32" for what in ("mean", "std") for c in range(SCALARS)}
        layout = {"PLANES": channels // interleaved, "INTERLEAVED": interleaved, "UNIT": unit}
        cases.append(
            OfflineCase(
                name=f"fwd {name}",
                kernel=area_downsample_fwd_kernel,
                signature={
                    "image_ptr": f"*{image}",
                    "out_ptr": "*fp32",
                    **sizes,
                    "out_columns": "i32",
                    **strides,
                    "stride_image_w": "i32",
                    **out_strides,
                    **({} if interleaved == 1 else {"stride_out_w": "i32"}),
                    **constants,
                },
                constexprs={
                    **({"stride_out_w": 1} if interleaved == 1 else {}),
                    **layout,
                    "CONTIGUOUS": True,
                    "BYTES": image == "u8",
                    "AFFINE": True,
                    "COMPUTE": tl.float32,
                    "TOTAL": tl.int32 if image == "u8" else tl.float32,
                    "INDEX": tl.int32,
                    "WIDE": False,
                    "OUT_ROWS": OUT_ROWS,
                    "BLOCK_J": tile.block_j,
                    "BLOCK_K": tile.block_k,
                    "BLOCK_W": tile.block_w,
                    "ROWS": rows,
                },
                divisible_by_16=("image_ptr", "out_ptr"),
                num_warps=tile.num_warps,
                elements=tile.columns * interleaved * side // view * rows,
                bytes_per_element=item + 4 * (view / side) ** 2,
                # What depends on columns only counts whole, though it runs once for OUT_ROWS rows; what is done once
                # for a bin counts as if each bin had ROWS rows.
                budget=50 if image != "u8" else (24 if unit < 16 else 18),
                needs=(r"ld\.global\S*\.v4\.b32",) if unit * item == 16 else (r"ld\.global\S*\.b32",),
                workload=workload,
            )
        )
        if image == "u8":
            continue
        cases.append(
            OfflineCase(
                name=f"bwd {name}",
                kernel=area_downsample_bwd_kernel,
                signature={
                    "grad_out_ptr": f"*{image}",
                    "grad_image_ptr": f"*{image}",
                    **sizes,
                    **strides,
                    **out_strides,
                    **{name: kind for name, kind in constants.items() if name.startswith("std")},
                },
                constexprs={
                    "stride_out_w": 1,
                    **layout,
                    "AFFINE": True,
                    "COMPUTE": tl.float32,
                    "INDEX": tl.int32,
                    "BLOCK_W": BWD_TILE[0],
                    "ROWS": BWD_TILE[1],
                },
                divisible_by_16=("grad_out_ptr", "grad_image_ptr"),
                num_warps=4,
                elements=BWD_TILE[0],
                bytes_per_element=item + item * (view / side) ** 2,
                budget=155,  # of which 120 are the columns' code, run once for all rows of a tile
                needs=(r"st\.global\S*\.v[24]\.b32",),
                workload=workload,
            )
        )
    return cases
