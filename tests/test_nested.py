"""`ats.nn.NestedAttentionSampling`: no bias over every draw of two and three levels, and one level is what it was."""

import pytest
import torch
from torch import Tensor, nn

import ats
from ats import nested
from ats.nn import AttentionSampling, NestedAttentionSampling, Zoom
from ats.samples import CellSample
from tests.helpers import assert_close, seeded
from tests.nested_models import EveryDraw, draw_image, small_model, written_out

ORDERED = {"estimator": "ordered"}
UNORDERED = {"estimator": "unordered"}
CENTRED = {"estimator": "unordered", "control_variate": True}
TWO, THREE = (2, 2), (2, 2, 1)
WAYS = [
    (TWO, {"replace": True}),
    (TWO, ORDERED),
    (TWO, UNORDERED),
    (TWO, CENTRED),
    (TWO, {"estimator": "ordered", "control_variate": True}),
    (THREE, ORDERED),
    (THREE, UNORDERED),
    (THREE, CENTRED),
]


def biases(n: tuple[int, ...], **options: object) -> dict[str, float]:
    """Largest bias of Φ̂, of the tree's entropy, and of the gradients, of the length of what is estimated."""
    model = small_model(n, EveryDraw, **options)
    direction = torch.randn(3, dtype=torch.float64, generator=seeded(3))
    image = draw_image().requires_grad_()
    phi, entropy = written_out(model, image)
    targets = dict(model.named_parameters()) | {"image": image}
    exact = torch.autograd.grad(phi @ direction + 0.3 * entropy, list(targets.values()))

    pooled, _, sample = model(None, image.expand(model.prepare(), -1, -1, -1))
    probability = model.probability
    assert_close(probability.sum(), torch.ones(()).double())
    mean, mean_entropy = probability @ pooled, probability @ sample.entropy
    estimated = torch.autograd.grad(mean @ direction + 0.3 * mean_entropy, list(targets.values()))
    found = {"phi": (mean - phi).norm() / phi.norm(), "entropy": (mean_entropy - entropy).abs() / entropy}
    for name, got, want in zip(targets, estimated, exact, strict=True):
        assert want.norm() > 1e-3, f"{name} must have a gradient to compare"
        found[name] = (got - want).norm() / want.norm()
    return {name: float(value.detach()) for name, value in found.items()}


@pytest.mark.parametrize(("n", "options"), WAYS, ids=str)
def test_unbiased_over_every_draw(n, options):
    """Pooled features, entropy and every gradient, to all networks and the image; the reference is loops and slices."""
    assert max(biases(n, **options).values()) < 1e-12


def _differentiated(features: Tensor, sample: CellSample, **_: object) -> Tensor:
    """The estimator's formula, differentiated as it stands."""
    attention = sample.log_attention.exp()
    n = attention.shape[1]
    left = 1 - attention.cumsum(-1) + attention
    weights = (left + (n - 1 - torch.arange(n)) * attention) / n
    return torch.einsum("bn,bn...->b...", weights, features)


def _forgotten(features: Tensor, sample: CellSample, **options: object) -> Tensor:
    """The right value, but what is below gets its gradient unweighted."""
    total = features.sum(1)
    return ats.pool(features.detach(), sample, **options) + total - total.detach()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "seen_in"),
    [(_differentiated, "levels.0.attention.weight"), (_forgotten, "levels.1.attention.weight")],
)
def test_the_enumeration_sees_what_is_wrong(monkeypatch, wrong, seen_in):
    """Weights that are differentiated, and an outer weight that is forgotten: both leave the values as they are."""
    monkeypatch.setattr(nested, "pool", wrong)
    found = biases(TWO)
    assert found["phi"] < 1e-12
    assert found[seen_in] > 0.05


@pytest.mark.parametrize("n", [(2,), TWO, THREE])
def test_full_is_the_model_without_sampling(n):
    model, image = small_model(n), draw_image(3)
    want = torch.stack([written_out(model, one[None])[0] for one in image])
    for chunk_size in (1, 7, 1024):
        assert_close(model.full(None, image, chunk_size=chunk_size), want)


@pytest.mark.parametrize("options", [ORDERED, CENTRED, {"replace": True}, {"selection": "topk"}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_one_level_is_attention_sampling(options, masked):
    """The same draws, patches, values and gradients, on a view whose scale is no whole number."""
    torch.manual_seed(0)
    attention, feature = nn.Conv2d(3, 1, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(3 * 7 * 5, 4))
    image = torch.randint(0, 256, (2, 3, 50, 41), dtype=torch.uint8, generator=seeded())
    view = ats.area_downsample(image, (13, 12))
    mask = torch.rand(2, 13, 12, generator=seeded(1)) < 0.2 if masked else None
    flat = AttentionSampling(attention, feature, 5, (7, 5), mean=0.5, std=0.2, **options)
    deep = NestedAttentionSampling([Zoom(attention, 4, 5)], feature, (7, 5), mean=0.5, std=0.2, **options)
    results = []
    for model in (flat, deep):
        pooled, logits, sample = model(view, image, mask=mask, generator=seeded(7))
        loss = pooled.square().sum() - 0.1 * sample.entropy.sum()
        gradients = torch.autograd.grad(loss, [*attention.parameters(), *feature.parameters()])
        patches = sample.levels[0] if model is deep else sample
        results.append([pooled, logits, sample.entropy, patches.patches, patches.offsets, patches.indices, *gradients])
        results[-1] += [sample.weights(), model.full(view, image, mask=mask)]
    for number, (got, want) in enumerate(zip(*results, strict=True)):
        if number in (3, 4, 5):  # what was drawn and read, bit for bit
            assert torch.equal(got, want)
        else:
            assert_close(got, want)


def test_draws_follow_the_attention():
    """Not the enumeration's, but the module's own draws: their mean comes as near to Φ as their number says."""
    model, image = small_model((2, 2), estimator="unordered"), draw_image()
    pooled, _, _ = model(None, image.expand(4_000, -1, -1, -1), generator=seeded())
    error = (pooled.mean(0) - written_out(model, image)[0]) / (pooled.std(0) / 4_000**0.5)
    assert error.abs().max() < 4.4  # of 3 normal numbers: exceeded once in 30,000 seeds


def test_regions_of_a_batch_go_through_a_network_together():
    model, calls = small_model(THREE), []
    for depth in range(3):
        model.levels[depth].attention.register_forward_hook(lambda _, seen, __: calls.append(len(seen[0])))
    model.feature.register_forward_hook(lambda _, seen, __: calls.append(len(seen[0])))
    model(None, draw_image(5))
    assert calls == [5, 10, 20, 20]


def test_draws_and_ways_may_be_changed_later():
    model, image = small_model(TWO), draw_image(2)
    assert model.n_patches == 4
    model.levels[1].n = 3
    model.estimator = "unordered"
    assert model.n_patches == 6
    assert model(None, image)[2].n == (2, 3)
    model.levels[0].n = model.levels[1].n = 3  # everything is drawn
    assert_close(model(None, image)[0], model.full(None, image))
    with pytest.raises(ValueError, match="unordered"):
        model.replace = True
    with pytest.raises(AttributeError, match="n_patches"):
        model.n_patchs = 3
