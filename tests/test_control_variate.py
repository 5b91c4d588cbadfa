"""The baseline in the attention's gradient: no bias over every draw, nothing else changed, and where it pays."""

import pytest
import torch
from torch import Tensor

from ats_kernels import estimator_weights, expectation, sample
from tests.enumeration import attention_logits, enumerate_draws
from tests.helpers import assert_close, seeded

pytestmark = pytest.mark.usefixtures("cpu_path")

WAYS = [(True, "ordered"), (False, "ordered"), (False, "unordered")]  # (replace, estimator)


def problem(kind: str, cells: int, *, alike: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (K,), features (K, 6) of length 1, with much in common or nothing, and the gradient that arrives."""
    features = torch.randn(cells, 6, dtype=torch.float64, generator=seeded(3))
    features = torch.nn.functional.normalize(features.abs() + 0.5 if alike else features)
    return attention_logits(kind, cells), features, torch.randn(6, dtype=torch.float64, generator=seeded(4))


def gradient_to_logits(
    kind: str, cells: int, n: int, *, replace: bool, estimator: str, control_variate: bool, alike: bool = True
) -> tuple[float, float]:
    """Largest bias, and sum of the variances, over every ordered draw."""
    logits, features, direction = problem(kind, cells, alike=alike)
    attention = logits.softmax(-1)
    draws, probability = enumerate_draws(attention, n, replace=replace)
    rows = logits.expand(len(draws), -1).clone().requires_grad_()
    pooled = expectation(
        features[draws],
        rows.log_softmax(-1).gather(1, draws),
        replace=replace,
        estimator=estimator,
        control_variate=control_variate,
    )
    (gradients,) = torch.autograd.grad((pooled @ direction).sum(), rows)
    inner = features @ direction
    difference = gradients - attention * (inner - attention @ inner)
    return (probability @ difference).abs().max().item(), (probability @ difference.square()).sum().item()


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
@pytest.mark.parametrize("kind", ["flat", "peaked", "random"])
@pytest.mark.parametrize(("cells", "n"), [(2, 1), (3, 2), (3, 3), (5, 3), (6, 4)])
def test_unbiased_over_every_ordered_draw(cells, n, kind, replace, estimator):
    """A baseline from the very draws that it is taken off, with one slip, is biased by about 1 / N."""
    bias, _ = gradient_to_logits(kind, cells, n, replace=replace, estimator=estimator, control_variate=True)
    assert bias < 1e-12


def test_the_obvious_baseline_is_biased():
    """Φ̂ itself, of the same draw: the check above must see it."""
    logits, features, direction = problem("random", 5, alike=True)
    attention, inner = logits.softmax(-1), features @ direction
    draws, probability = enumerate_draws(attention, 3)
    weights = estimator_weights(attention.log()[draws])
    coefficients = weights * (inner[draws] - (weights * inner[draws]).sum(-1, keepdim=True))
    gradients = torch.zeros(len(draws), 5, dtype=torch.float64).scatter_add_(1, draws, coefficients)
    gradients -= attention * coefficients.sum(-1, keepdim=True)
    assert (probability @ gradients - attention * (inner - attention @ inner)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("replace", "estimator", "alike", "least", "most"),
    [
        (True, "ordered", True, 0.0, 0.4),
        (False, "ordered", True, 0.0, 0.95),
        (False, "unordered", True, 0.0, 0.55),
        (False, "unordered", False, 1.0, 2.0),  # where features have nothing in common the baseline is but noise
    ],
)
def test_what_it_does_to_the_variance(replace, estimator, alike, least, most):
    """Of the gradient to the logits, 6 cells and 3 draws, as a factor."""
    without, with_ = (
        gradient_to_logits(
            "random", 6, 3, replace=replace, estimator=estimator, control_variate=control_variate, alike=alike
        )[1]
        for control_variate in (False, True)
    )
    assert least <= with_ / without < most


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_the_attentions_gradient_changes(dtype, replace, estimator):
    features = torch.rand(3, 5, 2, 4, generator=seeded()).to(dtype).requires_grad_()
    draw = sample(torch.randn(3, 9, generator=seeded(1)), 5, replace=replace, generator=seeded(2))
    log_attention = draw.log_attention.requires_grad_()
    options = {"replace": replace, "estimator": estimator}
    results = []
    for control_variate in (False, True):
        pooled = expectation(features, log_attention, control_variate=control_variate, **options)
        results.append((pooled, *torch.autograd.grad(pooled.float().sum(), (features, log_attention))))
    (pooled, to_features, to_attention), (pooled_too, to_features_too, to_attention_too) = results
    assert torch.equal(pooled, pooled_too)
    assert torch.equal(to_features, to_features_too)
    assert to_attention_too.dtype == to_attention.dtype
    assert not torch.allclose(to_attention, to_attention_too, rtol=0.05)
    wide = [x.detach().double().requires_grad_() for x in (features, log_attention)]
    (expected,) = torch.autograd.grad(expectation(*wide, control_variate=True, **options).sum(), wide[1])
    assert_close(to_attention_too, expected)


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
def test_one_draw_has_no_baseline(replace, estimator):
    features = torch.rand(3, 1, 4, generator=seeded())
    log_attention = torch.tensor([[-1.0], [-2.0], [-3.0]], requires_grad=True)
    got, want = (
        torch.autograd.grad(
            expectation(features, log_attention, replace=replace, estimator=estimator, control_variate=use).sum(),
            log_attention,
        )
        for use in (True, False)
    )
    assert_close(got[0], want[0])


@pytest.mark.parametrize("estimator", ["ordered", "unordered"])
def test_frozen_features_or_frozen_attention(estimator):
    """Only what requires a gradient gets one, and the same as when both do."""
    features = torch.rand(2, 4, 3, generator=seeded())
    log_attention = torch.randn(2, 6, generator=seeded(1)).log_softmax(-1)[:, :4]
    both = [features.clone().requires_grad_(), log_attention.clone().requires_grad_()]
    options = {"estimator": estimator, "control_variate": True}
    expected = torch.autograd.grad(expectation(*both, **options).sum(), both)
    for learns in (0, 1):
        arguments = [features.clone(), log_attention.clone()]
        arguments[learns].requires_grad_()
        (got,) = torch.autograd.grad(expectation(*arguments, **options).sum(), arguments[learns])
        assert torch.equal(got, expected[learns])


def test_little_left_and_poison():
    """Where nearly all is drawn the baseline is Φ; a row of NaN makes its own gradient NaN and no other."""
    log_attention = torch.tensor([[-0.7, -0.7, -800.0], [float("nan")] * 3], dtype=torch.float64)
    log_attention[0, :2] = torch.tensor(0.5).double().log()
    log_attention.requires_grad_()
    features = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64).expand(2, -1)
    for estimator in ("ordered", "unordered"):
        pooled = expectation(features, log_attention, estimator=estimator, control_variate=True)
        (gradient,) = torch.autograd.grad(pooled.sum(), log_attention)
        assert gradient[0].isfinite().all()
        assert gradient[1].isnan().all()
        if estimator == "unordered":
            assert_close(gradient[0], torch.tensor([-0.5, 0.5, 0.0]).double())
