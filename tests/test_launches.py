"""What each call launches, counted without a GPU, and what is compiled for a data set of many sizes."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

import ats
import ats_kernels
from tests.conftest import HAS_GPU, INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed: nothing can be launched")

from tools import launches

pytestmark = pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="counted on CPU tensors, by the compiler's own launcher")


@pytest.fixture(scope="module")
def rows() -> dict[str, launches.Row]:
    return {row.call: row for row in launches.count()}


def test_nothing_waits(rows: dict[str, launches.Row]) -> None:
    assert {name: row.waits for name, row in rows.items() if row.waits} == {}


@pytest.mark.parametrize("how", ["", ", with replacement", ", topk"])
@pytest.mark.parametrize("what", ["N = 10", "N = 64", "N = 256", "K = 2^20, N = 10", "K = 2^20, N = 256"])
def test_drawing_and_reading(what: str, how: str, rows: dict[str, launches.Row]) -> None:
    row = rows[f"sample_patches, {what}{how}"]
    draw = "draw_kernel" if what in ("N = 10", "N = 64") else "select_kernel"
    assert row.kernels == ("statistics_kernel", draw, "extract_patches_fwd_kernel")
    assert row.operators == (() if how == ", topk" else ("randint",))


def test_one_draw_kernel_for_all_batch_sizes_maps_of_a_kind_and_draws() -> None:
    with launches.taking_notes() as notes:
        for rows, cells, n in ((1, 32_400, 10), (128, 32_400, 10), (16, 32_000, 16), (7, 20_011, 3)):
            ats_kernels.sample(torch.empty(rows, cells), n, validate=False)
    drawn = {variant for variant in notes.variants if variant.startswith("draw_kernel")}
    assert notes.kernels.count("draw_kernel") == 4
    assert len(drawn) == 1


def test_few_kernels_for_all_large_maps() -> None:
    with launches.taking_notes() as notes:
        for rows, cells, n in ((1, 1_100_000, 10), (16, 5 * 2**18, 100), (3, 1_500_000, 40), (1, 1_900_000, 512)):
            ats_kernels.sample(torch.empty(rows, cells), n, validate=False)
    found = Counter(variant.split()[0] for variant in notes.variants)
    assert found == {"statistics_kernel": 2, "select_kernel": 1}  # blocks of 4 groups, or 2


SIDES = [(300 + 7 * i, 290 + 5 * i) for i in range(143)]  # of images, of every remainder; up to 1294 x 1000


def variants(call: Callable[[int, int], torch.Tensor], sizes: list[tuple[int, int]]) -> Counter[str]:
    """How many variants of each kernel are compiled for all sizes, the backward's too where there is a gradient."""
    with launches.taking_notes() as notes:
        for size in sizes:
            output = call(*size)
            if output.requires_grad:
                output.sum().backward()
    assert len(notes.kernels) >= len(sizes)
    return Counter(variant.split()[0] for variant in notes.variants)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("scale", [0.3, None])
def test_few_view_kernels_for_images_of_many_sizes(
    dtype: torch.dtype, layout: torch.memory_format, scale: float | None
) -> None:
    def view(height: int, width: int) -> torch.Tensor:
        image = torch.empty(1, 3, height, width, dtype=dtype).to(memory_format=layout)
        image.requires_grad_(dtype == torch.float32)
        size = (100, 90) if scale is None else (int(height * scale), int(width * scale))
        return ats_kernels.area_downsample(image, size, mean=0.1, std=0.3)

    found = variants(view, SIDES)
    assert 1 <= found["area_downsample_fwd_kernel"] <= 8
    assert found["area_downsample_bwd_kernel"] <= (2 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_one_gather_kernel_for_images_and_batches_of_many_sizes(dtype: torch.dtype) -> None:
    def patches(height: int, width: int) -> torch.Tensor:
        image = torch.empty(1 + height % 4, 3, height, width, dtype=dtype).requires_grad_(dtype == torch.float32)
        offsets = torch.empty(len(image), 1 + width % 9, 2, dtype=torch.int64)
        return ats_kernels.extract_patches(image, offsets, 50, std=0.3)

    found = variants(patches, SIDES)
    assert found.pop("extract_patches_bwd_kernel", 1) == 1
    assert found == {"extract_patches_fwd_kernel": 1}


def test_one_reading_draw_for_maps_of_many_sizes() -> None:
    def drawn(height: int, width: int) -> torch.Tensor:
        image = torch.empty(1, 3, height, width, dtype=torch.uint8)
        logits = torch.empty(1, height // 4, width // 4)
        return ats.sample_patches(image, logits, 10, 50, validate=False).patches

    found = variants(drawn, SIDES)
    assert found["extract_patches_fwd_kernel"] == 1
    assert found["draw_kernel"] <= 5  # by the power of two that holds a map's blocks
    assert found["statistics_kernel"] <= 3


@pytest.mark.parametrize("estimator", ["ordered", "unordered"])
@pytest.mark.parametrize("by", ["rows", "draws"])
def test_one_pooling_kernel_for_all_batch_sizes_and_for_a_power_of_two_of_draws(by: str, estimator: str) -> None:
    def pooled(rows: int, draws: int) -> torch.Tensor:
        features = torch.empty(rows, draws, 64, requires_grad=True)
        log_attention = torch.empty(rows, draws, requires_grad=True)
        return ats.expectation(features, log_attention, estimator=estimator, control_variate=True)

    sizes = [(1 + i, 10) if by == "rows" else (2, 2 + i % 62) for i in range(143)]
    found = variants(pooled, sizes)
    assert len(found) >= 3
    assert max(found.values()) <= (1 if by == "rows" else 6)  # draws: 2, 4, … 64


@pytest.mark.parametrize(("n", "kernels"), [(10, 1), (64, 1), (256, 2)])
def test_backward_of_the_draw(n: int, kernels: int, rows: dict[str, launches.Row]) -> None:
    (row,) = [row for name, row in rows.items() if name.startswith(f"backward of sample, N = {n}")]
    assert len(row.kernels) == kernels
    assert not row.operators


def test_all_programs_lie_along_the_grids_first_axis() -> None:
    """The others hold 65,535: too few for long rows of features."""
    with launches.taking_notes() as notes:
        features = torch.empty(1, 70_000, 600, requires_grad=True)
        log_attention = torch.empty(1, 70_000, requires_grad=True)
        ats.expectation(features, log_attention).sum().backward()
    assert len(notes.grids) == 2
    assert all(len(grid) == 1 for grid in notes.grids)


@pytest.mark.parametrize(("how", "forward"), [("", 1), (", with replacement", 1), (", unordered", 2)])
@pytest.mark.parametrize(("variate", "backward"), [("", 1), (", control variate", 2)])
def test_pooling(how: str, variate: str, forward: int, backward: int, rows: dict[str, launches.Row]) -> None:
    there, back = rows[f"expectation{how}{variate}"], rows[f"backward of expectation{how}{variate}"]
    assert (len(there.kernels), len(back.kernels)) == (forward, backward)
    assert there.operators == back.operators == ()
