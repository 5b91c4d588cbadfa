"""Regions or patches: the variance of each level by enumeration, what a plan makes of it, and that it adds no bias."""

import pytest
import torch
from torch import Tensor, nn

import ats
from ats.draw_plan import DrawPlan
from ats.nested_variance import estimate_parts
from ats.nn import AttentionSampling, NestedAttentionSampling, Zoom
from tests.enumeration import enumerate_draws
from tests.helpers import assert_close, seeded
from tests.nested_models import EveryDraw, draw_image, small_model


@pytest.mark.parametrize("options", [{"estimator": "unordered"}, {"replace": True}], ids=str)
def test_the_variance_of_each_level_is_unbiased_over_every_draw(options):
    """Between regions: the variance if what is in them were known. Within: the mean of w² Var(φ̂) over outer draws."""
    model, image = small_model((2, 2), EveryDraw, **options), draw_image()
    with torch.no_grad():
        batch = image.expand(model.prepare(), -1, -1, -1)
        features, levels = model.draw(batch, model.look(None, batch))
        phi = small_model((2, 2)).full(None, image)[0]
    found = estimate_parts(features, levels, estimator=model.estimator)
    probability = model.probability
    assert_close(found.parts.sum(0), found.variance)
    # E[Φ̂ | regions]: the mean over all draws that have the same regions
    regions = levels[0].indices @ torch.tensor([3, 1])
    known = torch.stack([mean_where(regions == one, probability, found.value) for one in regions.unique()])
    share = torch.stack([probability[regions == one].sum() for one in regions.unique()])
    between = share @ (known - phi).square()
    total = probability @ (found.value - phi).square()
    torch.testing.assert_close(probability @ found.parts[0], between, rtol=1e-9, atol=0)
    torch.testing.assert_close(probability @ found.parts[1], total - between, rtol=1e-9, atol=0)


def mean_where(which: Tensor, probability: Tensor, value: Tensor) -> Tensor:
    return probability[which] @ value[which] / probability[which].sum()


def parts_of(*variances: float, images: int = 1) -> Tensor:
    return torch.tensor(variances).view(-1, 1, 1).expand(-1, images, 3)


def test_draws_are_those_of_the_least_variance_for_the_time():
    """σ_0² = 2, σ_1² = 50 and crops that take four patches: m* = √(4 · 25) = 10, in steps of twice at most."""
    plan = DrawPlan(seconds=(4e-3, 1e-3))
    own = 8, 4
    assert plan.inner(own) == (4,)
    assert plan.draws(own) == (8, 4)
    plan.add(parts_of(2 / 8, 50 / 32), (4,), torch.tensor([8]))
    assert plan.variances == pytest.approx((2, 50))
    assert plan.inner(own) == (8,)
    plan.add(parts_of(2 / 8, 50 / 64), (8,), torch.tensor([8]))
    assert plan.inner(own) == (10,)
    assert plan.draws(own) == (4, 10)  # 8 regions took 64 ms, one of ten patches takes 14
    assert plan.draws(own, budget=16) == (4, 4)  # four regions are the least
    assert plan.draws((4, 16)) == (5, 10)
    assert plan.draws(own, budget=320) == (45, 10)

    def variance(n: float, m: float) -> float:
        return 2 / n + 50 / (n * m)

    of_time = {m: variance(64 / (4 + m), m) for m in range(1, 40)}
    assert min(of_time, key=lambda m: of_time[m]) == 10


def test_draws_of_three_levels():
    plan = DrawPlan(seconds=(16.0, 4.0, 1.0), keep=1)
    plan.add(parts_of(9 / 2, 16 / 8, 64 / 32, images=3), (4, 4), torch.tensor([2, 2, 2]))
    assert plan.images == 3
    assert plan.variances == pytest.approx((9, 16, 64))
    assert plan.inner((2, 4, 4)) == (3, 4)  # √(4 · 16/9) = 2.67 and √(4 · 4) = 4
    assert plan.draws((2, 4, 4), budget=64) == (4, 3, 4)  # 4 regions of 96 in all; one now takes 16 + 3 · 8 = 40
    assert DrawPlan(seconds=(1.0, 1.0)).inner((2, 5)) == (5,)


@pytest.mark.parametrize(
    ("parts", "draws"), [((1.0, 0.0), 2), ((0.0, 1.0), 8), ((-1.0, 1.0), 8), ((-1.0, -1.0), 4)], ids=str
)
def test_where_one_level_has_no_variance_the_other_is_read(parts, draws):
    plan = DrawPlan(seconds=(1.0, 1.0))
    plan.add(parts_of(*parts), (4,), torch.tensor([4]))
    assert plan.inner((4, 4)) == (draws,)


class Painted(nn.Module):
    """The mean of a patch, thrice."""

    def forward(self, patches: Tensor) -> Tensor:
        return patches.flatten(1).mean(-1, keepdim=True).expand(-1, 3)


def images_of(count: int, between: float, within: float) -> Tensor:
    """64 regions of 4×4 cells of 2×2 pixels, whose means differ so much, and their cells from them."""
    generator = seeded(3)
    regions = between * torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=generator)
    cells = torch.randn(count, 1, 32, 32, dtype=torch.float64, generator=generator)
    cells = within * (cells - nn.functional.avg_pool2d(cells, 4).repeat_interleave(4, -1).repeat_interleave(4, -2))
    return nn.functional.interpolate(regions, scale_factor=8.0) + nn.functional.interpolate(cells, scale_factor=2.0)


def even_model(n: tuple[int, int] = (8, 4)) -> NestedAttentionSampling:
    """Even attention over regions of 8×8 pixels, and over cells of 2×2 in them."""
    zooms = [Zoom(nn.Conv2d(1, 1, 2, 2), 4, n[0]), Zoom(nn.Conv2d(1, 1, 1), 2, n[1])]
    model = NestedAttentionSampling(zooms, Painted(), 2).double().eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def head(features: Tensor) -> Tensor:
    return features @ torch.diag(torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize(("between", "within", "most", "least"), [(1.0, 0.1, 2, 2), (0.1, 1.0, 12, 8)], ids=str)
def test_anytime_reads_regions_or_patches_whichever_says_more(between, within, most, least):
    model, plan = even_model(), DrawPlan(seconds=(4.0, 1.0))
    images = images_of(12, between, within)
    for some in images.split(3):
        got = ats.anytime(model, head, None, some, budget=32, lead=1e9, plan=plan, generator=seeded(1))
    assert plan.images == 12
    regions, patches = got.samples[0].n
    assert least <= patches <= most
    # A budget is the time of as many patches by the model's own draws: 8 regions of 8 s here.
    assert regions * (4 + patches) <= 64 < (regions + 1) * (4 + patches)
    assert got.patches_used.tolist() == [regions * patches] * 3
    fixed, planned = (
        ats.anytime(model, head, None, images, budget=32, lead=1e9, plan=some, generator=seeded(2))
        for some in (None, plan)
    )
    assert planned.standard_error.square().mean() < 0.9 * fixed.standard_error.square().mean()


def test_a_plan_adds_no_bias():
    """The mean of 200 draws is within 4 standard errors of the model's: a false alarm in 5,000 for three classes."""
    model = even_model((4, 4))
    image = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    image[..., :8, :24] = 4 * torch.rand(8, 24, dtype=torch.float64, generator=seeded(5))
    many, plan = image.expand(200, -1, -1, -1), DrawPlan(seconds=(1.0, 1.0))
    for seed in range(2):
        got = ats.anytime(model, head, None, many, budget=16, lead=1e9, plan=plan, generator=seeded(seed))
    assert plan.images == 400
    assert got.samples[0].n == (6, 2), "the plan must have changed what is drawn"
    z = (got.logits.mean(0) - head(model.full(None, image))[0]) / (got.logits.std(0) / 200**0.5)
    assert (z.abs() < 4).all(), z


def test_a_choice_by_the_image_itself_would_add_some():
    """Four regions of even attention, one of them bright. After two, another is read only where these two differ."""
    values, even = torch.tensor([0.0, 0.0, 0.0, 1.0]).double(), torch.full((4,), 0.25).double()
    draws, probability = enumerate_draws(even, 3)
    log_attention = even.log().expand(len(draws), -1)
    two, three = (ats.estimate(values[draws[:, :n], None], log_attention[:, :n], estimator="unordered") for n in (2, 3))
    assert_close(probability @ two.value, values.mean()[None])
    assert_close(probability @ three.value, values.mean()[None])
    chosen = torch.where(two.variance > 1e-9, three.value, two.value)
    assert_close(probability @ chosen, torch.tensor([1 / 6], dtype=torch.float64))  # of 1/4


def test_a_pilot_draw_makes_a_plan():
    model = even_model()
    images = images_of(24, 0.1, 1.0)
    plan = ats.plan_draws(model, head, None, images, n_patches=(8, 4), seconds=(4.0, 1.0), generator=seeded())
    assert plan.images == 24
    between, within = plan.variances
    assert within > 10 * between
    n = plan.draws(model.drawing().n)
    got = ats.predict(model, head, None, images, n_patches=n, generator=seeded())
    assert got.samples[0].n == n == (5, 8)  # 5 · (4 + 8) s, of 64
    measured = ats.plan_draws(model, head, None, images, generator=seeded())
    assert len(measured.seconds) == 2
    assert min(measured.seconds) > 0


def test_mistakes():
    flat = AttentionSampling(nn.Conv2d(1, 1, 1), nn.Flatten(), 2, 2).eval()
    image = torch.rand(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"plan is for an ats\.nn\.NestedAttentionSampling"):
        ats.anytime(flat, nn.Linear(4, 2), image, image, budget=4, lead=1, plan=DrawPlan())
    with pytest.raises(ValueError, match="seconds are above 0"):
        DrawPlan(seconds=(1.0,))
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        DrawPlan(keep=0)
    with pytest.raises(ValueError, match="the plan is of 3 levels, the model has 2"):
        DrawPlan(seconds=(1.0, 1.0, 1.0)).inner((2, 4))
