"""`ats_kernels.pooling.variance`: variances against enumeration of every draw, which proves them unbiased."""

import pytest
import torch
from torch import Tensor

import ats
from tests.enumeration import attention_logits, enumerate_draws
from tests.helpers import assert_close, seeded

KINDS = ["flat", "peaked", "random"]


def features_of(cells: int) -> Tensor:
    """(K, 2, 2) float64, far from centred: only differences may count."""
    return 100 + torch.randn(cells, 2, 2, dtype=torch.float64, generator=seeded(cells))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cells", "n"), [(4, 2), (5, 3), (6, 4), (5, 4)])
@pytest.mark.parametrize(
    ("replace", "estimator"), [(False, "ordered"), (False, "unordered"), (True, "ordered")], ids=str
)
def test_value_and_variance_are_unbiased(kind: str, cells: int, n: int, replace: bool, estimator: str) -> None:
    """Weighted by the probability of every ordered draw: the mean value is Φ, the mean variance that of the values."""
    log_attention = attention_logits(kind, cells).log_softmax(-1)
    features = features_of(cells)
    draws, probability = enumerate_draws(log_attention.exp(), n, replace=replace)
    value, variance = ats.estimate(features[draws], log_attention[draws], replace=replace, estimator=estimator)
    phi = torch.einsum("k,kij->ij", log_attention.exp(), features)
    assert_close(torch.einsum("m,mij->ij", probability, value), phi)
    exact = torch.einsum("m,mij->ij", probability, (value - phi).square())
    assert (exact > 0).all()
    torch.testing.assert_close(torch.einsum("m,mij->ij", probability, variance), exact, rtol=1e-8, atol=1e-14)
    assert (variance >= 0).all()


@pytest.mark.parametrize("estimator", ["ordered", "unordered"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_that_of_expectation(kind: str, estimator: str) -> None:
    """Two functions that estimate the same by the same name must agree."""
    log_attention = attention_logits(kind, 9).log_softmax(-1)
    draws = torch.stack([torch.randperm(9, generator=seeded(i))[:5] for i in range(4)])
    features = features_of(9)[draws]
    value, _ = ats.estimate(features, log_attention[draws], estimator=estimator)
    assert_close(value, ats.expectation(features, log_attention[draws], estimator=estimator))


def test_all_cells_leave_nothing_to_err_about() -> None:
    """N = K: the unordered estimate is Φ itself, whatever the order, and says so."""
    log_attention = attention_logits("random", 7).log_softmax(-1)
    order = torch.randperm(7, generator=seeded()).unsqueeze(0)
    features = features_of(7)
    value, variance = ats.estimate(features[order], log_attention[order], estimator="unordered")
    assert_close(value[0], torch.einsum("k,kij->ij", log_attention.exp(), features))
    assert variance.max() < 1e-15  # what rounding leaves of 1 − Σ a counts


def test_equal_features_have_no_variance_and_scale_squares_it() -> None:
    log_attention = attention_logits("random", 8).log_softmax(-1)[:4].unsqueeze(0)
    for estimator in ("ordered", "unordered"):
        same = torch.full((1, 4, 3), 7.5)
        assert ats.estimate(same, log_attention, estimator=estimator).variance.abs().max() < 1e-20
        features = torch.randn(1, 4, 3, generator=seeded(1))
        one = ats.estimate(features, log_attention, estimator=estimator).variance
        assert_close(
            ats.estimate(3 * features - 5, log_attention, estimator=estimator).variance, 9 * one, torch.float32
        )


@pytest.mark.parametrize("peak", [1e-3, 1e-9, 1e-15])
def test_attention_on_almost_one_cell(peak: float) -> None:
    """With 1 − a far below rounding the variance is still that of what is left, not of rounding."""
    log_attention = torch.tensor([[peak / 2, peak / 2]], dtype=torch.float64).log()
    log_attention = torch.cat([torch.log1p(torch.tensor([[-peak]], dtype=torch.float64)), log_attention], dim=-1)
    features = torch.tensor([[[1.0], [2.0], [4.0]]], dtype=torch.float64)
    drawn = ats.estimate(features[:, :2], log_attention[:, :2], estimator="unordered")
    # Left is one cell of mass p/2, and the two drawn differ by 1: an error of at most p.
    assert 0 < float(drawn.variance) < peak**2
    assert abs(float(drawn.value) - 1) < 2 * peak


@pytest.mark.parametrize(
    ("features", "log_attention", "options", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), {}, ValueError, r"got \(2, 3, 4\) and \(2, 4\)"),
        (torch.zeros(2, 1, 4), torch.zeros(2, 1), {}, ValueError, "at least 2 draws an image, got 1"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), {"estimator": "best"}, ValueError, "unknown estimator 'best'"),
        (torch.zeros(2, 3), torch.ones(2, 3), {}, ValueError, "6 value.s. above 0, up to 1"),
        (torch.zeros(2, 3), torch.zeros(2, 3), {"replace": True, "estimator": "unordered"}, ValueError, "replace"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), {}, TypeError, "features must be floating point"),
    ],
)
def test_errors(
    features: Tensor, log_attention: Tensor, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ats.estimate(features, log_attention, **options)  # type: ignore[arg-type]
