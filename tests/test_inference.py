"""`ats.inference`: predictions, what they read, and whether the errors they state hold."""

import functools
import math

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import ats
from ats.prediction import student_quantile
from tests.helpers import assert_close, seeded

GRID, SIDE = (6, 8), 4  # cells, pixels a cell


class FromView(nn.Module):
    """Attention that is the view, one pixel a cell."""

    def forward(self, view: Tensor) -> Tensor:
        return view


class Means(nn.Module):
    """Features of a patch: its channels' means. Counts the patches that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def forward(self, patches: Tensor) -> Tensor:
        self.read += len(patches)
        return patches.mean((2, 3))


def make(n_patches: int = 5, **options: object) -> tuple[ats.nn.AttentionSampling, nn.Linear]:
    torch.manual_seed(0)
    sampling = ats.nn.AttentionSampling(FromView(), Means(), n_patches, SIDE, **options)  # type: ignore[arg-type]
    return sampling.double().eval(), nn.Linear(3, 4).double()


def problem(images: int = 3, sharpness: float = 1.0, seed: int = 1) -> tuple[Tensor, Tensor]:
    """View (B, gh, gw), which is the attention's logits, and images of one colour a cell."""
    generator = seeded(seed)
    view = sharpness * torch.randn(images, *GRID, dtype=torch.float64, generator=generator)
    cells = torch.randn(images, 3, *GRID, dtype=torch.float64, generator=generator)
    return view, cells.repeat_interleave(SIDE, 2).repeat_interleave(SIDE, 3)


def full(sampling: ats.nn.AttentionSampling, head: nn.Module, view: Tensor, image: Tensor) -> Tensor:
    with torch.no_grad():
        return head(sampling.full(view, image))


def test_sampled_predictions_are_those_of_the_unordered_estimate() -> None:
    sampling, head = make()
    view, image = problem()
    got = ats.predict(sampling, head, view, image, n_patches=7, generator=seeded())
    sample = ats.sample_patches(image, view, 7, SIDE, generator=seeded())
    pooled = ats.expectation(sample.patches.mean((3, 4)), sample.log_attention, estimator="unordered")
    assert_close(got.logits, head(pooled))
    assert got.patches_used.tolist() == [7, 7, 7]
    assert sampling.feature.read == 21


def test_top_cells_are_weighted_by_their_attention() -> None:
    """Weights of a random draw would be wrong for cells that were not drawn at random."""
    sampling, head = make(selection="topk")
    view, image = problem()
    got = ats.predict(sampling, head, view, image, selection="topk")
    log_attention, cells = view.flatten(1).log_softmax(-1).topk(5)
    colours = image[:, :, ::SIDE, ::SIDE].flatten(2)  # (B, 3, K)
    weights = log_attention.exp() / log_attention.exp().sum(-1, keepdim=True)
    pooled = torch.einsum("bn,bcn->bc", weights, colours.gather(2, cells.unsqueeze(1).expand(-1, 3, -1)))
    assert_close(got.logits, head(pooled))
    assert_close(head(sampling(view, image)[0]), head(pooled))
    assert got.standard_error is None
    with pytest.raises(ValueError, match="no standard error"):
        got.interval()


@pytest.mark.parametrize("replace", [False, True])
def test_averages_of_draws_err_less_and_say_so(replace: bool) -> None:
    """Over 2,000 copies of an image: the errors' spread is the standard error stated, and averaging 4 halves both.

    A variance from 2,000 normal errors is within 20% of the truth in all but 1e-9 of cases, times 8 looked at.
    """
    sampling, head = make(n_patches=6, replace=replace)
    view, image = (x.expand(2000, *x.shape[1:]) for x in problem(1))
    truth = full(sampling, head, view[:1], image[:1])
    spreads = []
    for repeats in (1, 4):
        got = ats.predict(sampling, head, view, image, repeats=repeats, generator=seeded(repeats))
        spread = (got.logits - truth).square().mean(0)
        assert ((got.logits.mean(0) - truth[0]).abs() < 5 * (spread / 2000).sqrt()).all()
        assert got.standard_error is not None
        torch.testing.assert_close(got.standard_error.square().mean(0), spread, rtol=0.2, atol=0)
        assert got.patches_used.eq(6 * repeats).all()
        spreads.append(spread)
    torch.testing.assert_close(spreads[0] / 4, spreads[1], rtol=0.25, atol=0)


def test_anytime_reads_each_patch_once_and_stops_image_by_image() -> None:
    sampling, head = make()
    view, image = problem(6, sharpness=3.0)
    got = ats.anytime(sampling, head, view, image, budget=30, tolerance=0.05, generator=seeded())
    assert len(set(got.patches_used.tolist())) > 1, "the problem must have images that stop apart"
    assert sampling.feature.read == int(got.patches_used.sum())
    assert got.standard_error is not None
    assert (got.standard_error[got.stopped] <= 0.05).all()
    assert (got.patches_used[~got.stopped] == 30).all()
    for row, used in enumerate(got.patches_used.tolist()):  # as if that many had been asked for
        fixed = ats.predict(sampling, head, view, image, n_patches=used, generator=seeded())
        assert_close(got.logits[row], fixed.logits[row])
        assert fixed.standard_error is not None
        assert_close(got.standard_error[row], fixed.standard_error[row])
        if used > 8:  # and not sure one look before
            fewer = ats.predict(sampling, head, view, image, n_patches=used - 2, generator=seeded()).standard_error
            assert fewer is not None
            assert (fewer[row] > 0.05).any()


def test_anytime_gives_the_full_model_where_the_budget_allows() -> None:
    """More budget than cells and no tolerance: every cell is read once, and nothing is left to err about."""
    sampling, head = make()
    view, image = problem()
    got = ats.anytime(sampling, head, view, image, budget=100, tolerance=0, chunk_size=7)
    assert_close(got.logits, full(sampling, head, view, image))
    assert got.patches_used.tolist() == [48, 48, 48]
    assert got.standard_error is not None
    assert got.standard_error.max() < 1e-7


def test_a_lead_stops_once_the_class_is_decided() -> None:
    """An image whose classes are far apart needs few patches, one with two equal classes needs all of them."""
    sampling, _ = make()
    view, image = problem(2)
    image[0, 0] += 20
    head = nn.Linear(3, 3).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1e-9]]))
        head.bias.copy_(torch.tensor([0.0, 10, 10]))
    got = ats.anytime(sampling, head, view, image, budget=20, lead=3.0, generator=seeded())
    assert got.patches_used.tolist() == [8, 20]
    assert got.stopped.tolist() == [True, False]
    single = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        single.weight.copy_(torch.tensor([[-1.0, 0, 0]]))
    got = ats.anytime(sampling, single, view, image, budget=20, lead=3.0, generator=seeded())
    assert got.patches_used[0] == 8
    assert got.patches_used[1] > 8


@pytest.mark.parametrize(("sharpness", "tolerance"), [(0.3, 0.15), (1.0, 0.12), (2.0, 0.05), (3.0, 0.02)])
def test_intervals_cover_the_full_model(sharpness: float, tolerance: float) -> None:
    """20 images × 200 draws of a sequential rule: 95% intervals cover at least 92.5% of the logits.

    With 200 independent draws of each image and logits of one draw that move together, the standard deviation of a
    rate of 95% is at most 0.0154 for an image, of the mean over 20 images 0.0035: a true rate of 95% falls below 92.5%
    in fewer than 1e-12 of runs, one of 94% in fewer than 1e-5.
    """
    sampling, head = make()
    view, image = problem(20, sharpness)
    truth = full(sampling, head, view, image).repeat(200, 1)
    many = view.repeat(200, 1, 1), image.repeat(200, 1, 1, 1)
    got = ats.anytime(sampling, head, *many, budget=40, tolerance=tolerance, generator=seeded())
    low, high = got.interval(0.95)
    rate, used = ((low <= truth) & (truth <= high)).double().mean(), got.patches_used.double()
    print(f"sharpness {sharpness}: coverage {rate:.4f}, {used.mean():.1f} patches")
    assert rate > 0.925
    assert 8.5 < used.mean() < 35, "the rule must stop in between for the test to mean anything"


def test_students_quantiles() -> None:
    for degrees in (1, 2, 3, 7, 24, 99, 400):
        for confidence in (0.5, 0.9, 0.95, 0.99):
            assert student_quantile(confidence, degrees) == pytest.approx(
                scipy.stats.t.ppf((1 + confidence) / 2, degrees)
            )


def test_a_draw_goes_on_as_it_began() -> None:
    """What makes reading on legal: for one seed a smaller draw is the start of a larger one."""
    view, image = problem()
    few, many = (ats.sample_patches(image, view, n, SIDE, generator=seeded(5)).indices for n in (4, 30))
    assert torch.equal(few, many[:, :4])


def test_which_patches_were_read() -> None:
    """Of each image as many as were used, where they lie, and with weights that give the logits anew."""
    sampling, head = make()
    view, image = problem(4, sharpness=3.0)
    colours = image[:, :, ::SIDE, ::SIDE].flatten(2)  # (B, 3, K)
    for got in (
        ats.predict(sampling, head, view, image, n_patches=7, generator=seeded()),
        ats.predict(sampling, head, view, image, selection="topk"),
        ats.predict(sampling, head, view, image, n_patches=6, repeats=3, generator=seeded()),
        ats.predict(make(replace=True)[0], head, view, image, n_patches=6, generator=seeded()),
        ats.anytime(sampling, head, view, image, budget=30, tolerance=0.05, generator=seeded()),
        ats.anytime(sampling, head, view, image, budget=99, tolerance=0.0, generator=seeded()),
    ):
        assert len(got.samples) == 4
        table = got.table()
        assert len(table) == int(got.patches_used.sum())
        for number, sample in enumerate(got.samples):
            assert sample.indices.numel() == got.patches_used[number]
            cells = sample.indices
            where = torch.stack([cells // GRID[1], cells % GRID[1]], -1) * SIDE
            assert torch.equal(sample.offsets, where)
            weights = sample.weights(got.estimator) / len(sample)
            pooled = (weights.unsqueeze(-1) * colours[number].T[cells]).sum((0, 1))
            assert_close(head(pooled), got.logits[number], torch.float32)
            rows = [row for row in table if row["image"] == number]
            assert [row["draw"] for row in rows] == list(range(cells.numel()))
            assert [(row["top"], row["left"]) for row in rows] == [tuple(xy) for xy in where.flatten(0, 1).tolist()]
            assert sum(row["weight"] for row in rows) == pytest.approx(1)


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_masked_images_are_read_as_far_as_they_go(chunk_size: int) -> None:
    """Images of 48, 20, 5 and 1 live cells: more budget than any reads them all, each once, and is exact."""
    sampling, head = make()
    view, image = problem(4)
    live = torch.tensor([48, 20, 5, 1])
    order = torch.rand(4, 48, generator=seeded(2)).argsort(-1).view(4, *GRID)
    mask = order < live.view(-1, 1, 1)
    with torch.no_grad():
        exact = head(sampling.full(view, image, mask=mask))
    sampling.feature.read = 0
    got = ats.anytime(sampling, head, view, image, mask=mask, budget=1000, tolerance=0.0, chunk_size=chunk_size)
    assert_close(got.logits, exact)
    assert torch.equal(got.patches_used, live)
    assert sampling.feature.read == int(live.sum())
    assert got.standard_error is not None
    assert got.standard_error.max() < 1e-7
    assert [sample.indices.shape[1] for sample in got.samples] == live.tolist()
    for number, sample in enumerate(got.samples):
        assert mask[number].flatten()[sample.indices].all()
    for options in ({"n_patches": 12}, {"n_patches": 12, "selection": "topk"}):
        fixed = ats.predict(sampling, head, view, image, mask=mask, **options)  # type: ignore[arg-type]
        assert_close(fixed.logits[2:], exact[2:])
        assert fixed.patches_used.tolist() == [12, 12, 5, 1]
        assert len(fixed.table()) == 30
        assert fixed.standard_error is None or fixed.standard_error[2:].eq(0).all()
    dark = view.masked_fill(~mask, -math.inf)  # the network's own doing
    assert_close(ats.predict(sampling, head, dark, image, n_patches=12).logits[2:], exact[2:])
    assert_close(ats.predict(sampling, head, dark, image, n_patches=1000).logits, exact)


def test_the_old_name_of_selection() -> None:
    sampling, head = make()
    with pytest.warns(DeprecationWarning, match="method= is now selection=") as caught:
        old = ats.predict(sampling, head, *problem(), method="topk")  # type: ignore[call-arg]
    assert [warning.filename for warning in caught] == [__file__]
    assert old.standard_error is None


def test_errors() -> None:
    sampling, head = make()
    view, image = problem()
    for options, message in [
        ({"budget": 9}, "needs a tolerance or a lead"),
        ({"budget": 0, "lead": 2.0}, "budget must be at least 1"),
        ({"budget": 1, "lead": 2.0}, "a budget of 1 patch"),
        ({"budget": 9, "lead": -1.0}, "lead must be a finite number of at least 0, got -1.0"),
        ({"budget": 9, "tolerance": float("nan")}, "tolerance must be a finite number"),
        ({"budget": 9, "tolerance": 0.1, "min_patches": 1}, "min_patches must be at least 2"),
        ({"budget": 9, "tolerance": 0.1, "chunk_size": 0}, "chunk_size must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ats.anytime(sampling, head, view, image, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown selection 'best'"):
        ats.predict(sampling, head, view, image, selection="best")
    with pytest.raises(ValueError, match="repeats=2 would give the same"):
        ats.predict(sampling, head, view, image, selection="topk", repeats=2)
    with pytest.raises(ValueError, match="head is not linear"):
        ats.predict(sampling, nn.Sequential(head, nn.ReLU()), view, image)
    for bend in (nn.Softmax(-1), nn.Tanh(), nn.ReLU()):  # which small features hardly bend
        small = nn.Linear(3, 4).double()
        with torch.no_grad():
            small.weight.mul_(0.1)
        with pytest.raises(ValueError, match="head is not linear"):
            ats.predict(sampling, nn.Sequential(small, bend), view, image)
    with pytest.raises(ValueError, match="NaN or infinite class logits for 15 of 15 patches"):
        ats.predict(sampling, lambda features: head(features) * math.nan, view, image)
    for function in (ats.predict, functools.partial(ats.anytime, budget=9, lead=2.0)):
        with pytest.raises(TypeError, match=r"must be an ats.nn.AttentionSampling, got Linear; .* model\.sampling"):
            function(head, head, view, image)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"head must give class logits \(M, C\), got \(15,\)"):
        ats.predict(sampling, lambda features: head(features)[:, 0], view, image)
    trained = nn.Sequential(head, nn.BatchNorm1d(4).double())
    with pytest.raises(ValueError, match=r"head\.1 \(BatchNorm1d\) is in training mode.*model\.eval\(\)"):
        ats.predict(sampling.train(), trained, view, image)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
        ats.predict(sampling.eval(), head, view, image).interval(95)
    one = ats.predict(sampling, head, view, image, n_patches=1)
    assert one.standard_error is None
