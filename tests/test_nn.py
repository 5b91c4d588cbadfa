"""`ats.nn`: the modules do what the functions do, and the sampled model estimates the full one."""

import pytest
import torch
from torch import Tensor, nn

import ats
from tests.helpers import assert_close, seeded
from tests.small_models import make_images, make_model, slow_full


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return make_images()


def test_forward_is_its_parts(images):
    """Attention on the view, patches from the image, features of each patch, the estimate of section 3."""
    view, image = images
    model = make_model(padded=False, receptive_field="auto", padding="edge", mean=0.1, std=0.5)
    pooled, logits, sample = model(view, image, generator=seeded())
    assert torch.equal(logits, model.attention(view))
    expected = ats.sample_patches(
        image, logits, 4, 5, receptive_field=4, view_size=(8, 10), padding="edge", mean=0.1, std=0.5, generator=seeded()
    )
    assert torch.equal(sample.indices, expected.indices)
    assert torch.equal(sample.offsets, expected.offsets)
    assert torch.equal(sample.patches, expected.patches)
    features = torch.stack([model.feature(patches) for patches in sample.patches])
    weights = ats.estimator_weights(sample.log_attention)
    assert_close(pooled, (weights.unsqueeze(-1) * features).sum(1))


@pytest.mark.parametrize("estimator", ["ordered", "unordered"])
@pytest.mark.parametrize("control_variate", [False, True])
def test_estimator_and_control_variate_reach_the_gradient(estimator, control_variate, images):
    """The weights in the pooled features, the baseline in the attention network's gradient."""
    options = {"estimator": estimator, "control_variate": control_variate}
    model = make_model(**options)
    pooled, _, sample = model(*images, generator=seeded())
    features = torch.stack([model.feature(patches) for patches in sample.patches])
    expected = ats.nn.Expectation(**options)(features, sample.log_attention)
    weights = ats.estimator_weights(sample.log_attention, estimator=estimator)
    assert torch.equal(pooled, expected)
    assert_close(pooled, (weights.unsqueeze(-1) * features).sum(1))
    parameter = model.attention[-1].weight
    got, want, other = (
        torch.autograd.grad(value.square().sum(), parameter, retain_graph=True)[0]
        for value in (
            pooled,
            ats.expectation(features, sample.log_attention, **options),
            ats.expectation(features, sample.log_attention, **options | {"control_variate": not control_variate}),
        )
    )
    assert_close(got, want)
    assert not torch.allclose(got, other)


def test_with_replacement_the_pool_knows(images):
    """Sampling with replacement and pooling without would be biased."""
    model = make_model(n_patches=9, replace=True)
    pooled, _, sample = model(*images, generator=seeded())
    features = torch.stack([model.feature(patches) for patches in sample.patches])
    assert_close(pooled, features.mean(1))


MODELS = {
    "same": ({}, 0),
    "auto": ({"padded": False, "receptive_field": "auto"}, 4),
    "masked": ({"masked": True, "receptive_field": "auto"}, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_full_is_a_loop_over_all_cells(name, images):
    """Value and gradient of Φ to every parameter, in chunks of any size; masked cells count for nothing."""
    options, lost = MODELS[name]
    model = make_model(**options)
    parameters = list(model.parameters())
    direction = torch.randn(2, 3, dtype=torch.float64, generator=seeded(9))
    expected = slow_full(model, *images, lost=lost)
    gradients = torch.autograd.grad((expected * direction).sum(), parameters)
    assert all(gradients[i].abs().max() > 1e-6 for i in (0, 2, 4, 6)), "the problem must put every weight to work"
    for chunk_size in (1, 14, 10_000):
        full = model.full(*images, chunk_size=chunk_size)
        assert_close(full, expected)
        for got, want in zip(torch.autograd.grad((full * direction).sum(), parameters), gradients, strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_sampled_forwards_average_to_full(name, replace, images):
    """Mean of 4,000 forwards within 5 standard errors of Φ in each of 6 numbers: false alarms 4e-6 a case."""
    model = make_model(n_patches=3, replace=replace, **MODELS[name][0])
    view, image = images
    with torch.no_grad():
        full = model.full(view, image)
        for b in range(2):
            many = 4000
            pooled, _, _ = model(
                view[b].expand(many, -1, -1, -1), image[b].expand(many, -1, -1, -1), generator=seeded(b)
            )
            standard_error = pooled.std(0) / many**0.5
            assert (standard_error < 0.02).all()
            assert ((pooled.mean(0) - full[b]).abs() < 5 * standard_error).all()


def test_features_of_any_shape(images):
    """Feature maps (M, D, h, w) are pooled as they are, sampled and in full."""
    model = make_model(n_patches=80)
    model.feature = nn.Conv2d(1, 2, 2).double()
    pooled, _, sample = model(*images, generator=seeded())
    features = torch.stack([model.feature(patches) for patches in sample.patches])
    weights = ats.estimator_weights(sample.log_attention)
    assert_close(pooled, torch.einsum("bn,bndhw->bdhw", weights, features))
    attention = sample.log_attention.exp()  # every cell was drawn
    assert_close(model.full(*images), torch.einsum("bn,bndhw->bdhw", attention, features))


def test_state_is_that_of_the_two_networks():
    """Options are no buffers: a checkpoint holds the attention's and the feature network's weights only."""
    names = make_model().state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"attention", "feature"}
    assert len(names) == 8


def test_views_that_do_not_fit_the_image(images):
    view, image = images
    with pytest.raises(ValueError, match="image has batch size 2 but logits have 1"):
        make_model()(view[:1], image)
    with pytest.raises(ValueError, match=r"view_size \(8, 10\) is larger than the image, \(5, 30\)"):
        make_model()(view, image[:, :, :5])


def test_swapped_view_and_image_are_found_before_a_network_runs(images):
    """The attention network would run on the image first: slow where it fits, or an error from deep within torch."""
    view, image = images

    def refuse(*_):
        raise AssertionError("the attention network ran")

    model = make_model()
    model.attention.register_forward_pre_hook(refuse)
    for call in (model, model.full):
        with pytest.raises(ValueError, match=r"view_size \(24, 30\) is larger than the image, \(8, 10\).*swapped"):
            call(image, view)
        with pytest.raises(ValueError, match="channels seem to come last"):
            call(view, torch.zeros(2, 240, 300, 3))


def test_a_rest_of_the_view_that_the_grid_does_not_cover_moves_no_cell() -> None:
    """Pooling floors the rest away: cell i still sees view pixels 8i to 8i + 10, so its centre is 8i + 5."""
    attention = nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(8))
    model = ats.nn.AttentionSampling(attention, nn.Flatten(), 36, 10, receptive_field="auto")
    for height, width in ((57, 58), (50, 52), (53, 57)):
        _, logits, sample = model(torch.rand(1, 1, height, width), torch.rand(1, 1, 10 * height, 10 * width))
        cells = torch.cartesian_prod(*(torch.arange(n) for n in logits.shape[-2:]))
        assert torch.equal(sample.offsets[0], cells[sample.indices[0]] * 80 + 45)  # (8i + 5)·10 less half a patch


def test_masked_cells_are_neither_drawn_nor_counted(images) -> None:
    """In forward and full; an image with fewer live cells than patches gives Φ of these, and its gradient."""
    view, image = images
    model = make_model(n_patches=6)
    mask = torch.zeros(2, 8, 10, dtype=torch.bool)
    mask[0, 2:5, 3:7], mask[1, 4, 4:8] = True, True
    pooled, logits, sample = model(view, image, mask=mask, generator=seeded())
    assert torch.equal(logits.squeeze(1).isneginf(), ~mask)
    assert sample.counts.tolist() == [6, 4]
    assert mask.flatten(1)[0, sample.indices[0]].all()
    full = model.full(view, image, mask=mask, chunk_size=30)
    assert_close(pooled[1], full[1])
    assert not torch.allclose(pooled[0], full[0])
    got, want = (torch.autograd.grad(value[1].sum(), list(model.parameters())) for value in (pooled, full))
    for left, right in zip(got, want, strict=True):
        assert_close(left, right)
    masked_by_hand = slow_full(make_model(), view, image)  # of all cells
    assert not torch.allclose(full, masked_by_hand)
    assert_close(model.full(view, image, mask=torch.ones(8, 10, dtype=torch.bool)), masked_by_hand)


class Live(ats.nn.AttentionSampling):
    """Has nothing to read at masked cells, and counts the cells of an image that it was asked for."""

    def __init__(self, mask: Tensor) -> None:
        model = make_model()
        super().__init__(model.attention, model.feature, 4, 5)
        self.mask, self.count = mask.flatten(1), 0

    def read_cells(self, image, indices, grid_size, view_size):
        assert self.mask.gather(1, indices).all()
        self.count += indices.shape[1]
        return super().read_cells(image, indices, grid_size, view_size)


def test_the_full_model_reads_no_masked_cell(images) -> None:
    """Where an image's own cell is masked, one that lives takes its place; where it is masked in all, nothing does."""
    mask = torch.zeros(2, 8, 10, dtype=torch.bool)
    mask[0, 2:5, 3:7], mask[1, 4:6, 4:8] = True, True
    model = Live(mask)
    full = model.full(*images, mask=mask, chunk_size=10)
    assert model.count == 12 + 8 - 3  # cells that live in either image
    assert_close(full, make_model().full(*images, mask=mask))
    model.eval()
    for run in (
        lambda: model(*images, mask=mask)[0],
        lambda: ats.predict(model, nn.Linear(3, 2).double(), *images, mask=mask, n_patches=15).logits,
        lambda: ats.anytime(model, nn.Linear(3, 2).double(), *images, mask=mask, budget=20, tolerance=0.0).logits,
    ):
        assert run().isfinite().all()


def test_an_image_whose_cells_are_all_masked_has_no_full_model(images) -> None:
    mask = torch.ones(2, 8, 10, dtype=torch.bool)
    mask[1] = False
    model = make_model().eval()
    for run in (model, model.full):
        with pytest.raises(ValueError, match="row 1 are all −inf: every cell is masked"):
            run(*images, mask=mask)
    with pytest.raises(ValueError, match="row 1 are all −inf: every cell is masked"):
        ats.heatmap(torch.zeros(2, 8, 10), (24, 30), mask=mask)
