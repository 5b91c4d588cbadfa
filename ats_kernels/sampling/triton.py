"""The GPU path of `sample`: it launches the Triton kernels, which draw by the reference's algorithm and random numbers.

Pass 1 (`statistics_kernel`) reads the logits once. Then, for maps of up to 2,048 blocks and up to 64 draws, one
program a row does all the rest (`draw_kernel`): two launches. Larger problems rank with torch.topk, on block times and
on the times of the cells in the candidate blocks: `block_times_kernel`, topk, `cell_times_kernel`, topk,
`finish_kernel`, and `repeats_kernel` for a draw with replacement. Nothing makes the host wait.
"""

import math

import torch
import triton
from torch import Tensor

from ats_kernels.sampling.cpu import SPARE_BLOCKS
from ats_kernels.sampling.draws import Draw, Statistics, block_size
from ats_kernels.sampling.kernels import repeats_kernel, statistics_kernel
from ats_kernels.sampling.kernels_bwd import bwd_drawn_kernel, bwd_kernel
from ats_kernels.sampling.kernels_draw import draw_kernel
from ats_kernels.sampling.kernels_large import block_times_kernel, cell_times_kernel, finish_kernel

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_SMALL_DRAWS = 64
# Of a thread of draw_kernel, by DRAWS: fewer, for more programs at once than there are rows, would spill.
MAX_REGISTERS = {16: 128, _SMALL_DRAWS: 192}
SLOTS = 4  # candidate blocks that a program treats at a time
_SMALL_BLOCKS = 2048
_TIMES_TILE = 1024  # blocks a program of block_times_kernel
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
    candidates = min(n_blocks, distinct if topk else distinct + SPARE_BLOCKS)
    small = n_blocks <= _SMALL_BLOCKS and distinct <= _SMALL_DRAWS

    blocks = _blocks_a_program(n_blocks, block)
    n_chunks = triton.cdiv(n_blocks, blocks)
    unit = _unit(cells, stride)
    wide = torch.float64 if replace and not small else torch.float32
    stats = torch.empty(3, rows, n_blocks, dtype=wide, device=device)
    chunk_stats = stats if small else torch.empty(3, rows, n_chunks, dtype=wide, device=device)
    statistics_kernel[(rows * n_chunks,)](
        logits,
        stats,
        chunk_stats,
        cells // unit,
        n_blocks,
        n_chunks,
        stride // unit,
        stats.stride(0),
        chunk_stats.stride(0),
        BLOCK=block,
        BLOCKS=blocks,
        SLICE=slice_size(block),
        UNIT=unit,
        WIDE=replace and not small,
        CHUNKS=not small,
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
            candidates,
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
        chosen, order = _rank(logits, seed, stats, chunk_stats, candidates, distinct)
        span = blocks * block
        finish_kernel[(rows,)](
            logits,
            chunk_stats,
            chosen,
            order,
            indices,
            log_attention,
            row_stats,
            cells,
            n_chunks,
            candidates,
            distinct,
            needed,
            rows,
            stride,
            chunk_stats.stride(0),
            BLOCK=block,
            SPAN=span,
            TILE=min(span, 1024),
            CHUNKS=_padded(n_chunks),
            DRAWS=_padded(distinct),
            num_warps=8,
        )
        if replace:
            repeats_kernel[(rows,)](
                seed,
                indices,
                log_attention,
                repeats,
                repeats_log_attention,
                distinct,
                n,
                PADDED=_padded(distinct),
                num_warps=4,
            )
    if repeats is not None and repeats_log_attention is not None:
        indices, log_attention = repeats, repeats_log_attention
    peak, log_total, entropy, logsumexp = row_stats.unbind(0)
    return Draw(indices, log_attention, logsumexp, entropy), Statistics(peak, log_total, entropy)


def _rank(
    logits: Tensor,  # (B, K)
    seed: Tensor | None,
    stats: Tensor,  # (3, B, blocks)
    chunk_stats: Tensor,  # (3, B, chunks)
    candidates: int,
    distinct: int,
) -> tuple[Tensor, Tensor]:
    """The candidate blocks (B, candidates) and, in draw order, the places (B, distinct) of the drawn cells in them."""
    rows, cells = logits.shape
    block = block_size(cells)
    n_blocks, n_chunks = stats.shape[2], chunk_stats.shape[2]
    topk = seed is None
    dtype = torch.int64 if topk else torch.float64
    block_keys = torch.empty(rows, n_blocks, dtype=dtype, device=logits.device)
    tops = torch.empty(rows, dtype=torch.float64, device=logits.device)
    tiles = triton.cdiv(n_blocks, _TIMES_TILE)
    block_times_kernel[(rows * tiles,)](
        seed,
        stats,
        chunk_stats,
        block_keys,
        tops,
        n_blocks,
        n_chunks,
        tiles,
        stats.stride(0),
        CHUNKS=_padded(n_chunks),
        TILE=_TIMES_TILE,
        TOPK=topk,
        num_warps=8,
    )
    chosen = block_keys.topk(candidates, largest=False, sorted=False).indices
    cell_keys = torch.empty(rows, candidates * block, dtype=dtype, device=logits.device)
    cell_times_kernel[(rows * candidates,)](
        logits,
        seed,
        chosen,
        tops,
        cell_keys,
        cells,
        candidates,
        logits.stride(0),
        BLOCK=block,
        TOPK=topk,
        num_warps=warps(block, 128),
    )
    return chosen, cell_keys.topk(distinct, largest=False).indices


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


def _unit(cells: int, stride: int) -> int:
    """16, 4 or 1, whichever divides both: each is a variant of the kernels to compile."""
    common = math.gcd(cells, stride, 16)
    return 16 if common == 16 else 4 if common >= 4 else 1


def _padded(size: int) -> int:
    """The power of two, at least 2, that holds `size`."""
    return max(2, triton.next_power_of_2(size))
