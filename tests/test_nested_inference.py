"""Predictions of nested models: the standard error against enumeration of every draw, and reading on until sure."""

import pytest
import torch
from torch import Tensor, nn

import ats
from ats.nested_variance import estimate_levels
from ats.nn import AttentionSampling, NestedAttentionSampling, Zoom
from ats.samples import CellSample
from tests.enumeration import step_probabilities
from tests.helpers import assert_close, seeded
from tests.nested_models import EveryDraw, bytes_of, draw_image, small_model


def of_cells(indices: Tensor, log_attention: Tensor, *, replace: bool = False) -> CellSample:
    """Drawn cells (R, n) as a sample, of which the rest is of no use here."""
    nothing = torch.zeros(len(indices), dtype=torch.float64)
    return CellSample(
        indices=indices,
        log_attention=log_attention,
        logsumexp=nothing,
        entropy=nothing,
        replace=replace,
        selection="sample",
        grid_size=(1, log_attention.shape[-1]),
    )


@pytest.mark.parametrize("options", [{"estimator": "unordered"}, {"replace": True}], ids=str)
def test_the_variance_is_unbiased_over_every_draw_of_a_model(options):
    model, image = small_model((2, 2), EveryDraw, **options), draw_image()
    with torch.no_grad():
        batch = image.expand(model.prepare(), -1, -1, -1)
        features, levels = model.draw(batch, model.look(None, batch))
        pooled = model.pool_levels(features, levels)
        phi = small_model((2, 2)).full(None, image)[0]
    probability = model.probability
    value, variance = estimate_levels(features, levels, estimator=model.estimator)
    assert_close(value, pooled)
    exact = probability @ (pooled - phi).square()
    torch.testing.assert_close(probability @ variance, exact, rtol=1e-9, atol=0)
    if not model.replace:  # what takes the regions' estimates for exact says too little
        outer = ats.estimate(value_of_regions(features, levels), levels[0].log_attention, estimator="unordered")
        assert (probability @ outer.variance < 0.95 * exact).all()


def value_of_regions(features: Tensor, levels: tuple[CellSample, ...]) -> Tensor:
    return ats.pool(features, levels[1], estimator="unordered").unflatten(0, tuple(levels[0].indices.shape))


def test_the_variance_of_three_levels_recurses():
    """Three cells and two draws at each, of tables of attention and features. Sets are enough for what is unordered."""
    generator = seeded(5)
    logits = [torch.randn(*[3] * depth, dtype=torch.float64, generator=generator) for depth in (1, 2, 3)]
    table = 10 + torch.randn(3, 3, 3, dtype=torch.float64, generator=generator)
    logs = [one.log_softmax(-1) for one in logits]
    phi = torch.einsum("i,ij,ijk,ijk->", *(one.exp() for one in logs), table)
    sets = torch.tensor([[0, 1], [0, 2], [1, 2]])
    which = torch.cartesian_prod(*[torch.arange(3)] * 7)  # of the region, the two in it, and the four in those
    first = sets[which[:, 0]]  # (M, 2)
    second = sets[which[:, 1:3]]  # (M, 2, 2)
    third = sets[which[:, 3:]].view(-1, 2, 2, 2)

    def chance(attention: Tensor, drawn: Tensor) -> Tensor:
        orders = [drawn, drawn.flip(-1)]
        flat = attention.reshape(-1, 3)
        return sum(step_probabilities(flat, order.reshape(-1, 2)).prod(-1) for order in orders).view(drawn.shape[:-1])

    inner = logs[1][first]  # (M, 2, 3)
    innermost = logs[2][first.unsqueeze(-1), second]  # (M, 2, 2, 3)
    probability = chance(logs[0].exp().expand(len(first), -1), first)
    probability = probability * chance(inner.exp(), second).prod(-1) * chance(innermost.exp(), third).prod(-1).prod(-1)
    assert_close(probability.sum(), torch.ones(()).double())
    features = table[first[..., None, None], second[..., None], third]  # (M, 2, 2, 2)
    levels = [
        of_cells(first, logs[0][first]),
        of_cells(second.flatten(0, 1), inner.gather(-1, second).flatten(0, 1)),
        of_cells(third.flatten(0, 2), innermost.gather(-1, third).flatten(0, 2)),
    ]
    value, variance = estimate_levels(features.flatten(0, 2), levels)
    assert_close(probability @ value, phi)
    torch.testing.assert_close(probability @ variance, probability @ (value - phi).square(), rtol=1e-9, atol=0)


def classifier(n=(3, 2), **options) -> tuple[NestedAttentionSampling, nn.Linear]:
    model = small_model(n, **options)
    torch.manual_seed(1)
    return model, nn.Linear(3, 4).double()


def test_predictions_are_what_the_model_gives_and_leave_it_as_it_is():
    model, head = classifier((2, 3), replace=True, estimator="ordered")
    image = draw_image(3)
    got = ats.predict(model, head, None, image, generator=seeded())
    assert_close(got.logits, head(model(None, image, generator=seeded())[0]).detach())
    assert got.patches_used.tolist() == [6, 6, 6]
    assert got.degrees.tolist() == [1, 1, 1]
    everything = ats.predict(model, head, None, image, n_patches=(3, 3), replace=False)
    assert_close(everything.logits, head(model.full(None, image)).detach())
    assert everything.standard_error.max() < 1e-7
    best = ats.predict(model, head, None, image, selection="topk")
    model.replace, model.selection = False, "topk"
    assert_close(best.logits, head(model(None, image)[0]).detach())
    assert best.standard_error is None
    assert ats.predict(model, head, None, image, n_patches=(2, 1)).standard_error is None
    assert model.drawing().n == (2, 3)


def test_one_level_predicts_as_attention_sampling():
    torch.manual_seed(0)
    attention, feature = nn.Conv2d(3, 1, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 4))
    image, head = bytes_of(2, 64, 48), nn.Linear(4, 3)
    view = ats.area_downsample(image, (8, 6))
    flat = AttentionSampling(attention, feature, 5, 6, receptive_field=0).eval()
    deep = NestedAttentionSampling([Zoom(attention, 8, 5)], feature, 6).eval()
    want, got = (ats.predict(model, head, view, image, generator=seeded(), repeats=2) for model in (flat, deep))
    for name in ("logits", "standard_error", "patches_used"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    columns = "image", "draw", "top", "left", "weight"
    assert [[row[c] for c in columns] for row in got.table()] == [[row[c] for c in columns] for row in want.table()]


def test_standard_errors_are_those_of_draws():
    """The mean of the estimated variances and that of the values, over 4,000 draws, within what chance allows."""
    model, head = classifier((2, 2))
    image = draw_image().expand(4_000, -1, -1, -1)
    got = ats.predict(model, head, None, image, generator=seeded(1))
    spread = got.logits.var(0)
    assert ((got.standard_error.square().mean(0) / spread - 1).abs() < 0.15).all()
    low, high = got.interval()
    exact = head(model.full(None, image[:1]))
    assert ((low < exact) & (exact < high)).double().mean() > 0.9


@pytest.mark.parametrize("criteria", [{"tolerance": 0.05}, {"lead": 1.5}, {"tolerance": 0.0}], ids=str)
def test_anytime_reads_on_until_sure(criteria):
    """What comes out is the estimate of the patches that its table lists, whoever stopped when."""
    zooms = Zoom(nn.Conv2d(1, 1, 4, 4), 4, 3), Zoom(nn.Conv2d(1, 1, 2, 2), 2, 3)  # 24 regions of 16 cells
    torch.manual_seed(0)
    feature = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh())
    model = NestedAttentionSampling(zooms, feature, 6).double().eval()
    nn.init.normal_(model.levels[0].attention.weight, std=2.0)
    image = torch.randn(5, 1, 64, 96, dtype=torch.float64, generator=seeded(2))
    image[1:3] *= 0.1
    head = nn.Linear(3, 4).double()
    mask = torch.rand(5, 4, 6, generator=seeded(3)) < 0.7
    mask[4] = False
    mask[4, 0, :3] = True
    got = ats.anytime(model, head, None, image, budget=48, mask=mask, generator=seeded(4), **criteria)
    regions = got.degrees + 1
    assert got.patches_used.tolist() == (3 * regions).tolist()
    assert regions[4] == 3  # all that it has
    if criteria == {"tolerance": 0.0}:
        assert regions.tolist() == mask.flatten(1).sum(1).clamp(max=16).tolist()
        assert not got.stopped.any()
    elif "tolerance" in criteria:
        assert (got.standard_error[got.stopped] <= 0.05).all()
        assert len(set(regions.tolist())) > 1, "images must stop at different times for this to say something"
    else:
        assert got.stopped.any()
    for number, sample in enumerate(got.samples):
        rows = [row for row in got.table() if row["image"] == number]
        patches = torch.cat([cut_at(image[number], row["top"], row["left"]) for row in rows])
        weights = torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
        assert_close(weights.sum(), torch.ones(()).double())
        assert_close(weights @ head(feature(patches)), got.logits[number])
        value, variance = estimate_levels(head(feature(patches)).detach().unflatten(0, (-1, 3)), sample.levels)
        assert_close(value[0], got.logits[number])
        assert_close(variance[0].sqrt(), got.standard_error[number])
        assert len({(row["region"], row["draw"]) for row in rows}) == len(rows)


def cut_at(image: Tensor, top: int, left: int) -> Tensor:
    return nn.functional.pad(image, [10] * 4)[None, :, top + 10 : top + 16, left + 10 : left + 16]


@pytest.mark.parametrize("classes", [1, 4])
def test_a_lead_that_no_image_has_spends_the_budget(classes):
    model, _ = classifier((3, 2))
    head = nn.Linear(3, classes).double()
    got = ats.anytime(model, head, None, draw_image(2), budget=6, lead=1e9)
    assert got.patches_used.tolist() == [6, 6]
    assert got.stopped.tolist() == [False, False]


def test_mistakes():
    model, head = classifier((2, 2))
    image = draw_image()
    for call, message in [
        (lambda: ats.predict(model, head, None, image, n_patches=6), r"one number a level, of which there are 2"),
        (lambda: ats.predict(model, head, None, image, estimator="ordered"), "ordered estimator .* no standard error"),
        (lambda: ats.predict(model, nn.ReLU(), None, image), "not linear"),
        (lambda: ats.anytime(model, head, None, image, budget=3, lead=2), "less than two regions of 2"),
        (lambda: ats.anytime(small_model((3,)), head, None, image, budget=9, lead=2), "two levels or more"),
        (lambda: ats.anytime(model, head, None, image, budget=9), "tolerance or a lead"),
        (lambda: ats.predict(model.train(), nn.Sequential(head, nn.Dropout()), None, image), "training mode"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    flat = AttentionSampling(nn.Conv2d(1, 1, 1), nn.Flatten(), 2, 2).eval()
    with pytest.raises(TypeError, match=r"only an ats\.nn\.NestedAttentionSampling reads it by itself"):
        ats.predict(flat, head, None, image)
