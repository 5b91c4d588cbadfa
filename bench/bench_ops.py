"""Each op against plain PyTorch, eager and compiled, and lower bounds: one read of the logits, one copy of the result.

On a CPU the targets are ratios of one run; on a GPU they are multiples of the floor, the bytes that must move over the
rate at which that GPU was measured to copy. There inputs take turns that together are larger than its L2. Nothing here
fails when a target is missed: the report says so.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ats
import ats_kernels
from ats.functional import extract_cells
from bench.measure import Method, available_bytes, rotation, scratch_bytes
from bench.rehearsal import pinned, small
from bench.report import Group, Report

SECTION = "ops"
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
COPIES = 4  # of the inputs, used in turn, on a CPU
MB = 1e6
FLOOR = "of {} at a large copy's rate"
GPU = pytest.mark.gpu


def multinomial(logits: Tensor, n: int) -> Tensor:
    return torch.multinomial(logits.softmax(-1), n)


def gumbel_top_k(logits: Tensor, n: int) -> Tensor:
    """Without replacement, with a random number a cell."""
    return (logits - torch.empty_like(logits).exponential_().log()).topk(n).indices


@pytest.mark.parametrize(
    ("batch", "cells", "n", "gpu_floors"),
    [
        (1, 2**22, 10, None),
        (16, 32_400, 10, None),
        (1, 1_500, 5, None),
        pytest.param(128, 32_400, 10, 2.0, marks=GPU),
        pytest.param(1, 2**24, 256, 1.5, marks=GPU),
    ],
)
def bench_sampling(report: Report, batch: int, cells: int, n: int, gpu_floors: float | None) -> None:
    batch, cells, n = small(batch, 4), small(cells, 2**16), small(n, 64)
    copies = rotation(report.device, 4 * batch * cells, COPIES)
    logits = [torch.randn(batch, cells, device=report.device) for _ in range(copies)]
    compiled = torch.compile(gumbel_top_k, dynamic=False)
    with_compiled = cells != 1_500  # one compilation a size takes its seconds
    group = report.compare(
        f"Sampling: B = {batch}, K = {cells:,}, N = {n}",
        {
            "ats_kernels.sample": lambda i: ats_kernels.sample(logits[i % copies], n),
            "torch.multinomial(logits.softmax(-1))": lambda i: multinomial(logits[i % copies], n),
            "one read: logits.amax()": lambda i: logits[i % copies].amax(-1),
        },
        {"Gumbel top-k, compiled": lambda i: compiled(logits[i % copies], n)} if with_compiled else None,
        copies=copies,
        floor_bytes=4 * batch * cells,
    )
    ours = group.time("ats_kernels.sample")
    eager = group.ratio("torch.multinomial(logits.softmax(-1))", "ats_kernels.sample")
    if gpu_floors:
        group.at_most(gpu_floors, report.times_floor(ours, 4 * batch * cells), FLOOR.format("reading the logits"))
        group.at_least(6, eager, "faster than torch.multinomial")
        scratch, _ = scratch_bytes(lambda i: ats_kernels.sample(logits[i % copies], n), report.device)
        group.at_most(5, 100 * scratch / (batch * cells * 4), "scratch, of the logits", "%")
    elif not report.on_gpu and cells == 2**22:
        group.at_least(25, eager, "faster than torch.multinomial")
        group.at_most(8, group.ratio("ats_kernels.sample", "one read: logits.amax()"), "of one read")
    elif not report.on_gpu and batch == 16:
        group.at_least(6, eager, "faster than torch.multinomial")
    elif not report.on_gpu:
        group.at_most(0.5, ours, "a call", "ms")


def bench_sampling_of_more_cells_than_multinomial_takes(report: Report) -> None:
    power = small(25, 16)
    logits = torch.randn(1, 2**power, device=report.device)
    group = report.compare(
        f"Sampling: B = 1, K = 2^{power}, N = 10",
        {
            "ats_kernels.sample": lambda i: ats_kernels.sample(logits, 10),
            "one read: logits.amax()": lambda i: logits.amax(-1),
        },
        floor_bytes=4 * logits.numel(),
    )
    try:
        multinomial(logits, 10)
    except RuntimeError as error:
        group.notes.append(f"torch.multinomial refuses: {str(error).splitlines()[0]}")
    assert ats_kernels.sample(logits, 10).indices.unique().numel() == 10


def by_indexing(image: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Patches (B, N, C, size, size) that lie inside their images (B, C, H, W), as one writes it in plain PyTorch."""
    which = torch.arange(len(image), device=image.device).view(-1, 1, 1, 1)
    side = torch.arange(size, device=image.device)
    rows, columns = (offsets[..., axis, None] + side for axis in (0, 1))  # (B, N, size)
    return image[which, :, rows.unsqueeze(-1), columns.unsqueeze(-2)].movedim(-1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float32", "uint8 to normalised float32"])
def bench_gather(report: Report, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    image = noise((8, 3, 1500, 1500), dtype, report.device)
    moved = 8 * 10 * 3 * 50 * 50 * (image.element_size() + 4)
    copies = rotation(report.device, moved, COPIES)
    offsets = [torch.randint(1450, (8, 10, 2), device=report.device) for _ in range(copies)]
    normal = {"mean": MEAN, "std": STD} if dtype == torch.uint8 else {}
    mean, std = (torch.tensor(value, device=report.device).view(3, 1, 1) for value in (MEAN, STD))

    def indexing(offsets: Tensor) -> Tensor:
        patches = by_indexing(image, offsets, 50)
        return (patches / 255 - mean) / std if normal else patches

    def ours(i: int) -> Tensor:
        return ats_kernels.extract_patches(image, offsets[i % copies], 50, **normal)

    def slices(offsets: Tensor) -> Tensor:
        corners = [(b, y, x) for b, image_offsets in enumerate(offsets.tolist()) for y, x in image_offsets]
        patches = torch.stack([image[b, :, y : y + 50, x : x + 50] for b, y, x in corners])
        return ((patches / 255 - mean) / std if normal else patches).unflatten(0, (8, 10))

    torch.testing.assert_close(ours(0), indexing(offsets[0]))
    torch.testing.assert_close(ours(0), slices(offsets[0]))
    result = ours(0)
    compiled = torch.compile(indexing, dynamic=False)
    by_slices = {}  # of offsets that the host knows: a GPU would have to be waited for
    if not report.on_gpu:
        by_slices["slices and torch.stack"] = lambda i: slices(offsets[i % copies])
    group = report.compare(
        f"Gather: 10 patches of 50×50 from 8 images of 3×1500×1500, {request.node.callspec.id}",
        {
            "ats_kernels.extract_patches": ours,
            "advanced indexing": lambda i: indexing(offsets[i % copies]),
            "copying the result": lambda i: result.clone(),
            **by_slices,
        },
        {"advanced indexing, compiled": lambda i: compiled(offsets[i % copies])},
        copies=copies,
        floor_bytes=moved,
    )
    slower, times = group.ratio("ats_kernels.extract_patches", "copying the result"), (6, 4)
    if normal:
        times = (4, 6)
    eager = group.ratio("advanced indexing", "ats_kernels.extract_patches")
    group.at_least(4 if report.on_gpu else times[0], eager, "faster than advanced indexing")
    if not report.on_gpu:
        group.at_most(times[1], slower, "of copying the result")
    memory_target(group, report, ours)


@pytest.mark.parametrize(
    ("batch", "channels", "side", "n", "patch", "floors"),
    [
        pytest.param(128, 1, 1500, 10, 50, 2.0, marks=GPU),
        pytest.param(1, 3, 40_000, 256, 256, 1.5, marks=GPU),
        (1, 1, 32_768, 256, 256, None),
    ],
    ids=["MNIST", "gigapixel in colour", "gigapixel"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_gather_large(
    report: Report, batch: int, channels: int, side: int, n: int, patch: int, floors: float | None, dtype: torch.dtype
) -> None:
    batch, side, n = small(batch, 4), small(side, 2000), small(n, 16)
    too_large(report, batch * channels * side**2)
    image = noise((batch, channels, side, side), torch.uint8, report.device)
    moved = batch * n * channels * patch**2 * (1 + dtype.itemsize)
    copies = rotation(report.device, moved, COPIES)
    offsets = [torch.randint(side - patch, (batch, n, 2), device=report.device) for _ in range(copies)]

    def indexing(offsets: Tensor) -> Tensor:
        return by_indexing(image, offsets, patch).to(dtype) / 255

    compiled = torch.compile(indexing, dynamic=False)
    result = torch.empty(batch, n, channels, patch, patch, dtype=dtype, device=report.device)
    group = report.compare(
        f"Gather: {n} patches of {patch}×{patch} from {batch} images of {channels}×{side}×{side} uint8, to {dtype}",
        {
            "ats_kernels.extract_patches": lambda i: ats_kernels.extract_patches(
                image, offsets[i % copies], patch, dtype=dtype
            ),
            "advanced indexing": lambda i: indexing(offsets[i % copies]),
            "copying the result": lambda i: result.clone(),
        },
        {"advanced indexing, compiled": lambda i: compiled(offsets[i % copies])},
        copies=copies,
        seconds=1.0,
        floor_bytes=moved,
    )
    if floors:
        times = report.times_floor(group.time("ats_kernels.extract_patches"), moved)
        group.at_most(floors, times, FLOOR.format("moving the patches"))


@GPU
def bench_gather_from_host_memory(report: Report) -> None:
    batch = small(128, 4)
    images = pinned(noise((batch, 1, 1500, 1500), torch.uint8, torch.device("cpu")), report.device)
    cells = [torch.randint(32_400, (batch, 10), device=report.device) for _ in range(COPIES)]

    def patches(images: Tensor, i: int) -> Tensor:
        return extract_cells(images, cells[i % COPIES], (180, 180), (50, 50))[0]

    group = report.compare(
        f"Gather from pinned host memory: 10 patches of 50×50 from {batch} images of 1×1500×1500 uint8",
        {
            "only the patches": lambda i: patches(images, i),
            "the images copied first": lambda i: patches(images.to(report.device, non_blocking=True), i),
        },
        copies=COPIES,
    )
    group.notes.append("Computed beforehand: 0.23 ms for the patches' bytes alone, 5.2 ms for the images.")


@pytest.mark.parametrize(
    ("batch", "channels", "side", "size"),
    [(8, 3, 1500, 180), pytest.param(1, 3, 40_000, 1024, marks=GPU), (1, 1, 32_768, 1024)],
)
def bench_view(report: Report, batch: int, channels: int, side: int, size: int) -> None:
    batch, side, size = small(batch, 2), small(side, 2000), small(size, 180)
    too_large(report, 6 * batch * channels * side**2)  # with a float copy
    copies = rotation(report.device, batch * channels * side**2, 2) if side == 1500 else 1
    images = [noise((batch, channels, side, side), torch.uint8, report.device) for _ in range(copies)]

    def eager(i: int) -> Tensor:
        return F.interpolate(images[i % copies].float() / 255, size=(size, size), mode="area")

    def divided_after(i: int) -> Tensor:
        return F.interpolate(images[i % copies].float(), size=(size, size), mode="area") / 255

    def ours(i: int) -> Tensor:
        return ats_kernels.area_downsample(images[i % copies], size)

    methods = {
        "ats_kernels.area_downsample": ours,
        "F.interpolate(image.float() / 255, mode='area')": eager,
        **({"the same, divided after pooling": divided_after} if side == 1500 else {}),
        "one read: image.amax()": lambda i: images[i % copies].amax(),
    }
    compiled = {}
    if side == 1500:
        torch.testing.assert_close(ours(0), eager(0), rtol=1e-5, atol=1e-5)
        compiled_ours = torch.compile(ats_kernels.area_downsample, dynamic=False)
        compiled_eager = torch.compile(
            lambda image: F.interpolate(image.float() / 255, size=(size, size), mode="area"), dynamic=False
        )
        compiled["F.interpolate, compiled"] = lambda i: compiled_eager(images[i % copies])
        if not report.on_gpu:
            compiled["torch.compile(ats_kernels.area_downsample)"] = lambda i: compiled_ours(images[i % copies], size)
    group = report.compare(
        f"View: {batch} images of {channels}×{side}×{side} uint8 at {size}×{size}",
        methods,
        compiled,
        copies=copies,
        seconds=3,
        floor_bytes=images[0].numel() + 4 * batch * channels * size**2,
    )
    baseline = "F.interpolate(image.float() / 255, mode='area')"
    faster = group.ratio(baseline, "ats_kernels.area_downsample")
    if report.on_gpu:
        times = report.times_floor(group.time("ats_kernels.area_downsample"), images[0].numel())
        group.at_most(1.5 if side > 1500 else 2.0, times, FLOOR.format("reading the images"))
        group.at_least(6, faster, "faster than F.interpolate")
        memory_target(group, report, ours)
    else:
        group.at_least(4, faster, "faster than F.interpolate")
        if "torch.compile(ats_kernels.area_downsample)" in group.rounds:
            group.at_least(
                10,
                group.ratio(baseline, "torch.compile(ats_kernels.area_downsample)"),
                "compiled, faster than F.interpolate",
            )
        scratch, _ = scratch_bytes(ours, report.device)
        group.at_most(15, 100 * scratch / (4 * images[0].numel()), "scratch, of the float copy", "%")


@pytest.mark.parametrize(("batch", "n", "size"), [(16, 10, 512), (16, 100, 512), (1, 256, 2048)])
def bench_expectation(report: Report, batch: int, n: int, size: int) -> None:
    copies = rotation(report.device, 8 * batch * n * size, COPIES)
    device = report.device
    logits = [torch.randn(batch, 32_400, device=device) for _ in range(copies)]
    drawn = [row.log_softmax(-1)[:, :n].clone().requires_grad_() for row in logits]
    features = [torch.randn(batch, n, size, device=device, requires_grad=True) for _ in range(copies)]

    def eager(features: Tensor, log_attention: Tensor) -> Tensor:
        """The same estimate and gradient: w_k (f_k + f_k (log a_k − its value))."""
        attention = log_attention.detach().exp()
        left = 1 - (attention.cumsum(-1) - attention)
        weights = (left + torch.arange(n - 1, -1, -1, device=attention.device) * attention) / n
        terms = features + features.detach() * (log_attention - log_attention.detach()).unsqueeze(-1)
        return torch.einsum("bn,bnd->bd", weights, terms)

    def with_gradients(method: Callable[[Tensor, Tensor], Tensor]) -> Method:
        def call(i: int) -> tuple[Tensor, ...]:
            leaves = features[i % copies], drawn[i % copies]
            return torch.autograd.grad(method(*leaves).sum(), leaves)

        return call

    report.compare(
        f"Expectation, forward and backward: B = {batch}, N = {n}, D = {size}",
        {"ats.expectation": with_gradients(ats.expectation), "eager": with_gradients(eager)},
        {"eager, compiled": with_gradients(torch.compile(eager, dynamic=False))},
        copies=copies,
        seconds=1.0,
        floor_bytes=4 * (2 * features[0].numel() + 2 * batch * size),
    )


def too_large(report: Report, size: int) -> None:
    """Skip what would take more than a third of the free memory."""
    free = available_bytes(report.device)
    if size > free / 3:
        pytest.skip(f"takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def memory_target(group: Group, report: Report, method: Method) -> None:
    """Scratch of at most 5% of what the op returns."""
    scratch, returned = scratch_bytes(method, report.device)
    group.at_most(5, 100 * scratch / returned, f"scratch, of the {returned / MB:.3g} MB returned", "%")


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.uint8:
        flat = torch.empty(math.prod(shape), dtype=dtype, device=device)
        block = torch.randint(256, (min(len(flat), 2**24),), dtype=dtype, device=device)
        for part in flat.split(2**24):  # random bytes take long to make: large images repeat them
            part.copy_(block[: len(part)])
        return flat.view(shape)
    return torch.rand(shape, dtype=dtype, device=device)
