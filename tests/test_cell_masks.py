"""Cells that may not be drawn: `mask=`, −inf in the logits, and images with fewer live cells than draws."""

import pytest
import torch

import ats
from tests.helpers import assert_close, seeded
from tests.small_draws import INF, make_image, make_logits


def test_masked_cells_are_not_read():
    logits = make_logits()
    logits[:, :, :3] = -INF
    sample = ats.sample_patches(make_image(), logits, 12, 5, generator=seeded())
    assert (sample.indices % 6 >= 3).all()


def test_masks_are_minus_infinity_in_the_logits():
    """True may be drawn; (gh, gw) for all images or one for each, with a channel or without."""
    logits = make_logits()
    mask = torch.rand(2, 4, 6, generator=seeded(7)) > 0.4
    want = ats.sample_cells(logits.masked_fill(~mask, -INF), 5, generator=seeded())
    for given, of in (
        (mask, logits),
        (mask.unsqueeze(1), logits),
        (mask, logits.unsqueeze(1)),
        (mask[:, None], logits[:, None]),
    ):
        got = ats.sample_cells(of, 5, mask=given, generator=seeded())
        for name in ("indices", "log_attention", "logsumexp", "entropy"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
    for shared in (mask[0], mask[:1]):
        got = ats.sample_cells(logits, 5, mask=shared, generator=seeded())
        assert mask[0].flatten()[got.indices].all()
    leaf = logits.double().requires_grad_()
    sample = ats.sample_patches(make_image(torch.float64), leaf, 3, 4, mask=mask, generator=seeded())
    ats.pool(sample.patches, sample).sum().backward()
    assert torch.equal(leaf.grad.ne(0), mask), "what is masked has no gradient, and no NaN"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_surplus_changes_no_other_number(dtype):
    """Statistics and draws of live cells are as without it, to the last bit, however low the least of them is."""
    logits = 8 * torch.randn(40, 1, 9, generator=seeded(3)).to(dtype)
    logits[1, 0, 4] = -6e4
    mask = torch.rand(40, 1, 9, generator=seeded(4)) < 0.5
    mask[:, 0, 4] = True
    sample = ats.sample_cells(logits, 7, mask=mask, generator=seeded())
    assert sample.padded
    assert set(sample.counts.tolist()) > {2, 3, 4, 5}
    assert torch.equal(sample.counts, mask.flatten(1).sum(-1).clamp(max=7))
    for row in range(40):
        live = int(sample.counts[row])
        alone = ats.sample_cells(logits[row : row + 1], live, mask=mask[row : row + 1])
        assert not alone.padded
        assert torch.equal(sample.logsumexp[row], alone.logsumexp[0])
        assert torch.equal(sample.entropy[row], alone.entropy[0])
        drawn, order = sample.indices[row, :live].sort()
        assert mask.flatten(1)[row, drawn].all()
        if live < 7:
            assert torch.equal(
                sample.log_attention[row, :live][order], alone.log_attention[0, alone.indices[0].argsort()]
            )
            assert (sample.indices[row, live:] == -1).all()


def test_fewer_live_cells_than_draws_where_nothing_is_masked():
    """More draws than cells: all of them, on request; the most probable first, too."""
    logits = make_logits(2, 1, 3)
    for selection in ("sample", "topk"):
        sample = ats.sample_cells(logits, 5, allow_fewer=True, selection=selection)
        assert sample.indices[:, :3].sort().values.tolist() == [[0, 1, 2]] * 2
        assert sample.indices[:, 3:].eq(-1).all()
    assert torch.equal(sample.indices[:, :3], logits.flatten(1).argsort(descending=True))
    again = ats.sample_cells(logits, 5, replace=True, allow_fewer=True)
    assert not again.padded
    assert again.indices.ge(0).all()


def test_few_cells_are_an_error_where_that_is_asked_for():
    logits, mask = make_logits(), torch.ones(2, 4, 6, dtype=torch.bool)
    mask[1, 1:] = False
    for selection, advice in (
        ("sample", "draw fewer, use replace=True, or pass allow_fewer=True to read all there are"),
        ("topk", "draw fewer, or pass allow_fewer=True to read all there are"),  # which takes no replace=True
    ):
        for few in ({"mask": mask, "allow_fewer": False}, {"mask": None}):
            given = few | {"selection": selection}
            plain = logits if few["mask"] is not None else logits.masked_fill(~mask, -INF)
            with pytest.raises(ValueError, match=f"n=7 cells from row 1: only 6 of its 24 .*; {advice}$"):
                ats.sample_cells(plain, 7, **given)
            with pytest.raises(ValueError, match=f"n=25 cells from K=24; {advice}$"):
                ats.sample_cells(logits, 25, selection=selection)
    mask[1] = False
    with pytest.raises(ValueError, match="row 1 are all −inf: every cell is masked, nothing can be drawn; leave that"):
        ats.sample_cells(logits, 7, mask=mask)
    poisoned = ats.sample_cells(logits, 7, mask=mask, validate=False)
    assert poisoned.indices[1].eq(-1).all()
    assert ats.pool(torch.ones(2, 7, 1), poisoned).isnan().flatten().tolist() == [False, True]


def test_masks_that_do_not_fit():
    for mask, error, message in (
        (
            torch.ones(4, 6),
            TypeError,
            r"mask must be bool, True where a cell may be drawn, got torch.float32; .*mask > 0.5",
        ),
        ([[True]], TypeError, "mask must be a torch.Tensor, got list"),
        (torch.ones(3, 4, 6, dtype=torch.bool), ValueError, r"logits \(2, 4, 6\), got \(3, 4, 6\)"),
        (torch.ones(6, 4, dtype=torch.bool), ValueError, r"logits \(2, 4, 6\), got \(6, 4\)"),
        (torch.ones(2, 2, 4, 6, dtype=torch.bool), ValueError, r"got \(2, 2, 4, 6\)"),
        (torch.ones(4, 6, dtype=torch.bool, device="meta"), ValueError, "mask is on meta but logits are on cpu"),
    ):
        with pytest.raises(error, match=message):
            ats.sample_cells(make_logits(), 3, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_surplus_comes_after_cells_of_the_lowest_number(dtype):
    """Nothing finite lies below finfo.min; such cells are live, and the row is as it is without a surplus."""
    lowest = torch.finfo(dtype).min
    logits = torch.tensor(
        [[0.0, 1.0, lowest, lowest, -INF], [lowest] * 4 + [-INF], [2.0, 0.5, 1.0, 0.0, -1.0]], dtype=torch.float64
    )
    logits = logits.to(dtype).unsqueeze(1).requires_grad_()
    sample = ats.sample_cells(logits, 7, allow_fewer=True, generator=seeded())
    assert sample.counts.tolist() == [4, 4, 5]
    for row, live in enumerate((4, 4, 5)):
        alone = ats.sample_cells(logits[row : row + 1], live, generator=seeded())
        drawn, order = sample.indices[row, :live].sort()
        assert drawn.tolist() == list(range(live))
        assert (sample.indices[row, live:] == -1).all()
        got, want = sample.log_attention[row, :live][order], alone.log_attention[0, alone.indices[0].argsort()]
        assert_close(got, want)
        assert_close(sample.logsumexp[row], alone.logsumexp[0])
        assert_close(sample.entropy[row], alone.entropy[0])
    assert_close(sample.log_attention[1, :4].exp(), torch.full((4,), 0.25, dtype=sample.log_attention.dtype))
    features = torch.ones(3, 7, 2, dtype=sample.log_attention.dtype)
    assert_close(ats.pool(features, sample), torch.ones(3, 2, dtype=features.dtype))
    (grad,) = torch.autograd.grad(sample.entropy.sum() + ats.pool(features, sample).sum(), logits)
    assert grad.isfinite().all()
