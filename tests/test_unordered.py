"""The unordered estimator: weights against exact enumeration of subsets, and never a larger variance than ordered."""

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

import ats_kernels
from ats_kernels import estimator_weights, estimator_weights_ref, expectation, sample
from ats_kernels.pooling.unordered import unordered_weights
from tests.enumeration import attention_logits, enumerate_draws
from tests.helpers import assert_close, seeded

pytestmark = pytest.mark.usefixtures("cpu_path")

KINDS = ["flat", "peaked", "random"]
ACCURACY = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative
DIGITS = 80


def group_weights(attention: Sequence[Decimal], counts: Sequence[int]) -> list[float]:
    """w of a cell of each group, counts[i] of whose cells with attention[i] each were drawn, by exact recursion.

    In the state t of how many were drawn from each group, P(draw the rest next, t drawn) is the sum over groups of
    the probability to draw one of it times that of the state after. Groups of one cell enumerate all subsets.
    """
    strides = [math.prod(n + 1 for n in counts[:i]) for i in range(len(counts))]
    states = math.prod(n + 1 for n in counts)
    with localcontext() as context:
        context.prec = DIGITS
        completes = [Decimal(1)] * states
        for state in reversed(range(states - 1)):
            drawn = [state // stride % (n + 1) for stride, n in zip(strides, counts, strict=True)]
            mass = 1 - sum((a * t for a, t in zip(attention, drawn, strict=True)), Decimal(0))
            completes[state] = (
                sum(
                    (
                        (n - t) * a * completes[state + stride]
                        for a, n, t, stride in zip(attention, counts, drawn, strides, strict=True)
                        if t < n
                    ),
                    Decimal(0),
                )
                / mass
            )
        return [float(a * completes[stride] / completes[0]) for a, stride in zip(attention, strides, strict=True)]


def exact_weights(log_attention: Tensor) -> Tensor:
    """w (B, N) float64 of the very floats given, from all 2^N subsets, in 80 digits."""
    rows = []
    for row in log_attention.tolist():
        with localcontext() as context:
            context.prec = DIGITS
            attention = [Decimal(value).exp() for value in row]
        rows.append(group_weights(attention, [1] * len(row)))
    return torch.tensor(rows, dtype=torch.float64)


def check_weights(log_attention: Tensor) -> None:
    """Within the promised accuracy of the exact ones, beyond what the rounding of float64 does to the mass left.

    The mass left, c, is a difference of rounded numbers (a cell of more than half of the mass drops out of them). No
    formula for w can make that good: a weight moves with it by about its error over the larger of c and a.
    """
    wide = log_attention.double()
    attention = wide.exp()
    smaller = torch.where(attention > 0.5, 0.0, attention).sum(-1, keepdim=True)
    left = (1 - attention.sum(-1, keepdim=True)).clamp(min=0)
    rounding = 2 * torch.finfo(torch.float64).eps * smaller / torch.maximum(attention, left)
    exact, got = exact_weights(log_attention), estimator_weights(log_attention, estimator="unordered")
    assert got.dtype == log_attention.dtype
    assert ((got.double() / exact - 1).abs() < ACCURACY[log_attention.dtype] + rounding).all()
    assert (got.double().sum(-1) - 1).abs().max() < ACCURACY[log_attention.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cells", "n"), [(2, 1), (4, 2), (6, 5), (60, 5), (11, 10), (200, 10)])
def test_weights_against_every_subset(cells, n, kind, dtype):
    log_attention = sample(attention_logits(kind, cells).expand(3, -1), n, generator=seeded()).log_attention
    check_weights(log_attention.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [1e-3, 1e-6, 1e-9, 1e-12])
def test_weights_when_little_is_left(left, dtype):
    """Beside one cell that has nearly all; of cells that share nearly all; and of both kinds of cells drawn."""
    peaked = torch.log(torch.tensor([1 - 6 * left, left, 2 * left, left / 2, left], dtype=torch.float64))
    peaked[0] = math.log1p(-6 * left)
    shared = torch.full((5,), (1 - left) / 5, dtype=torch.float64).log()
    mixed = torch.log(torch.tensor([0.6, 0.2, 0.15, 0.05 - 3 * left, left], dtype=torch.float64))
    for log_attention in (peaked, shared, mixed):
        check_weights(log_attention.unsqueeze(0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [0.9, 0.1, 1e-3])
@pytest.mark.parametrize("counts", [(255, 1), (128, 128), (1, 255), (250, 6)])
def test_weights_of_256_draws(counts, left, dtype):
    """Two kinds of cells, one with a hundred times the attention of the other: what was drawn is two numbers."""
    unit = (1 - left) / (100 * counts[0] + counts[1])
    groups = torch.tensor([100 * unit, unit], dtype=torch.float64).log().to(dtype)
    with localcontext() as context:
        context.prec = DIGITS
        attention = [Decimal(value).exp() for value in groups.tolist()]
    exact = torch.tensor(group_weights(attention, counts), dtype=torch.float64)
    which = torch.arange(2).repeat_interleave(torch.tensor(counts))  # (256,)
    weights = estimator_weights(groups[which].unsqueeze(0), estimator="unordered")[0]
    assert ((weights.double() / exact[which] - 1).abs() < ACCURACY[dtype]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("n", [17, 256])
def test_many_draws_around_a_peak_that_leave_little(n, left, dtype):
    """One cell has all but `left` of the mass; what is left is shared by the n − 1 drawn beside it and as many more."""
    small = left / (2 * (n - 1))
    groups = torch.tensor([math.log1p(-left), math.log(small)], dtype=torch.float64).to(dtype)
    with localcontext() as context:
        context.prec = DIGITS
        attention = [Decimal(value).exp() for value in groups.tolist()]
    assert abs(float(1 - attention[0]) - left) < 1e-3 * left, "the case must be what it says it is"
    exact = torch.tensor(group_weights(attention, (1, n - 1)), dtype=torch.float64)
    which = torch.arange(n).clamp(max=1)  # (N,)
    weights = estimator_weights(groups[which].unsqueeze(0), estimator="unordered")[0]
    assert ((weights.double() / exact[which] - 1).abs() < ACCURACY[dtype]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cells", [257, 300, 30_000])
def test_weights_of_256_draws_from_flat_attention(cells, dtype):
    """All drawn cells are alike, so that each weighs 1/256."""
    log_attention = torch.full((1, 256), -math.log(cells), dtype=torch.float64).to(dtype)
    weights = estimator_weights(log_attention, estimator="unordered")
    assert ((weights.double() * 256 - 1).abs() < ACCURACY[dtype]).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("n", [2, 10, 100, 256])
def test_fewer_nodes_stay_within_their_bound(n, scale):
    """The coarse nodes of float32 against the fine ones of float64: six errors, of at most e^−18 each, apart."""
    logits = scale * torch.randn(20, 2 * n, dtype=torch.float64, generator=seeded(n))
    log_attention = sample(logits, n, generator=seeded()).log_attention
    coarse, fine = (unordered_weights(log_attention, dtype) for dtype in (torch.float32, torch.float64))
    assert (coarse / fine - 1).abs().max() < 6 * math.exp(-18)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_everything_drawn_gives_the_whole_sum(n, kind):
    logits = attention_logits(kind, n).expand(4, -1)
    draw = sample(logits, n, generator=seeded())
    features = torch.randn(n, 3, dtype=torch.float64, generator=seeded(1))
    whole = logits.softmax(-1) @ features
    assert_close(expectation(features[draw.indices], draw.log_attention, estimator="unordered"), whole)
    assert_close(estimator_weights(draw.log_attention, estimator="unordered"), draw.log_attention.exp())


@pytest.mark.parametrize(
    "log_attention",
    [
        [0.0, -800.0, -900.0],
        [-1e-300, -700.0, -1e4],
        [-1e4, -1e4, -1e4],
        [-0.7, -0.7, -800.0],
        [-0.69314, -0.69314, -20.0],
    ],
)
def test_extreme_attention_still_gives_weights(log_attention):
    """All of the mass in one cell, none in any, and more than 1 by rounding: finite, positive and sum to 1."""
    for dtype in (torch.float32, torch.float64):
        weights = estimator_weights(torch.tensor([log_attention], dtype=dtype), estimator="unordered").double()
        assert ((weights >= 0) & (weights <= 1)).all()
        assert abs(weights.sum() - 1) < ACCURACY[dtype]


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 30.0])
def test_many_draws_stay_finite(sharpness):
    """A product of 1,000 factors would leave float64's range."""
    logits = sharpness * torch.randn(2, 1200, generator=seeded())
    weights = estimator_weights(sample(logits, 1000, generator=seeded()).log_attention, estimator="unordered")
    assert (weights >= 0).all()
    assert (weights.double().sum(-1) - 1).abs().max() < 1e-5


def test_a_row_of_nan_stays_one_and_alone():
    log_attention = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, math.nan, -2.0]])
    weights = estimator_weights(log_attention, estimator="unordered")
    assert weights[0].isfinite().all()
    assert weights[1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cells", "n"), [(4, 2), (5, 3), (6, 4), (4, 4)])
def test_is_the_mean_over_the_orders_of_a_set(cells, n, kind):
    """What defines it, and (Rao and Blackwell) makes its variance smaller: E[ordered | the set that was drawn]."""
    attention = attention_logits(kind, cells).softmax(-1)
    draws, probability = enumerate_draws(attention, n)
    log_attention = attention.log()[draws]
    nowhere = torch.zeros(len(draws), cells, dtype=torch.float64)
    ordered, unordered = (  # (M, K) the weight of each cell
        nowhere.scatter(1, draws, estimator_weights_ref(log_attention, estimator=estimator))
        for estimator in ("ordered", "unordered")
    )
    _, group = draws.sort(1).values.unique(dim=0, return_inverse=True)
    share = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, probability)
    mean = torch.zeros(len(share), cells, dtype=torch.float64)
    mean.index_add_(0, group, probability.unsqueeze(1) * ordered).div_(share.unsqueeze(1))
    assert_close(unordered, mean[group])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cells", "n"), [(4, 2), (5, 3), (6, 4), (4, 4)])
def test_no_variance_is_larger_than_of_the_ordered_one(cells, n, kind):
    """Of every pooled feature and of every gradient, to logits and to features, over every ordered draw."""
    logits = attention_logits(kind, cells)
    draws, probability = enumerate_draws(logits.softmax(-1), n)
    features = torch.randn(cells, 3, dtype=torch.float64, generator=seeded(3))
    direction = torch.randn(3, dtype=torch.float64, generator=seeded(4))
    variances = {}
    for estimator in ("ordered", "unordered"):
        rows = logits.expand(len(draws), -1).clone().requires_grad_()
        cell_features = features.expand(len(draws), -1, -1).clone().requires_grad_()
        drawn = cell_features.gather(1, draws.unsqueeze(-1).expand(-1, -1, 3))
        pooled = expectation(drawn, rows.log_softmax(-1).gather(1, draws), estimator=estimator)
        gradients = torch.autograd.grad((pooled @ direction).sum(), (rows, cell_features))
        values = torch.cat([x.detach().flatten(1) for x in (pooled, *gradients)], 1)  # (M, all of them)
        variances[estimator] = probability @ (values - probability @ values).square()
    assert (variances["unordered"] <= variances["ordered"] + 1e-14).all()
    if n < cells and kind == "random":
        assert variances["unordered"].sum() < 0.95 * variances["ordered"].sum()


def test_the_order_of_the_draws_does_not_matter():
    log_attention = torch.randn(3, 8, generator=seeded(), dtype=torch.float64).log_softmax(-1)[:, :6]
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    weights = estimator_weights(log_attention, estimator="unordered")
    assert_close(estimator_weights(log_attention[:, order], estimator="unordered"), weights[:, order])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    """No graph break and the same values, with fixed and with varying sizes."""

    def whole(features: Tensor, log_attention: Tensor) -> Tensor:
        return expectation(features, log_attention, estimator="unordered", control_variate=True)

    torch.compiler.reset()  # or each choice of a backend would count as a recompilation
    compiled = torch.compile(whole, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 7):
        features = torch.randn(2, n, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
        log_attention = torch.randn(2, n + 2, dtype=torch.float64, generator=seeded(1)).log_softmax(-1)[:, :n]
        log_attention.requires_grad_()
        results = []
        for function in (whole, compiled):
            pooled = function(features, log_attention)
            results.append((pooled, *torch.autograd.grad(pooled.square().sum(), (features, log_attention))))
        for got, want in zip(*results, strict=True):
            assert_close(got, want)


def test_with_replacement_it_is_refused():
    """Repeated cells have no set with an order to average over."""
    log_attention = torch.full((1, 2), -1.0)
    for call in (
        lambda: estimator_weights(log_attention, replace=True, estimator="unordered"),
        lambda: expectation(torch.zeros(1, 2, 3), log_attention, replace=True, estimator="unordered"),
        lambda: ats_kernels.expectation(torch.zeros(1, 2), log_attention, replace=True, estimator="unordered"),
    ):
        with pytest.raises(ValueError, match="'unordered' is for cells drawn without replacement, got replace=True"):
            call()
