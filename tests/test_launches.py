"""What each call launches, counted without a GPU, and what is compiled for a data set of many sizes."""

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
@pytest.mark.parametrize("n", [10, 64])
def test_drawing_and_reading(n: int, how: str, rows: dict[str, launches.Row]) -> None:
    row = rows[f"sample_patches, N = {n}{how}"]
    assert row.kernels == ("statistics_kernel", "draw_kernel", "extract_patches_fwd_kernel")
    assert row.operators == (() if how == ", topk" else ("randint",))


def test_one_draw_kernel_for_all_batch_sizes_maps_of_a_kind_and_draws() -> None:
    with launches.taking_notes() as notes:
        for rows, cells, n in ((1, 32_400, 10), (128, 32_400, 10), (16, 32_000, 16), (7, 20_011, 3)):
            ats_kernels.sample(torch.empty(rows, cells), n, validate=False)
    drawn = {variant for variant in notes.variants if variant.startswith("draw_kernel")}
    assert notes.kernels.count("draw_kernel") == 4
    assert len(drawn) == 1


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
