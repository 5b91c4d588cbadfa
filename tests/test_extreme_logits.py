"""Logits near the ends of their dtype's range: draws and values are those of the same map shifted near 0."""

import math

import pytest
import torch

from ats_kernels import sample
from ats_kernels.sampling import block_sums
from ats_kernels.sampling import cpu as sample_cpu
from ats_kernels.sampling import op as sample_op
from tests.helpers import assert_close, seeded

pytestmark = pytest.mark.usefixtures("cpu_path")

OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


@DTYPES
@OPTIONS
@pytest.mark.parametrize("cells", [6, 64, 4_500])
@pytest.mark.parametrize("chunk", [1_000, 2**20])
def test_a_row_masked_by_the_lowest_number_is_uniform(cells, options, dtype, chunk, monkeypatch):
    """A row of equal logits is uniform wherever it lies, and it leaves the row beside it alone."""
    monkeypatch.setattr(block_sums, "CHUNK", chunk)
    plain = torch.zeros(2, cells, dtype=dtype)
    plain[1, ::3] = 2.0
    for far in (torch.finfo(dtype).min, torch.finfo(dtype).max):
        logits = plain.clone()
        logits[0] = far
        draw, expected = (sample(z, 5, generator=seeded(), **options) for z in (logits, plain))
        assert torch.equal(draw.indices, expected.indices)
        assert_close(draw.log_attention, expected.log_attention)
        assert_close(draw.entropy, expected.entropy)
        assert_close(draw.log_attention[0], torch.full((5,), -math.log(cells), dtype=draw.entropy.dtype))
        assert_close(draw.logsumexp[0], torch.tensor(far + math.log(cells), dtype=draw.logsumexp.dtype))


@DTYPES
@OPTIONS
@pytest.mark.parametrize("cells", [60, 4_500])
def test_cells_masked_by_the_lowest_number_are_not_drawn(cells, options, dtype):
    """As long as others are left, finfo.min masks as −inf does."""
    logits = torch.zeros(2, cells, dtype=dtype)
    logits[:, : cells // 2] = 1.0
    masked = torch.arange(cells) % 5 > 0
    lowest, infinite = (
        sample(logits.masked_fill(masked, value), 5, generator=seeded(), **options)
        for value in (torch.finfo(dtype).min, -torch.inf)
    )
    for got, want in zip(lowest, infinite, strict=True):
        assert torch.equal(got, want)


@DTYPES
@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("cells", [3, 4_500])
def test_both_ends_in_one_row(cells, backend, dtype, monkeypatch):
    """A difference that overflows is no mask: the lowest cells come last, with a log a that is finite."""
    monkeypatch.setenv("ATS_BACKEND", backend)
    logits = torch.full((2, cells), torch.finfo(dtype).min, dtype=dtype)
    logits[:, :2] = torch.finfo(dtype).max
    draw = sample(logits, 3, generator=seeded())
    assert [set(row[:2]) for row in draw.indices.tolist()] == [{0, 1}, {0, 1}]
    half = torch.full((2,), -math.log(2), dtype=draw.entropy.dtype)
    assert_close(draw.log_attention[:, 0], half)
    assert_close(draw.entropy, -half)
    assert draw.log_attention.isfinite().all()
    assert (draw.log_attention[:, 2] < -6e4).all()


def test_validation_says_so_where_it_finds_no_cause(monkeypatch):
    """Poison never passes a validated draw without an error, whatever made it."""

    def spoil(*arguments):
        draw, statistics = sample_cpu.sample_cpu(*arguments)
        draw.indices[1] = -1
        return draw, statistics

    monkeypatch.setattr(sample_op, "sample_cpu", spoil)
    with pytest.raises(ValueError, match=r"row\(s\) \[1\] of the logits cannot be drawn from, and no cause was found"):
        sample(torch.zeros(3, 8), 2)
