"""What each call launches, counted without a GPU, and what is compiled for a data set of many sizes."""

import pytest
import torch

import ats
from tests.conftest import HAS_GPU, INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed: nothing can be launched")

from tools import launches

pytestmark = pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="counted on CPU tensors, by the compiler's own launcher")


@pytest.fixture(scope="module")
def rows() -> dict[str, launches.Row]:
    return {row.call: row for row in launches.count()}


def test_nothing_waits(rows: dict[str, launches.Row]) -> None:
    assert {name: row.waits for name, row in rows.items() if row.waits} == {}


def test_drawing_and_reading(rows: dict[str, launches.Row]) -> None:
    row = rows["sample_patches, N = 10"]
    assert row.kernels == ("statistics_kernel", "draw_kernel", "extract_patches_fwd_kernel")
    assert row.operators == ("randint",)


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
