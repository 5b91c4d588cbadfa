"""`ats_kernels.sample`: the distribution of the draws, and that seed, row and logits alone decide them."""

import threading

import numpy as np
import pytest
import torch
from scipy import stats

from ats_kernels import philox, sample, sample_ref
from ats_kernels.sampling import block_sums
from ats_kernels.sampling import cpu as sample_cpu
from tests.enumeration import attention_logits, enumerate_draws
from tests.helpers import assert_close, randn, seeded

pytestmark = pytest.mark.usefixtures("cpu_path")

INF = float("inf")


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
    (4, 1_500, 1_024, {}),
]


@pytest.fixture(params=["in chunks", "at once"])
def sums(request, monkeypatch):
    """How sums over blocks are taken: in chunks of an odd number of blocks, or of up to 2²⁰ logits at once."""
    if request.param == "in chunks":
        monkeypatch.setattr(block_sums, "CHUNK", 3_000)


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize(("rows", "cells", "n", "options"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_draws_as_the_reference(rows, cells, n, options, dtype):
    """One by one for the same seed, with a third of the cells masked where that leaves enough."""
    logits = randn(rows, cells, dtype=dtype) * 5
    if cells > 3 * n:
        logits[:, ::3] = -INF
    draw = sample(logits, n, generator=seeded(8), **options)
    expected = sample_ref(logits, n, generator=seeded(8), **options)
    assert torch.equal(draw.indices, expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("cells", [1, 63, 65, 400, 1_500])
def test_small_draws_are_those_of_the_reference(cells, dtype):
    """Two hundred draws a size or more, sharp and flat, some cells masked; all cells have numbers there."""
    rows = 2**12 // cells
    for seed in range(200 // min(rows, 50)):
        logits = randn(rows, cells, dtype=dtype, seed=seed) * (1, 8, 90)[seed % 3]
        logits[:, 12:] = logits[:, 12:].masked_fill(randn(rows, max(0, cells - 12), seed=seed + 1) > 0, -INF)
        n = min(cells, 10)
        draw, expected = (function(logits, n, generator=seeded(seed)) for function in (sample, sample_ref))
        assert torch.equal(draw.indices, expected.indices)
        for got, want in zip(draw[1:], expected[1:], strict=True):
            assert_close(got, want.to(got.dtype))


def test_threads_do_not_share_arrays():
    """Small draws work in arrays that are kept: each thread must have its own."""
    logits = randn(1, 900)
    expected = [sample(logits, 9, generator=seeded(seed)).indices for seed in range(40)]
    drawn: list[list[torch.Tensor]] = [[] for _ in range(4)]

    def draw(into):
        for seed in range(40):
            into.append(sample(logits, 9, generator=seeded(seed)).indices)

    threads = [threading.Thread(target=draw, args=(into,)) for into in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for indices in drawn:
        assert torch.equal(torch.cat(indices), torch.cat(expected))


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "case", ["sharp", "peak between the sampled blocks", "all sampled blocks masked", "far from 0"]
)
def test_sums_that_one_logit_cannot_serve(case, replace, monkeypatch):
    """Sums relative to one logit of the row over- or underflow where blocks differ by more than float32 holds."""
    monkeypatch.setattr(block_sums, "_SAMPLED_BLOCKS", 2)
    logits = randn(2, 9_000, dtype=torch.float32)
    if case == "sharp":  # after a few draws, what is left is e^-200 of all
        logits -= 200
        logits[:, 4_000:4_004] += 200
    elif case == "peak between the sampled blocks":
        logits[1, 1_000] = 500
    elif case == "all sampled blocks masked":
        logits[:, :8_000] = -INF
        logits[1, 100] = 2
    else:
        logits += 60_000
    draw = sample(logits, 12, replace=replace, generator=seeded(5))
    expected = sample_ref(logits, 12, replace=replace, generator=seeded(5))
    assert torch.equal(draw.indices, expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert_close(got, want.to(got.dtype))


def test_blocks_to_spare_change_nothing(monkeypatch):
    """They are there in case float32 sums swap two blocks: with and without them, the same cells are drawn."""
    logits = randn(30, 4_000, dtype=torch.float32) * 2
    draws = []
    for near in (-INF, INF):
        monkeypatch.setattr(sample_cpu, "NEAR", near)
        draws.append(sample(logits, 12, generator=seeded(9)).indices)
    assert torch.equal(*draws)


def test_after_inference_mode(monkeypatch):
    """What a thread keeps from a call in inference mode must be writable outside of it."""
    monkeypatch.setattr(block_sums, "_scratch", threading.local())
    logits = randn(2, 9_000)
    with torch.inference_mode():
        inside = sample(logits, 4, generator=seeded(2)).indices
    assert torch.equal(sample(logits.requires_grad_(), 4, generator=seeded(2)).indices, inside)


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


def test_topk_tells_blocks_apart_that_differ_by_one_rounding():
    """The most probable cell, though the next lies in an earlier block and is less by a last digit."""
    logits = torch.full((1, 9_000), -1.0)
    logits[0, 5] = 1.0
    logits[0, 8_000] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert sample(logits, 1, method="topk").indices.item() == 8_000


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


@pytest.mark.parametrize("bits", [0, 2**53 - 1])
@pytest.mark.parametrize("small", [0, 2**12])
def test_extreme_random_numbers(bits, small, monkeypatch):
    """The least and the largest uniform must neither draw a masked cell, nor a cell twice, nor one past the end."""
    monkeypatch.setattr(philox, "random_bits", lambda _, index, row, __: index * 0 + row * 0 + bits)
    monkeypatch.setattr(philox, "paired_bits", lambda _, pair, row, __: (pair * 0 + row * 0).repeat(2, -1) + bits)
    monkeypatch.setattr(philox.Counters, "bits", lambda self, _: np.full((2, self.count), bits, np.uint64))
    monkeypatch.setattr(sample_cpu, "_SMALL", small)
    logits = torch.tensor([[-INF, 0.0, 1.0, -INF, 0.5, -INF]])
    assert sample(logits, 3).indices[0].sort().values.tolist() == [1, 2, 4]
    assert set(sample(logits, 3, replace=True).indices[0].tolist()) <= {1, 2, 4}
    assert philox.log_exponential(torch.tensor(bits)).isfinite()
    assert np.isfinite(philox.log_exponential_numpy(np.array([bits])))


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


def test_topk_is_the_most_probable_first_without_randomness():
    logits = randn(5, 60)
    state = torch.get_rng_state()
    draw = sample(logits, 7, method="topk")
    assert torch.equal(draw.indices, logits.topk(7).indices)
    assert_close(draw.log_attention, logits.log_softmax(-1).gather(1, draw.indices))
    assert torch.equal(state, torch.get_rng_state())
