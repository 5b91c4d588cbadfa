"""`ats_kernels.sample`: the precision of what comes with the draws, gradients, odd inputs, errors."""

import os
from decimal import Decimal, localcontext

import pytest
import torch

from ats_kernels import estimator_weights, expectation, sample
from ats_kernels.sampling import block_sums, grad_cpu
from tests.helpers import assert_close, randn, seeded

pytestmark = pytest.mark.usefixtures("cpu_path")

INF = float("inf")


def exact_log_attention(logits):
    """log softmax of one row in 120 decimal digits, of the very floats that came in."""
    with localcontext() as context:
        context.prec = 120
        z = [Decimal(value) for value in logits.tolist()]
        log_total = sum((value - max(z)).exp() for value in z).ln()
        return [value - max(z) - log_total for value in z]


def assert_relatively_close(actual, exact, relative):
    for got, want in zip(actual.flatten().tolist(), exact, strict=True):
        assert abs(Decimal(got) - want) <= Decimal(relative) * abs(want), (got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_against_torch(dtype):
    logits = randn(5, 300, dtype=dtype) * 4
    logits[1, ::2] = -INF
    logits[2] += 1e4
    draw = sample(logits, 20, generator=seeded())
    log_a = logits.double().log_softmax(-1)
    assert_close(draw.log_attention, log_a.gather(1, draw.indices))
    assert_close(draw.logsumexp, logits.double().logsumexp(-1))
    assert_close(draw.entropy, torch.special.entr(log_a.exp()).sum(-1))
    assert draw.log_attention.dtype == draw.logsumexp.dtype == draw.entropy.dtype == dtype
    assert (draw.log_attention <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_float32_results(dtype):
    """A log a rounded to half precision would spoil the weights by a percent."""
    logits = randn(3, 50, dtype=dtype).requires_grad_()
    draw = sample(logits, 8, generator=seeded())
    wide = sample(logits.detach().float(), 8, generator=seeded())
    for got, want in zip(draw, wide, strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
    draw.log_attention.sum().backward()
    assert logits.grad.dtype == dtype


def test_gaps_of_100_between_logits():
    """Masses down to e^-500: the draw goes down the gaps, and log a keeps its relative precision at every cell."""
    logits = torch.tensor([-300.0, 0.0, -500.0, -100.0, -400.0, -200.0], dtype=torch.float64)
    draw = sample(logits.expand(300, -1), 6, generator=seeded())
    order = [1, 3, 5, 0, 4, 2]
    assert (draw.indices == torch.tensor(order)).all()
    exact = exact_log_attention(logits)
    assert_relatively_close(draw.log_attention[0], [exact[cell] for cell in order], 1e-12)
    assert (sample(logits.expand(300, -1), 3, replace=True, generator=seeded()).indices == 1).all()


def test_one_hot_attention():
    """One cell 100 above equal others comes first; its log a is −5·e^-100, not 0."""
    logits = torch.full((6,), -100.0, dtype=torch.float64)
    logits[4] = 0.0
    draw = sample(logits.expand(300, -1), 3, generator=seeded())
    assert (draw.indices[:, 0] == 4).all()
    assert set(draw.indices[:, 1].tolist()) == {0, 1, 2, 3, 5}, "the cells of equal mass must share the second draw"
    exact = exact_log_attention(logits)
    assert_relatively_close(draw.log_attention[7], [exact[4], exact[0], exact[0]], 1e-12)


@pytest.mark.parametrize("mass", [1e-8, 1e-17, 1e-30])
def test_float32_keeps_tiny_masses(mass):
    """log a = log(1 − 3·mass) and m_2 = 3·mass to 1e-5 relative: formed as 1 − a in float32 both would be 0."""
    logits = torch.tensor([[mass, 1.0, mass, mass]], dtype=torch.float64).log().float()
    draw = sample(logits.expand(50, -1), 2, generator=seeded())
    row = (draw.indices[:, 0] == 1).nonzero()[0]
    exact = exact_log_attention(logits[0])
    assert draw.log_attention.dtype == torch.float32
    assert_relatively_close(draw.log_attention[row], [exact[1], exact[0]], 1e-5)
    first, second = exact[1].exp(), exact[0].exp()
    weights = estimator_weights(draw.log_attention)[row]
    assert_relatively_close(weights, [(1 + first) / 2, 3 * second / 2], 1e-5)


@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_gradients(options):
    """Of log a, logsumexp and entropy together, against finite differences with the draw held fixed."""
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[1, :4] = True

    def function(logits):
        return sample(logits.masked_fill(mask, -INF), 4, generator=seeded(1), **options)[1:]

    assert torch.autograd.gradcheck(function, randn(3, 9).requires_grad_())


def test_gradient_in_chunks(monkeypatch):
    """Float32, chunk by chunk, against the reference in float64."""
    monkeypatch.setattr(block_sums, "CHUNK", 1_000)
    monkeypatch.setattr(grad_cpu, "_SMALL", 0)
    grads = []
    for backend in ("", "reference"):
        monkeypatch.setenv("ATS_BACKEND", backend)
        logits = (randn(3, 2_345, dtype=torch.float32) * 3).requires_grad_()
        draw = sample(logits, 6, generator=seeded(1))
        (draw.log_attention * torch.arange(6)).sum().add(draw.entropy.sum() - draw.logsumexp.sum()).backward()
        grads.append(logits.grad)
    assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_few_logits(dtype, monkeypatch):
    """Masked cells, a poisoned row, expanded gradients and all three at once, against the reference."""
    grads = []
    for backend in (os.environ["ATS_BACKEND"], "reference"):
        monkeypatch.setenv("ATS_BACKEND", backend)
        logits = randn(4, 700, dtype=dtype) * 3
        logits[1, 5:] = -INF
        logits[2, 3] = INF
        logits.requires_grad_()
        draw = sample(logits, 6, generator=seeded(1), validate=False)
        (2 * draw.log_attention[[0, 1, 3]].sum() + draw.entropy[0] - draw.logsumexp.sum()).backward()
        grads.append(logits.grad[[0, 1, 3]])
        assert logits.grad[2].isnan().all()
    assert_close(*grads)


def test_one_compilation_for_all_numbers_of_cells():
    """Across the sizes at which eager calls read in chunks, forward and backward."""

    def gradient(logits):
        draw = sample(logits, 4)
        return draw.log_attention.sum() + draw.entropy.sum() - draw.logsumexp.sum()

    torch.compiler.reset()
    compiled = torch.compile(gradient, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cells in (90, 1_500, block_sums.CHUNK + 3):
            logits, found = randn(2, cells, dtype=torch.float32).requires_grad_(), []
            for function in (compiled, gradient):
                torch.manual_seed(0)
                found += torch.autograd.grad(function(logits), logits)
            assert_close(*found)


@pytest.mark.filterwarnings("error")
def test_rows_that_cannot_be_drawn_from_raise_no_warnings():
    logits = torch.tensor([[-INF, -INF, -INF], [0.0, INF, 1.0], [0.0, float("nan"), 1.0], [0.0, 1.0, 2.0]])
    logits.requires_grad_()
    draw = sample(logits, 2, validate=False)
    (draw.log_attention.sum() + draw.entropy.sum() + draw.logsumexp.sum()).backward()
    assert logits.grad[:3].isnan().all()
    assert logits.grad[3].isfinite().all()


def test_masked_cells_have_gradient_zero():
    """0·log 0 in the entropy's gradient must not turn into NaN."""
    logits = randn(2, 8)
    logits[0, 2:5] = -INF
    logits.requires_grad_()
    draw = sample(logits, 3, generator=seeded())
    (draw.log_attention.sum() + draw.logsumexp.sum() + draw.entropy.sum()).backward()
    assert (logits.grad[0, 2:5] == 0).all()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 5:].abs().min() > 0


def test_strided_logits():
    """A view with strides draws the same cells and gets the same gradient as its contiguous copy."""
    results = []
    for make in (lambda x: x.t()[:, ::2], lambda x: x.t()[:, ::2].contiguous()):
        base = randn(40, 3).requires_grad_()
        draw = sample(make(base), 5, generator=seeded())
        (draw.log_attention.sum() + draw.entropy.sum()).backward()
        results.append((draw.indices, draw.log_attention, base.grad))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("cells", [100, 6_000])
@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_traced_in_one_graph(cells, options):
    """torch.compile sees no break, draws the same for the same seed and anew at each call."""

    def function(logits):
        draw = sample(logits, 4, **options)
        return draw.indices, draw.log_attention.sum() + draw.logsumexp.sum() + draw.entropy.sum()

    torch.compiler.reset()  # or each choice of a backend would count as a recompilation
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        logits = randn(2, cells).requires_grad_()
        torch.manual_seed(3)
        indices, value = call(logits)
        value.backward()
        results.append((indices, value, logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    for eager, traced in zip(results[0][1:], results[1][1:], strict=True):
        assert_close(traced, eager)
    again = compiled(logits)[0]
    assert torch.equal(again, indices) == ("method" in options)


def test_more_cells_than_torch_multinomial_takes():
    """K = 2^24 + 3, where torch.multinomial gives up: the three cells past 2^24 hold all but 1e-6 of the mass."""
    logits = torch.zeros(1, 2**24 + 3)
    logits[:, 2**24 :] = 30.0
    draw = sample(logits, 3, generator=seeded())
    assert set(draw.indices[0].tolist()) == {2**24, 2**24 + 1, 2**24 + 2}
    total = torch.tensor([30.0, 30.0, 30.0, 24 * 0.6931471805599453], dtype=torch.float64).logsumexp(0)
    assert_close(draw.logsumexp, total[None])
    assert_close(draw.log_attention, (30 - total).expand(1, 3))


@pytest.mark.parametrize("replace", [False, True])
def test_rows_that_cannot_be_drawn_from_are_poisoned(replace):
    """Without validation a bad row must come out as −1 and NaN, stay NaN in the estimate, and leave others alone."""
    good = randn(6, 5)
    logits = good.clone()
    logits[1, 2], logits[2, 0], logits[3], logits[4, 2:] = float("nan"), INF, -INF, -INF
    bad = torch.tensor([False, True, True, True, not replace, False])  # row 4 has two cells for three draws
    logits.requires_grad_()
    draw = sample(logits, 3, replace=replace, generator=seeded(), validate=False)
    expected = sample(good, 3, replace=replace, generator=seeded())
    assert (draw.indices[bad] == -1).all()
    assert (draw.indices[~bad] >= 0).all()
    for row in (0, 5):
        for got, want in zip(draw, expected, strict=True):
            assert torch.equal(got[row], want[row])
    pooled = expectation(torch.ones(6, 3, 2, dtype=torch.float64), draw.log_attention, replace=replace)
    weights = estimator_weights(draw.log_attention, replace=replace)
    for value in (draw.log_attention, draw.logsumexp[:, None], draw.entropy[:, None], weights, pooled):
        assert torch.equal(value.isnan(), bad[:, None].expand_as(value))
    pooled[[0, 5]].sum().backward()
    assert logits.grad[[0, 5]].isfinite().all()


LOGITS = torch.zeros(2, 4)


def with_value(value, cell=(1, 2)):
    logits = LOGITS.clone()
    logits[cell] = value
    return logits


@pytest.mark.parametrize(
    ("logits", "n", "options", "error", "message"),
    [
        ([[0.0]], 1, {}, TypeError, "logits must be a torch.Tensor, got list"),
        (LOGITS.long(), 1, {}, TypeError, "logits must be floating point, got torch.int64"),
        (LOGITS[0], 1, {}, ValueError, r"logits must be \(B, K\).*got \(4,\)"),
        (LOGITS[:, :0], 1, {}, ValueError, r"at least 1, got \(2, 0\)"),
        (LOGITS, 0, {}, ValueError, "n must be at least 1, got 0"),
        (LOGITS, -3, {}, ValueError, "n must be at least 1, got -3"),
        (LOGITS, 2.0, {}, TypeError, "n must be an int, got float: 2.0"),
        (LOGITS, True, {}, TypeError, "n must be an int, got bool"),
        (
            LOGITS,
            2,
            {"generator": 0},
            TypeError,
            r"generator must be a torch.Generator, got int: 0; .*manual_seed\(seed\)",
        ),
        (LOGITS, 5, {}, ValueError, "n=5 .* K=4; draw fewer or use replace=True"),
        (LOGITS, 2, {"method": "best"}, ValueError, "unknown method 'best', expected one of 'sample', 'topk'"),
        (LOGITS, 2, {"method": "topk", "replace": True}, ValueError, "topk.*cannot be combined with replace=True"),
        (with_value(float("nan")), 2, {}, ValueError, "1 NaN value.*row 1, cell 2"),
        (with_value(INF), 2, {"replace": True}, ValueError, r"1 \+inf value.*row 1, cell 2"),
        (with_value(-INF, 1), 2, {"replace": True}, ValueError, "row 1 are all −inf: every cell is masked"),
        (with_value(-INF), 4, {"validate": True}, ValueError, "n=4 .* row 1: only 3 of its 4 cells"),
        (with_value(-INF), 4, {"method": "topk"}, ValueError, "n=4 .* row 1: only 3 of its 4 cells"),
    ],
)
def test_errors(logits, n, options, error, message):
    with pytest.raises(error, match=message):
        sample(logits, n, **options)
