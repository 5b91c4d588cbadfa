"""`ats.pool` by enumeration: for every way of drawing the estimate and its gradient are those of the full model.

Every draw that can come is put into a `CellSample` as `ats.sample_cells` would make it. The wrong pooling, as if it had
been drawn in another way, is the control: it must be off.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import ats
from ats.functional import estimate_pooled
from tests.enumeration import attention_logits, enumerate_draws
from tests.helpers import assert_close, randn, seeded

CELLS, N = 5, 3
WAYS = {
    "ordered": (False, "ordered", False),
    "ordered, control variate": (False, "ordered", True),
    "unordered": (False, "unordered", False),
    "unordered, control variate": (False, "unordered", True),
    "with replacement": (True, "ordered", False),
    "with replacement, control variate": (True, "ordered", True),
}


def cell_sample(logits: Tensor, draws: Tensor, **how: object) -> ats.CellSample:
    """Draws (M, n) from the attention of logits (K,), differentiable; −1 is a surplus draw."""
    log_a = logits.log_softmax(-1)
    surplus = draws < 0
    options = {"replace": False, "selection": "sample", "grid_size": (1, len(logits)), "padded": bool(surplus.any())}
    return ats.CellSample(
        indices=draws,
        log_attention=log_a[draws.clamp(min=0)].masked_fill(surplus, -torch.inf),
        logsumexp=logits.logsumexp(-1).expand(len(draws)),
        entropy=torch.special.entr(log_a.exp()).sum(-1).expand(len(draws)),
        **options | how,  # type: ignore[arg-type]
    )


def drawn_features(features: Tensor, draws: Tensor) -> Tensor:
    """Features (M, n, D) of draws from (K, D); at a surplus draw those of the first cell, as patches are read."""
    return features[torch.where(draws < 0, draws[:, :1], draws)]


def moments(value: Tensor, probability: Tensor, direction: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The mean (D,) of values (M, D) over draws, and the mean gradient of its part along a direction."""
    mean = probability @ value
    return [mean.detach(), *torch.autograd.grad(mean @ direction, inputs, retain_graph=True)]


def full_moments(logits: Tensor, features: Tensor, direction: Tensor) -> list[Tensor]:
    return moments((logits.softmax(-1) @ features).unsqueeze(0), torch.ones(1).double(), direction, [logits, features])


def problem(kind: str = "random") -> tuple[Tensor, Tensor, Tensor]:
    logits = attention_logits(kind, CELLS).requires_grad_()
    return logits, randn(CELLS, 4).requires_grad_(), randn(4, seed=1)


def furthest(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["flat", "random", "peaked"])
@pytest.mark.parametrize("way", WAYS)
def test_random_draws_are_pooled_without_bias(way: str, kind: str) -> None:
    """Value and gradient to logits and features, ≤ 1e-12; wrong if pooled as if drawn the other way."""
    replace, estimator, control_variate = WAYS[way]
    logits, features, direction = problem(kind)
    draws, probability = enumerate_draws(logits.detach().softmax(-1), N, replace=replace)
    want = full_moments(logits, features, direction)
    errors = {}
    for told in (replace, not replace):
        sample = cell_sample(logits, draws, replace=told)
        how = estimator if not told else "ordered"
        try:
            pooled = ats.pool(drawn_features(features, draws), sample, estimator=how, control_variate=control_variate)
        except ValueError:  # refused: some rows cannot be of different cells
            errors[told] = math.inf
            continue
        errors[told] = furthest(moments(pooled, probability, direction, [logits, features]), want)
    assert errors[replace] < 1e-12
    assert kind == "flat" or errors[not replace] > 1e-3, "of equal cells any weights do that sum to 1"


@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_the_most_probable_cells_are_pooled_by_their_attention(kind: str) -> None:
    """No estimate: the attention among the cells read, scaled to sum to 1, as plain autograd differentiates it."""
    logits, features, direction = problem(kind)
    top = logits.detach().topk(N).indices
    sample = cell_sample(logits, top.unsqueeze(0), selection="topk")
    one = torch.ones(1).double()
    inputs = [logits, features]
    for options in ({}, {"estimator": "unordered", "control_variate": True}):
        pooled = ats.pool(features[top].unsqueeze(0), sample, **options)
        want = moments((logits[top].softmax(-1) @ features[top]).unsqueeze(0), one, direction, inputs)
        assert furthest(moments(pooled, one, direction, inputs), want) < 1e-12
    wrong = ats.pool(features[top].unsqueeze(0), dataclasses.replace(sample, selection="sample"))
    assert furthest(moments(wrong, one, direction, inputs), want) > 1e-3


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("estimator", ["ordered", "unordered"])
@pytest.mark.parametrize("kind", ["flat", "random", "peaked"])
def test_images_with_fewer_live_cells_than_draws(kind: str, estimator: str, control_variate: bool) -> None:
    """Three live cells of five, five draws: every order of the three, then surplus, gives Φ itself and its gradient.

    In the same batch lie draws of an image with all of its cells, whose estimate is as unbiased as without.
    """
    logits, features, direction = problem(kind)
    live = [0, 2, 4]
    masked = torch.full_like(logits, -torch.inf).index_put((torch.tensor(live),), logits[live])
    orders, probability = enumerate_draws(logits.detach()[live].softmax(-1), 3)
    surplus = torch.full((len(orders), 1), -1)
    short = torch.cat([torch.tensor(live)[orders], surplus], dim=1)
    others, others_probability = enumerate_draws(logits.detach().softmax(-1), 4)
    sample = ats.CellSample.cat([cell_sample(masked, short), cell_sample(logits, others)])
    assert sample.padded
    drawn = torch.cat([drawn_features(features, draws) for draws in (short, others)])
    pooled = ats.pool(drawn, sample, estimator=estimator, control_variate=control_variate)  # type: ignore[arg-type]

    inputs = [logits, features]
    exact = full_moments(masked, features, direction)
    want = moments((masked.softmax(-1) @ features).unsqueeze(0), torch.ones(1).double(), direction, inputs)
    for row in pooled[: len(short)]:  # not only on average
        torch.testing.assert_close(row, exact[0], rtol=1e-12, atol=1e-12)
    for number in range(len(short)):
        one = torch.zeros(len(pooled)).double().index_fill(0, torch.tensor(number), 1.0)
        got = [pooled[number].detach(), *torch.autograd.grad(one @ pooled @ direction, inputs, retain_graph=True)]
        assert furthest(got, want) < 1e-12
    got = moments(pooled[len(short) :], others_probability, direction, inputs)
    assert furthest(got, full_moments(logits, features, direction)) < 1e-12
    assert float(probability.sum()) == pytest.approx(1)

    blind = dataclasses.replace(sample, padded=False, log_attention=sample.log_attention.clamp(min=-700))
    wrong = ats.pool(drawn, blind, estimator=estimator)  # type: ignore[arg-type]
    if estimator == "ordered":  # the control: a surplus taken for a draw
        assert (wrong[: len(short)] - exact[0]).abs().max() > 1e-3


def test_drawn_samples_of_masked_images_are_exact() -> None:
    """The same through `sample_cells`, whose surplus and log attention it is: 900 images each, two of three short.

    The mean over the draws of the image that is not short is within 5 standard errors of Φ in each of 3 numbers: false
    alarms 2e-6.
    """
    logits = randn(3, 1, 6).requires_grad_()
    mask = torch.ones(3, 1, 6, dtype=torch.bool)
    mask[1, 0, 2:], mask[2, 0, 1:] = False, False  # two live cells, and one
    features = randn(3, 6, 3, seed=1)
    masked = logits.flatten(1).masked_fill(~mask.flatten(1), -torch.inf)
    exact = torch.einsum("bk,bkd->bd", masked.softmax(-1), features)
    (want,) = torch.autograd.grad(exact[1:].sum(), logits)
    sample = ats.sample_cells(logits.repeat(900, 1, 1), 4, mask=mask.repeat(900, 1, 1), generator=seeded())
    assert sample.counts.view(900, 3).eq(torch.tensor([4, 2, 1])).all()
    drawn = features.repeat(900, 1, 1).gather(1, sample.readable().unsqueeze(-1).expand(-1, -1, 3))
    pooled = ats.pool(drawn, sample, estimator="unordered")
    short = pooled.view(900, 3, 3)[:, 1:]
    assert_close(short, exact[1:].expand_as(short))
    (got,) = torch.autograd.grad(short.sum() / 900, logits, retain_graph=True)
    assert_close(got, want)
    estimates = pooled.detach().view(900, 3, 3)[:, 0]
    assert ((estimates.mean(0) - exact[0]).abs() < 5 * estimates.std(0) / 30).all()
    value, variance = estimate_pooled(drawn, sample, estimator="unordered")
    assert_close(value, pooled)
    assert variance.view(900, 3, 3)[:, 1:].eq(0).all()
    assert variance.view(900, 3, 3)[:, 0].gt(0).all()
    assert_close(sample.weights("unordered").unsqueeze(1).bmm(drawn).squeeze(1), pooled)


def test_features_of_any_shape_and_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({"selection": "topk"}, {"mask": torch.tensor([[True, True, False]])}):
            sample = ats.sample_cells(torch.tensor([[[0.5, 0.0, -1.0]]]), 3, allow_fewer=True, **options)  # type: ignore[arg-type]
            features = randn(1, 3, 2, 5, dtype=dtype)
            pooled = ats.pool(features, sample)
            assert pooled.dtype == dtype
            assert_close(pooled, torch.einsum("bn,bnij->bij", sample.weights().double(), features.double()))


def test_errors() -> None:
    sample = ats.sample_cells(torch.zeros(2, 3, 4), 3)
    with pytest.raises(TypeError, match=r"what ats.sample_patches .* gave, got Tensor; plain tensors .*expectation"):
        ats.pool(torch.zeros(2, 3, 4), sample.log_attention)  # type: ignore[arg-type]
    top = ats.sample_cells(torch.zeros(2, 3, 4), 3, selection="topk")
    for drawn in (sample, top):
        with pytest.raises(ValueError, match=r"\(B, N\) = \(2, 3\).*features.unflatten\(0, \(B, N\)\)"):
            ats.pool(torch.zeros(6, 4), drawn)
        with pytest.raises(ValueError, match="unknown estimator 'best'"):
            ats.pool(torch.zeros(2, 3, 4), drawn, estimator="best")  # type: ignore[arg-type]
    again = ats.sample_cells(torch.zeros(2, 3, 4), 3, replace=True)
    with pytest.raises(ValueError, match="drawn without replacement, got replace=True"):
        ats.pool(torch.zeros(2, 3, 4), again, estimator="unordered")
    with pytest.raises(ValueError, match="no random draw"):
        estimate_pooled(torch.zeros(2, 3, 4), top)
