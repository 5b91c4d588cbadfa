"""The GPU path of `sample`: it launches the Triton kernels, which draw by the reference's algorithm and random numbers.

Two launches: pass 1 (`statistics_kernel`) reads the logits once; then, for maps of up to 2,048 blocks and up to 64
draws, one program a row does all the rest (`draw_kernel`), and for larger problems many do (`select_kernel`). Nothing
makes the host wait.
"""

import math

import torch
import triton
from torch import Tensor

from ats_kernels.sampling.cpu import SPARE_BLOCKS
from ats_kernels.sampling.draws import Draw, Statistics, block_size
from ats_kernels.sampling.kernels import statistics_kernel
from ats_kernels.sampling.kernels_bwd import bwd_drawn_kernel, bwd_kernel
from ats_kernels.sampling.kernels_draw import draw_kernel
from ats_kernels.sampling.kernels_large import select_kernel

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_SMALL_DRAWS = 64
# Of a thread of draw_kernel, by DRAWS: fewer, for more programs at once than there are rows, would spill.
MAX_REGISTERS = {16: 128, _SMALL_DRAWS: 192}
SLOTS = 4  # candidate blocks that a program treats at a time
_SMALL_BLOCKS = 2048
_PROGRAMS = 128  # of select_kernel, at most, for a row; of all rows together about _ALL_PROGRAMS, if that is more
_ALL_PROGRAMS = 512
_SPARE_ROOM = 64  # blocks, beside N, whose cells select_kernel has room for
SLOT_CELLS = 512  # that a program of it treats at a time
SELECT_REGISTERS = 224  # of a thread of select_kernel: left to itself, ptxas spills a few
SELECT_TILES = {"OWN": 256, "TILE": 1024, "OTHERS": 16}
_BARRIER_DRAWS = 64  # up to so many, the backward's own programs add what belongs to the drawn cells


def sample_triton(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """Draw from float32, float16 or bfloat16 logits (B, K) on a GPU; like `_sample_ref`, with float32 values."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, cells = logits.shape
    stride, device = logits.stride(0), logits.device
    block = block_size(cells)
    n_blocks = triton.cdiv(cells, block)
    distinct = min(n, cells)
    needed = 1 if replace else n
    topk = seed is None
    small = n_blocks <= _SMALL_BLOCKS and distinct <= _SMALL_DRAWS

    blocks = _blocks_a_program(n_blocks, block)
    n_chunks = triton.cdiv(n_blocks, blocks)
    group = 1 if small else group_size(n_blocks, blocks, distinct)
    n_groups = triton.cdiv(n_blocks, group)
    unit = _unit(cells, stride)
    wide = torch.float64 if replace and not small else torch.float32
    stats = torch.empty(3, rows, n_blocks, dtype=wide, device=device)
    chunk_stats = group_keys = counters = None
    if not small:
        chunk_stats = torch.empty(3, rows, n_chunks, dtype=wide, device=device)
        group_keys = torch.empty(rows, n_groups, dtype=torch.int64, device=device)
        counters = torch.empty(rows, 2, dtype=torch.int32, device=device)
    statistics_kernel[(rows * n_chunks,)](
        logits,
        stats,
        chunk_stats,
        group_keys,
        counters,
        None if small else seed,
        cells // unit,
        n_blocks,
        n_groups,
        n_chunks,
        stride // unit,
        stats.stride(0),
        0 if chunk_stats is None else chunk_stats.stride(0),
        BLOCK=block,
        BLOCKS=blocks,
        SLICE=slice_size(block),
        UNIT=unit,
        WIDE=replace and not small,
        GROUP=group,
        num_warps=warps(blocks * block, 1024),
    )

    indices = torch.empty(rows, distinct, dtype=torch.int64, device=device)
    log_attention = torch.empty(rows, distinct, dtype=wide, device=device)
    row_stats = torch.empty(4, rows, dtype=torch.float32, device=device)
    repeats = repeats_log_attention = None
    if replace:
        repeats = torch.empty(rows, n, dtype=torch.int64, device=device)
        repeats_log_attention = torch.empty(rows, n, dtype=torch.float32, device=device)
    if small:
        padded_blocks = max(64, _padded(n_blocks))
        draws = 16 if distinct <= 16 else _SMALL_DRAWS
        draw_kernel[(rows,)](
            logits,
            seed,
            stats,
            indices,
            log_attention,
            row_stats,
            repeats,
            repeats_log_attention,
            cells,
            n_blocks,
            min(n_blocks, distinct if topk else distinct + SPARE_BLOCKS),
            distinct,
            n,
            needed,
            rows,
            stride,
            stats.stride(0),
            BLOCK=block,
            BLOCKS=padded_blocks,
            SLOTS=SLOTS,
            DRAWS=draws,
            TOPK=topk,
            DECIDE=True,
            num_warps=warps(max(SLOTS * block, 2 * padded_blocks), 256),
            **({} if torch.version.hip else {"maxnreg": MAX_REGISTERS[draws]}),
        )
    else:
        programs = _programs(rows, n_blocks)
        capacity = min(n_blocks, distinct + _SPARE_ROOM) * block
        keys = torch.empty(rows, capacity + max(distinct, n_blocks), dtype=torch.int64, device=device)
        select_kernel[(rows * programs,)](
            logits,
            seed,
            stats,
            chunk_stats,
            group_keys,
            counters,
            torch.empty(2, rows, dtype=torch.float64, device=device),
            keys,
            torch.empty(keys.shape, dtype=torch.int32, device=device),
            indices,
            log_attention,
            row_stats,
            repeats,
            repeats_log_attention,
            cells,
            n_blocks,
            n_groups,
            n_chunks,
            programs,
            capacity,
            distinct,
            n,
            needed,
            rows,
            stride,
            stats.stride(0),
            0 if chunk_stats is None else chunk_stats.stride(0),
            keys.stride(0),
            BLOCK=block,
            SPAN=blocks * block,
            CHUNKS=_padded(n_chunks),
            GROUPS=_groups_together(distinct),
            SLOTS=SLOT_CELLS // block,
            PADDED=_padded(distinct) if replace else 1,
            TOPK=topk,
            **SELECT_TILES,
            num_warps=8,
            **({} if torch.version.hip else {"maxnreg": SELECT_REGISTERS}),
        )
    if repeats is not None and repeats_log_attention is not None:
        indices, log_attention = repeats, repeats_log_attention
    peak, log_total, entropy, logsumexp = row_stats.unbind(0)
    return Draw(indices, log_attention, logsumexp, entropy), Statistics(peak, log_total, entropy)


def grad_triton(
    logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor | None, ...], replace: bool
) -> Tensor:
    """The gradient (B, K) of the logits: one read and one write of the map, the same bits every time."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, cells = logits.shape
    n = indices.shape[1]
    strides = [0, 0, 0, 0]
    for grad, place in zip(grads, ((0, 2), (2, 3), (3, 4)), strict=True):
        if grad is not None:
            strides[slice(*place)] = grad.stride()
    grad_logits = torch.empty(rows, cells, dtype=logits.dtype, device=logits.device)
    tensors = (logits, indices, *statistics, *grads, grad_logits)
    unit = _unit(cells, logits.stride(0))
    tile = min(4096, _padded(cells))
    chunks = triton.cdiv(cells, tile)
    barrier = n <= _BARRIER_DRAWS or grads[0] is None
    bwd_kernel[(rows * chunks,)](
        *tensors,
        cells // unit,
        n,
        chunks,
        logits.stride(0) // unit,
        *strides,
        DRAWS=_padded(n),
        TILE=tile,
        UNIT=unit,
        REPLACE=replace,
        BARRIER=barrier,
        num_warps=warps(tile, 512),
    )
    if not barrier:
        tiles = triton.cdiv(n, _BARRIER_DRAWS)
        bwd_drawn_kernel[(rows * tiles,)](
            *tensors,
            cells,
            n,
            tiles,
            logits.stride(0),
            *strides,
            DRAWS=_padded(n),
            TILE=_BARRIER_DRAWS,
            REPLACE=replace,
            num_warps=4,
        )
    return grad_logits


def warps(elements: int, elements_a_warp: int) -> int:
    """Warps of a program that works on so many elements: a power of two, 8 at most."""
    return min(8, max(1, triton.next_power_of_2(elements // elements_a_warp)))


def slice_size(block: int) -> int:
    """Cells of a block that pass 1 has a thread add up before the warps do; see statistics_kernel."""
    return min(block, 128) if _TRITON >= (3, 7) else block


def _blocks_a_program(n_blocks: int, block: int) -> int:
    """Those of pass 1: 4,096 logits, on large maps 8,192, which keeps its chunks countable by one program."""
    return min(triton.next_power_of_2(n_blocks), (8192 if block == 512 else 4096) // block)


def _groups_together(distinct: int) -> int:
    """Groups of blocks whose keys a program of select_kernel holds: four times the draws, so that few blocks but those
    of the draw ring before the last of N groups."""
    return min(8192, max(2048, triton.next_power_of_2(4 * distinct)))


def group_size(n_blocks: int, blocks: int, distinct: int) -> int:
    """Blocks of a group of pass 1, which holds no more than one program treats: as few groups as are wanted."""
    return min(blocks, max(1, triton.next_power_of_2(n_blocks // _groups_together(distinct))))


def _programs(rows: int, n_blocks: int) -> int:
    """Programs of select_kernel for a row: one for its totals, and an odd number, so that blocks below each other in a
    map fall to different ones."""
    others = min(_PROGRAMS, max(_PROGRAMS // 8, _ALL_PROGRAMS // rows), triton.cdiv(n_blocks, 8))
    return 1 + (others - 1 | 1 if others > 2 else 1)


def _unit(cells: int, stride: int) -> int:
    """16, 4 or 1, whichever divides both: each is a variant of the kernels to compile."""
    common = math.gcd(cells, stride, 16)
    return 16 if common == 16 else 4 if common >= 4 else 1


def _padded(size: int) -> int:
    """The power of two, at least 2, that holds `size`."""
    return max(2, triton.next_power_of_2(size))
