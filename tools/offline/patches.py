"""How `extract_patches`' kernels are launched, for `tools.offline.compile`."""

import math

import torch
import triton.language as tl

from ats_kernels.device import SCALARS
from ats_kernels.patches.kernels import extract_patches_bwd_kernel, extract_patches_fwd_kernel
from ats_kernels.patches.triton import bwd_blocks, fwd_blocks
from tools.offline.compile import FP64_BUDGET, OfflineCase


def offline_cases() -> list[OfflineCase]:
    """The launches of the three workloads: uint8 and float images, either memory order, forward and backward."""
    mnist = "MNIST", (128, 10, 1), (50, 50), (1500, 1500)
    signs = "signs", (32, 5, 3), (100, 100), (960, 1280)
    giga = "gigapixel", (1, 256, 3), (256, 256), (40000, 40000)
    wide = (r"st\.global\S*\.v4\.b32",)
    return [
        _case("fwd uint8 -> fp32", mnist, "u8", "fp32", needs=wide, budget=22),
        # What every thread does to find its patch weighs most where a thread has few pixels.
        _case("fwd cells, uint8 -> fp32", mnist, "u8", "fp32", needs=wide, budget=32, cells=True),
        _case("fwd cells, uint8 -> fp32", giga, "u8", "fp32", needs=wide, budget=32, cells=True),
        _case("fwd uint8 -> fp32", giga, "u8", "fp32", needs=wide, budget=22),
        _case("fwd uint8 -> bf16", giga, "u8", "bf16", needs=wide, budget=22),
        _case("fwd uint8 -> fp32 channels-last", giga, "u8", "fp32", needs=wide, budget=36, channels_last=True),
        _case("fwd uint8 -> bf16 channels-last", giga, "u8", "bf16", needs=wide, budget=36, channels_last=True),
        _case("fwd uint8 -> fp16 edge", signs, "u8", "fp16", needs=wide, budget=22, edge=True),
        _case("fwd fp32", signs, "fp32", "fp32", needs=wide, budget=12, affine=False),
        _case("fwd fp16", signs, "fp16", "fp16", needs=wide, budget=12, affine=False),
        _case("fwd bf16 -> fp32", signs, "bf16", "fp32", needs=wide, budget=22),
        _case("fwd fp64", signs, "fp64", "fp64", needs=(r"st\.global\S*\.v2\.b64",), budget=22),
        # The loop over the patches of an image counts as one patch.
        _case("bwd fp32", signs, "fp32", "fp32", budget=110, backward=True),
        _case("bwd fp32 edge", signs, "fp32", "fp32", budget=200, backward=True, edge=True),
        _case("bwd fp32 channels-last", signs, "fp32", "fp32", budget=130, backward=True, channels_last=True),
        _case("bwd bf16", signs, "bf16", "bf16", budget=130, backward=True),
    ]


def _case(
    name: str,
    workload: tuple[str, tuple[int, int, int], tuple[int, int], tuple[int, int]],
    image: str,
    patches: str,
    *,
    budget: float,
    needs: tuple[str, ...] = (),
    channels_last: bool = False,
    edge: bool = False,
    affine: bool = True,
    backward: bool = False,
    cells: bool = False,
) -> OfflineCase:
    workload_name, (batch, n, channels), size, image_size = workload
    interleaved = channels if channels_last else 1
    shaped = torch.empty((batch, n, channels, *size), device="meta")
    work = "fp64" if "fp64" in (image, patches) else "fp32"
    tensors = {"offsets_ptr": "*i64"}
    if backward:
        tensors |= {"grad_patches_ptr": f"*{patches}", "grad_image_ptr": f"*{image}"}
    else:
        tensors |= {"image_ptr": f"*{image}", "out_ptr": f"*{patches}"}
    constexprs: dict[str, object] = {"AFFINE": affine}
    numbers = dict.fromkeys((f"scale_{c}" for c in range(SCALARS)), "fp32")
    if affine and work == "fp64":
        tensors["affine_ptr"] = "*fp64"  # no launch carries numbers in float64
    else:
        constexprs["affine_ptr"] = None
    constexprs |= {"stride_image_c" if channels_last else "stride_image_w": 1}
    constexprs |= {
        "CHANNELS": channels,
        "PATCH_HEIGHT": size[0],
        "PATCH_WIDTH": size[1],
        "INTERLEAVED": interleaved,
    }
    if backward:
        (block, num_warps), planes = bwd_blocks(shaped, interleaved), 1
    else:
        block, planes, num_warps = fwd_blocks(shaped, interleaved)
        constexprs |= {"DENSE": True, "PLANES": planes, "WIDE": False, "INDEX": tl.int32}
        numbers |= dict.fromkeys((f"center_{c}" for c in range(SCALARS)), "fp32")
        numbers |= dict.fromkeys(("grid_width", "row_a", "row_b", "row_d", "column_a", "column_b", "column_d"), "i32")
        if cells:
            tensors["indices_ptr"] = "*i64"
        else:
            constexprs["indices_ptr"] = None
    constexprs |= {"EDGE": edge, "BLOCK": block}
    constexprs |= {"COMPUTE": tl.float64 if work == "fp64" else tl.float32}
    far = "i64" if channels * math.prod(image_size) >= 2**31 else "i32"
    signature = tensors | numbers | {"height": "i32", "width": "i32", "patches_an_image": "i32", "stride_image_b": far}
    signature |= {"stride_image_c": "i32", "stride_image_h": "i32", "stride_image_w": "i32"}
    itemsize = {"u8": 1, "fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
    return OfflineCase(
        name=f"{name}, {workload_name}",
        kernel=extract_patches_bwd_kernel if backward else extract_patches_fwd_kernel,
        signature={key: kind for key, kind in signature.items() if key not in constexprs},
        constexprs=constexprs,
        divisible_by_16=tuple(key for key in tensors if key not in constexprs),
        num_warps=num_warps,
        elements=block * planes,
        bytes_per_element=itemsize[image] * (2 if backward else 1) + itemsize[patches],
        budget=budget,
        fp64_budget=1.0 if work == "fp64" else FP64_BUDGET,  # images of float64 are asked for
        needs=needs,
        workload=(workload_name, batch * n * channels * math.prod(size)),
    )
