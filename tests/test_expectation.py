"""`ats_kernels.expectation`: unbiased by enumeration of every ordered draw; weights against exact arithmetic."""

from collections import Counter
from dataclasses import dataclass
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from ats_kernels import estimator_weights, estimator_weights_ref, expectation, sample
from ats_kernels.pooling.op import ESTIMATORS
from tests.enumeration import attention_logits, enumerate_draws, mass_left, step_probabilities
from tests.helpers import assert_close, seeded

pytestmark = pytest.mark.usefixtures("cpu_path")

SIZES = [(2, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 2), (6, 4)]  # (K, N)
KINDS = ["flat", "peaked", "random"]
WAYS = [(True, "ordered"), *((False, estimator) for estimator in ESTIMATORS)]  # (replace, estimator)
BIAS = 1e-12


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed)).to(dtype)


@dataclass
class Problem:
    """Φ = Σ a_i f_i with f_i = tanh(x_i W), a different feature in every cell, and the loss ⟨g, Φ⟩ − λ H(a)."""

    logits: Tensor  # (K,)
    inputs: Tensor  # (K, P)
    weight: Tensor  # (P, D)
    direction: Tensor  # (D,) g

    def features(self) -> Tensor:
        return torch.tanh(self.inputs @ self.weight)  # (K, D)

    def exact(self, entropy_weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Φ and the gradient of the loss to the logits and the weight, all cells visited."""
        attention = self.logits.softmax(-1)
        pooled = attention @ self.features()
        entropy = -(attention * attention.log()).sum()
        loss = pooled @ self.direction - entropy_weight * entropy
        return pooled.detach(), *torch.autograd.grad(loss, (self.logits, self.weight))


def make_problem(kind: str, cells: int) -> Problem:
    logits = attention_logits(kind, cells).requires_grad_()
    return Problem(logits, 2 * randn(cells, 3), randn(3, 4, seed=1).requires_grad_(), randn(4, seed=2))


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cells", "n"), SIZES)
def test_unbiased_over_every_ordered_draw(cells, n, kind, replace, estimator):
    """Forward, and gradient through the softmax to the logits and to the features' parameters, to 1e-12."""
    problem = make_problem(kind, cells)
    draws, probability = enumerate_draws(problem.logits.detach().softmax(-1), n, replace=replace)
    assert abs(probability.sum() - 1) < BIAS
    log_attention = problem.logits.log_softmax(-1)[draws]  # (M, n)
    pooled = expectation(problem.features()[draws], log_attention, replace=replace, estimator=estimator)
    mean = probability @ pooled
    gradients = torch.autograd.grad(mean @ problem.direction, (problem.logits, problem.weight))
    for got, want in zip((mean, *gradients), problem.exact(), strict=True):
        assert (got - want).abs().max() < BIAS


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("cells", "n"), [(4, 2), (5, 3)])
def test_unbiased_through_the_sampling_op_with_entropy(cells, n, replace):
    """`sample` and `expectation` chained, each ordered draw weighted to its exact probability, −λ H included."""
    problem = make_problem("random", cells)
    draws, probability = enumerate_draws(problem.logits.detach().softmax(-1), n, replace=replace)
    exact = dict(zip(map(tuple, draws.tolist()), probability.tolist(), strict=True))
    drawn = sample(problem.logits.expand(100_000, -1), n, replace=replace, generator=seeded(1))
    rows = list(map(tuple, drawn.indices.tolist()))
    counts = Counter(rows)
    assert counts.keys() == exact.keys(), "more rows are needed for every draw to turn up"
    row_weight = torch.tensor([exact[row] / counts[row] for row in rows], dtype=torch.float64)
    pooled = expectation(problem.features()[drawn.indices], drawn.log_attention, replace=replace)
    loss = row_weight @ (pooled @ problem.direction - 0.3 * drawn.entropy)
    gradients = torch.autograd.grad(loss, (problem.logits, problem.weight))
    for got, want in zip(gradients, problem.exact(entropy_weight=0.3)[1:], strict=True):
        assert (got - want).abs().max() < 1e-11  # 100,000 terms are summed


# Gradients to the logits as surrogates: functions of log a (M, K), the draws (M, n) and c = ⟨g, f⟩ (K,) whose
# derivative in log a, one row a draw, is the estimate.


def log_space(log_attention, draws, c, replace):
    """The library's."""
    return expectation(c[draws], log_attention.gather(1, draws), replace=replace)


def score_function(log_attention, draws, c, replace):
    """Differentiates Π_{j≤k} p_j(q_j)·E_k for each k (the paper's eq. 41-44), or Π p·Φ̂ with replacement."""
    attention = log_attention.exp()
    log_probability = step_probabilities(attention, draws, replace=replace).log().cumsum(-1)  # of q_1..q_k
    drawn = attention.gather(1, draws)
    if replace:
        return c[draws].mean(-1) * log_probability[:, -1]
    seen = drawn * c[draws]
    estimate = seen.cumsum(-1) - seen + mass_left(attention, draws) * c[draws]  # E_k
    return (estimate.detach() * log_probability + estimate).mean(-1)


def through_the_weights(log_attention, draws, c, replace):
    """Plain autograd through Φ̂'s formula, as if the draw did not depend on the attention. Wrong."""
    n = draws.shape[1]
    if replace:
        return c[draws].mean(-1) + 0 * log_attention.sum(-1)
    attention = log_attention.exp()
    drawn = attention.gather(1, draws)
    weights = (mass_left(attention, draws) + torch.arange(n - 1, -1, -1) * drawn) / n
    return (weights * c[draws]).sum(-1)


def released(log_attention, draws, c, replace):
    """What the authors released (idiap/attention-sampling, ats/core/expectation.py), in its names. Wrong without
    replacement: the formula is (F_estimator / probs + cumsum(f) − k·f)·∂a, k from 0, averaged over k."""
    attention = log_attention.gather(1, draws).exp()
    features, fixed = c[draws], attention.detach()
    if replace:
        return (features / fixed * attention).mean(-1)
    pm = 1 - (fixed.cumsum(-1) - fixed)
    probs = fixed / pm
    seen = fixed * features
    f_estimator = seen.cumsum(-1) - seen + pm * features
    ga = f_estimator / probs + (features.cumsum(-1) - features) - torch.arange(draws.shape[1]) * features
    return (ga * attention).mean(-1)


def bias_and_variance(surrogate, replace, cells=5, n=3):
    """Largest bias of a gradient to the logits, and the sum of its variances, over every ordered draw."""
    problem = make_problem("random", cells)
    draws, probability = enumerate_draws(problem.logits.detach().softmax(-1), n, replace=replace)
    rows = problem.logits.detach().expand(len(draws), -1).clone().requires_grad_()
    c = problem.features().detach() @ problem.direction
    (gradients,) = torch.autograd.grad(surrogate(rows.log_softmax(-1), draws, c, replace).sum(), rows)
    difference = gradients - problem.exact()[1]
    return (probability @ difference).abs().max().item(), (probability @ difference.square()).sum().item()


@pytest.mark.parametrize("replace", [False, True])
def test_score_function_agrees_but_varies_more(replace):
    """Two derivations of one gradient must agree in expectation; the log-space form is used for its variance."""
    bias, variance = bias_and_variance(log_space, replace)
    score_bias, score_variance = bias_and_variance(score_function, replace)
    assert bias < BIAS
    assert score_bias < BIAS
    assert variance < score_variance


@pytest.mark.parametrize(
    ("wrong", "replace"), [(through_the_weights, False), (through_the_weights, True), (released, False)]
)
def test_wrong_gradients_fail_the_same_check(wrong, replace):
    """A check that the known wrong formulas pass would prove nothing."""
    assert bias_and_variance(log_space, replace)[0] < BIAS
    assert bias_and_variance(wrong, replace)[0] > 0.01


def test_released_gradient_with_replacement_is_the_same():
    """With replacement the paper's eq. 12 and ours are one formula; so the check blames only what is wrong."""
    assert bias_and_variance(released, replace=True) == pytest.approx(bias_and_variance(log_space, replace=True))


def exact_weights(log_attention: list[float]) -> list[Decimal]:
    """w_k = (m_k + (N − k) a_k) / N for the floats given, in 120 decimal digits."""
    with localcontext() as context:
        context.prec = 120
        a = [Decimal(value).exp() for value in log_attention]
        n = len(a)
        return [(1 - sum(a[:k], Decimal(0)) + (n - 1 - k) * a[k]) / n for k in range(n)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights(dtype, n, kind):
    """w against exact arithmetic; it sums to 1 and is never negative, with N < K and with N = K."""
    logits = attention_logits(kind, 9).to(dtype).expand(50, -1)
    log_attention = sample(logits, n, generator=seeded()).log_attention
    weights = estimator_weights(log_attention)
    expected = [[float(w) for w in exact_weights(row)] for row in log_attention.tolist()]
    assert weights.dtype == dtype
    assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert (weights.double().sum(-1) - 1).abs().max() < {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert (weights >= 0).all()
    assert (estimator_weights(log_attention, replace=True) == 1 / n).all()


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 30.0])
def test_weights_stay_weights_when_everything_is_drawn(sharpness):
    """1 − cumsum in float32 goes negative towards the end of a draw of 2,000 from 2,000 cells."""
    log_attention = sample(randn(4, 2000, dtype=torch.float32) * sharpness, 2000, generator=seeded()).log_attention
    weights = estimator_weights(log_attention)
    assert (weights >= 0).all()
    assert (weights.double().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
@pytest.mark.parametrize("trailing", [(), (4,), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_and_gradients_against_the_surrogate(dtype, trailing, replace, estimator):
    """Σ w·exp(log a − sg[log a])·f in float64 has the right value and, by autograd, the right gradients."""
    features = randn(3, 5, *trailing, dtype=dtype).requires_grad_()
    logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    log_attention = randn(3, 9).log_softmax(-1)[:, :5].to(logits_dtype).requires_grad_()
    grad_out = randn(3, *trailing, seed=3, dtype=dtype)
    pooled = expectation(features, log_attention, replace=replace, estimator=estimator)
    pooled.backward(grad_out)

    f, log_a = (x.detach().double().requires_grad_() for x in (features, log_attention))
    ratio = estimator_weights(log_a, replace=replace, estimator=estimator) * (log_a - log_a.detach()).exp()
    expected = torch.einsum("bn,bn...->b...", ratio, f)
    expected.backward(grad_out.double())
    assert_close(pooled, expected)
    assert_close(features.grad, f.grad)
    assert_close(log_attention.grad, log_a.grad)
    assert pooled.dtype == features.grad.dtype == dtype


@pytest.mark.parametrize("replace", [False, True])
def test_gradcheck_of_the_features(replace):
    log_attention = randn(2, 6).log_softmax(-1)[:, :4]
    features = randn(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: expectation(f, log_attention, replace=replace), features)


def test_gradients_that_arrive_with_any_strides():
    """sum() sends back a stride-0 gradient and a transpose a strided one; features may be strided as well."""
    features, log_attention = randn(3, 4, 5).transpose(0, 2), randn(5, 4).log_softmax(-1)
    results = []
    for grad_out in (torch.ones((), dtype=torch.float64).expand(5, 3), torch.ones(3, 5, dtype=torch.float64).t()):
        for f in (features, features.contiguous()):
            arguments = f.detach().requires_grad_(), log_attention.clone().requires_grad_()
            results.append(torch.autograd.grad(expectation(*arguments), arguments, grad_out))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_close(got, want)


def test_only_one_argument_requires_a_gradient():
    """Frozen features or a frozen attention: the other's gradient is what it is when both learn."""
    features, log_attention, g = randn(2, 4, 3), randn(2, 4).log_softmax(-1), randn(2, 3, seed=5)
    both = [x.clone().requires_grad_() for x in (features, log_attention)]
    expected = torch.autograd.grad(expectation(*both), both, g)
    for learns in (0, 1):
        arguments = [features.clone(), log_attention.clone()]
        arguments[learns].requires_grad_()
        (got,) = torch.autograd.grad(expectation(*arguments), arguments[learns], g)
        assert torch.equal(got, expected[learns])
    assert not expectation(features, log_attention).requires_grad


def test_compiles_whole():
    """No graph break, forward and backward, and the same values."""
    arguments = randn(2, 4, 3).requires_grad_(), randn(2, 4).log_softmax(-1).requires_grad_()
    torch.compiler.reset()  # or each choice of a backend would count as a recompilation
    compiled = torch.compile(expectation, fullgraph=True, backend="aot_eager")
    results = []
    for function in (expectation, compiled):
        pooled = function(*arguments)
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), arguments)))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
    weigh = torch.compile(estimator_weights, fullgraph=True, backend="aot_eager")
    assert_close(weigh(arguments[1]), estimator_weights(arguments[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_keeps_the_weights_precise(dtype):
    """Under autocast features come in half precision and log a in float32; weights are not rounded to half."""
    log_attention = randn(2, 40, dtype=torch.float32).log_softmax(-1).requires_grad_()
    features = randn(2, 40, 3, dtype=dtype).requires_grad_()
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            pooled = expectation(features, log_attention)
            grads.append((pooled, *torch.autograd.grad(pooled.float().sum(), (features, log_attention))))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)
    assert pooled.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_lean_weights_are_the_reference(kind):
    """Also of a peak that leaves less than float64 resolves below 1, wherever in the draw it comes."""
    logits = 20 * attention_logits(kind, 9).expand(50, -1)
    log_attention = sample(logits, 9, generator=seeded()).log_attention
    left = torch.tensor([[-1e-18, -42.0, -43.0]]).double()
    for log_a, atol in ((log_attention, 1e-20), (left, 0.0), (left.flip(1), 0.0)):
        torch.testing.assert_close(estimator_weights(log_a), estimator_weights_ref(log_a), rtol=1e-12, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_log_probabilities_that_are_0_but_for_rounding_are_taken(dtype):
    """What is refused is far above it: a probability, or a logit."""
    certain = torch.tensor([[30.0, -5.0, -40.0]]).log_softmax(-1).to(dtype)
    assert torch.equal(expectation(FEATURES[:1], certain), FEATURES[0, :1])
    assert estimator_weights(certain + 1e-7)[0, 0] == pytest.approx(1, abs=1e-6)
    estimator_weights(torch.empty(0, 3))  # an empty batch has no values to look at


def test_weights_are_constants():
    """A gradient through the weights would be the wrong one of `through_the_weights`."""
    log_attention = randn(2, 4).log_softmax(-1).requires_grad_()
    assert not estimator_weights(log_attention).requires_grad


FEATURES, LOG_ATTENTION = torch.zeros(2, 3, 4), torch.full((2, 3), -2.0)


@pytest.mark.parametrize(
    ("features", "log_attention", "options", "error", "message"),
    [
        ([1.0], LOG_ATTENTION, {}, TypeError, "features must be a torch.Tensor, got list"),
        (FEATURES.long(), LOG_ATTENTION, {}, TypeError, "features must be floating point, got torch.int64"),
        (FEATURES, LOG_ATTENTION.int(), {}, TypeError, "log_attention must be floating point, got torch.int32"),
        (FEATURES, torch.zeros(2), {}, ValueError, r"log_attention must be \(B, N\) with N ≥ 1, got \(2,\)"),
        (FEATURES[:, :0], torch.zeros(2, 0), {}, ValueError, r"N ≥ 1, got \(2, 0\)"),
        (FEATURES.flatten(0, 1), LOG_ATTENTION, {}, ValueError, r"\(2, 3\).*got \(6, 4\).*unflatten"),
        (FEATURES[:1], LOG_ATTENTION, {}, ValueError, r"\(2, 3\).*got \(1, 3, 4\)"),
        (torch.zeros(2), LOG_ATTENTION, {}, ValueError, r"\(2, 3\).*got \(2,\)"),
        (FEATURES.to("meta"), LOG_ATTENTION, {}, ValueError, "features are on meta but log_attention is on cpu"),
        (FEATURES, LOG_ATTENTION, {"estimator": "best"}, ValueError, "unknown estimator 'best', expected.*'ordered'"),
        (FEATURES, LOG_ATTENTION + 2.25, {}, ValueError, r"above 0, up to 0\.25"),
    ],
)
def test_errors(features, log_attention, options, error, message):
    with pytest.raises(error, match=message):
        expectation(features, log_attention, **options)


@pytest.mark.parametrize(
    ("log_attention", "options", "error", "message"),
    [
        (LOG_ATTENTION.long(), {}, TypeError, "log_attention must be floating point, got torch.int64"),
        (FEATURES, {}, ValueError, r"log_attention must be \(B, N\).*got \(2, 3, 4\)"),
        (LOG_ATTENTION, {"estimator": "best"}, ValueError, "unknown estimator 'best'"),
        (LOG_ATTENTION + 2.001, {}, ValueError, "not probabilities or logits"),
    ],
)
def test_errors_of_the_weights(log_attention, options, error, message):
    with pytest.raises(error, match=message):
        estimator_weights(log_attention, **options)
