"""`ats_kernels.sample`: the distribution of the draws, the precision of what comes with them, gradients, errors."""

from decimal import Decimal, localcontext

import pytest
import torch
from scipy import stats

from ats_kernels import _philox, estimator_weights, expectation, sample, sample_cpu, sample_ref
from tests.enumeration import attention_logits, enumerate_draws
from tests.helpers import assert_close, seeded

INF = float("inf")


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed)).to(dtype)


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


def assert_distributed(outcomes, probability):
    """Pearson's chi-square of outcome numbers against their probabilities; false alarms: 1e-4 a call."""
    expected = probability * len(outcomes)
    assert expected.min() >= 5, "too few rows for the chi-square approximation"
    counts = torch.bincount(outcomes, minlength=len(probability)).double()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < stats.chi2.isf(1e-4, len(probability) - 1)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", ["flat", "random"])
def test_ordered_draws_follow_the_sequential_distribution(kind, replace):
    """Otherwise the estimator is biased: its weights assume the order of the draw. False-alarm rate 1e-4."""
    logits = attention_logits(kind, 6) / 2
    draws, probability = enumerate_draws(logits.softmax(-1), 3, replace=replace)
    base = torch.tensor([36, 6, 1])
    drawn = (sample(logits.expand(60_000, -1), 3, replace=replace, generator=seeded(1)).indices * base).sum(-1)
    number = torch.full((216,), -1)
    number[(draws * base).sum(-1)] = torch.arange(len(draws))
    assert (number[drawn] >= 0).all(), "a draw without replacement repeats a cell"
    assert_distributed(number[drawn], probability)


@pytest.mark.parametrize("replace", [False, True])
def test_first_draw_among_many_cells(replace):
    """The first cell of a draw has the attention as its distribution, for float32 too. False-alarm rate 1e-4."""
    logits = randn(50, dtype=torch.float32)
    indices = sample(logits.expand(20_000, -1), 5, replace=replace, generator=seeded(2)).indices
    assert_distributed(indices[:, 0], logits.double().softmax(-1))


@pytest.mark.parametrize("replace", [False, True])
def test_one_cell_is_drawn_from_the_attention(replace):
    """N = 1 is a plain categorical draw. False-alarm rate 1e-4."""
    logits = attention_logits("random", 6)
    draw = sample(logits.expand(20_000, -1), 1, replace=replace, generator=seeded(3))
    assert_distributed(draw.indices[:, 0], logits.softmax(-1))
    assert_close(draw.log_attention[:, 0], logits.log_softmax(-1)[draw.indices[:, 0]])


@pytest.mark.parametrize("replace", [False, True])
def test_draws_from_several_blocks(replace, monkeypatch):
    """Six cells in five of twelve blocks, the others masked, no block to spare. False-alarm rate 1e-4."""
    monkeypatch.setattr(sample_cpu, "SPARE_BLOCKS", 0)
    cells = torch.tensor([5, 40, 130, 300, 511, 760])
    few = attention_logits("random", 6) / 2
    logits = torch.full((768,), -INF).index_put((cells,), few.float())
    draws, probability = enumerate_draws(few.float().softmax(-1), 2, replace=replace)
    number = torch.full((768, 768), -1)
    number[cells[draws[:, 0]], cells[draws[:, 1]]] = torch.arange(len(draws))
    indices = sample(logits.expand(12_000, -1), 2, replace=replace, generator=seeded(4)).indices
    drawn = number[indices[:, 0], indices[:, 1]]
    assert (drawn >= 0).all()
    assert_distributed(drawn, probability)


def test_blocks_of_the_first_two_draws():
    """Where each of two draws falls among 11 blocks, against the exact probability. False-alarm rate 1e-4."""
    logits = randn(700, dtype=torch.float32)
    attention = torch.nn.functional.pad(logits.double().softmax(-1), (0, 4)).view(11, 64)
    mass = attention.sum(-1)
    odds = attention / (1 - attention)  # a_i / (1 − a_i), summed over the first cell's block
    probability = odds.sum(-1).unsqueeze(-1) * mass - torch.diag((odds * attention).sum(-1))
    indices = sample(logits.expand(12_000, -1), 2, generator=seeded(5)).indices // 64
    assert_distributed(indices[:, 0] * 11 + indices[:, 1], probability.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 40])
def test_gaps_of_100_over_several_blocks(rows, dtype):
    """N = K over three blocks, masses down to e^-12,900: far below what exp can hold, in the only order possible."""
    logits = (-100.0 * torch.randperm(130, generator=seeded())).to(dtype)
    for options in ({}, {"method": "topk"}):
        indices = sample(logits.expand(rows, -1), 130, generator=seeded(), **options).indices
        assert torch.equal(indices, logits.argsort(descending=True).expand(rows, -1))
    assert (sample(logits.expand(rows, -1), 9, replace=True, generator=seeded()).indices == logits.argmax()).all()


# (rows, cells, n, options): one and several blocks, sizes of blocks, a small problem and a chunked one.
SIZES = [
    (1, 1, 1, {}),
    (3, 300, 5, {}),
    (3, 300, 5, {"replace": True}),
    (2, 20, 50, {"replace": True}),
    (16, 3_241, 10, {}),
    (16, 3_241, 10, {"replace": True}),
    (4, 3_241, 10, {"method": "topk"}),
    (2, 140_001, 6, {}),
    (1, 2**21 + 7, 200, {}),
]


@pytest.mark.parametrize(("rows", "cells", "n", "options"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_draws_as_the_reference(rows, cells, n, options, dtype, monkeypatch):
    """One by one for the same seed, with a third of the cells masked, in chunks of odd numbers of blocks."""
    monkeypatch.setattr(sample_cpu, "_CHUNK", 3_000)
    logits = randn(rows, cells, dtype=dtype) * 5
    if cells > 3 * n:
        logits[:, ::3] = -INF
    draw = sample(logits, n, generator=seeded(8), **options)
    expected = sample_ref(logits, n, generator=seeded(8), **options)
    assert torch.equal(draw.indices, expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert_close(got, want)


def test_a_row_draws_the_same_in_any_batch():
    """A draw is a function of the seed, the row's number and its logits, not of what else is in the batch."""
    logits = randn(50, 200)
    together = sample(logits, 5, generator=seeded(3)).indices
    assert torch.equal(together[:2], sample(logits[:2], 5, generator=seeded(3)).indices)


@pytest.mark.parametrize("cells", [300, 9_000])
def test_topk_takes_the_lower_index_among_ties(cells):
    logits = (randn(2, cells, dtype=torch.float32) * 2).round()
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :150]
    assert torch.equal(sample(logits, 150, method="topk").indices, expected)


def test_philox_known_answers():
    """The vectors published with Random123: draws must not change with the library's version."""
    for counter, key, words in [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        output = _philox.philox4x32(torch.tensor(counter).unbind(), torch.tensor(key).unbind())
        assert torch.stack(output).tolist() == words


def test_paired_random_numbers():
    seed = torch.tensor(2**62 + 12345)
    row = torch.arange(3).unsqueeze(-1)
    expected = _philox.random_bits(seed, torch.arange(14), row, _philox.CELLS)
    assert torch.equal(_philox.paired_bits(seed, torch.arange(7), row, _philox.CELLS), expected)
    assert expected.min() >= 0
    assert expected.max() < 2**53
    assert len(expected.unique()) == 3 * 14


@pytest.mark.parametrize("cells", [100, 6_000])
@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_traced_in_one_graph(cells, options):
    """torch.compile sees no break, draws the same for the same seed and anew at each call."""

    def function(logits):
        draw = sample(logits, 4, **options)
        return draw.indices, draw.log_attention.sum() + draw.logsumexp.sum() + draw.entropy.sum()

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


def test_drawing_every_cell_gives_a_permutation():
    draw = sample(randn(200, 7), 7, generator=seeded())
    assert (draw.indices.sort(-1).values == torch.arange(7)).all()
    assert_close(draw.log_attention.exp().sum(-1), torch.ones(200, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_masked_cells_are_never_drawn(dtype):
    """With as many unmasked cells as draws, a row's draw is exactly these cells."""
    unmasked = torch.rand(500, 20, generator=seeded()).topk(5).indices
    logits = torch.full((500, 20), -INF, dtype=dtype).scatter(1, unmasked, randn(500, 5, dtype=dtype) * 5)
    for n in (1, 4, 5):
        indices = sample(logits, n, generator=seeded(n)).indices
        assert not logits.gather(1, indices).isneginf().any()
    assert torch.equal(indices.sort(-1).values, unmasked.sort(-1).values)
    repeated = sample(logits, 40, replace=True, generator=seeded())
    assert not logits.gather(1, repeated.indices).isneginf().any()
    assert repeated.log_attention.isfinite().all()


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


@pytest.mark.parametrize("bits", [0, 2**53 - 1])
@pytest.mark.parametrize("small", [0, 2**12])
def test_extreme_random_numbers(bits, small, monkeypatch):
    """The least and the largest uniform must neither draw a masked cell, nor a cell twice, nor one past the end."""
    monkeypatch.setattr(_philox, "random_bits", lambda _, index, row, __: index * 0 + row * 0 + bits)
    monkeypatch.setattr(
        _philox, "paired_bits", lambda _, pair, row, __: (pair * 0 + row * 0).repeat_interleave(2, -1) + bits
    )
    monkeypatch.setattr(sample_cpu, "_SMALL", small)
    logits = torch.tensor([[-INF, 0.0, 1.0, -INF, 0.5, -INF]])
    assert sample(logits, 3).indices[0].sort().values.tolist() == [1, 2, 4]
    assert set(sample(logits, 3, replace=True).indices[0].tolist()) <= {1, 2, 4}
    assert _philox.log_exponential(torch.tensor(bits)).isfinite()


def test_same_seed_same_draw():
    """The global generator is left alone when one is given, and used when not."""
    logits = torch.zeros(4, 100)
    for replace in (False, True):
        state = torch.get_rng_state()
        first = sample(logits, 10, replace=replace, generator=seeded(5)).indices
        assert torch.equal(first, sample(logits, 10, replace=replace, generator=seeded(5)).indices)
        assert not torch.equal(first, sample(logits, 10, replace=replace, generator=seeded(6)).indices)
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(first[0], first[1]), "equal rows of one batch must not share their draw"
        torch.manual_seed(5)
        globally = sample(logits, 10, replace=replace).indices
        assert not torch.equal(globally, sample(logits, 10, replace=replace).indices)
        torch.manual_seed(5)
        assert torch.equal(globally, sample(logits, 10, replace=replace).indices)


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


def test_topk_is_the_most_probable_first_without_randomness():
    logits = randn(5, 60)
    state = torch.get_rng_state()
    draw = sample(logits, 7, method="topk")
    assert torch.equal(draw.indices, logits.topk(7).indices)
    assert_close(draw.log_attention, logits.log_softmax(-1).gather(1, draw.indices))
    assert torch.equal(state, torch.get_rng_state())


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
    monkeypatch.setattr(sample_cpu, "_CHUNK", 1_000)
    grads = []
    for backend in ("", "reference"):
        monkeypatch.setenv("ATS_BACKEND", backend)
        logits = (randn(3, 2_345, dtype=torch.float32) * 3).requires_grad_()
        draw = sample(logits, 6, generator=seeded(1))
        (draw.log_attention * torch.arange(6)).sum().add(draw.entropy.sum() - draw.logsumexp.sum()).backward()
        grads.append(logits.grad)
    assert_close(*grads)


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
