"""`ats.nn`: the modules do what the functions do, and the sampled model estimates the full one."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ats
from ats.models.classifier import PlacedFeatures
from tests.helpers import assert_close, cut, seeded


class UnitNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class Masked(nn.Module):
    """Attention that is −inf where the view is darker than −1."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, view: Tensor) -> Tensor:
        return self.attention(view).masked_fill(view < -1, float("-inf"))


def make_model(n_patches=4, patch_size=5, *, padded=True, masked=False, **options) -> ats.nn.AttentionSampling:
    """A model in float64 for images 24×30 with a view of 8×10; logits are 8×10, or 4×6 where not padded."""
    torch.manual_seed(0)
    padding = int(padded)
    attention = nn.Sequential(nn.Conv2d(1, 3, 3, padding=padding), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=padding))
    feature = nn.Sequential(nn.Flatten(), nn.Linear(patch_size**2, 6), nn.Tanh(), nn.Linear(6, 3), UnitNorm())
    with torch.no_grad():
        attention[-1].weight.mul_(8)  # an attention far from flat
    network = Masked(attention) if masked else attention
    return ats.nn.AttentionSampling(network, feature, n_patches, patch_size, **options).double()


@pytest.fixture
def images():
    image = torch.randn(2, 1, 24, 30, dtype=torch.float64, generator=seeded(3))
    return image[:, :, ::3, ::3].contiguous(), image  # view, image


def slow_full(model, view, image, *, lost=0):
    """Φ cell by cell: the formula for where a cell lies, a slice there, its feature times its attention."""
    logits = model.attention(view)[:, 0]
    gh, gw = logits.shape[1:]
    attention = logits.flatten(1).softmax(-1)
    size = model.sampler.patch_size
    total = 0
    for cell in range(gh * gw):
        y, x = (
            ats.cell_offsets(torch.tensor(cell), (gh, gw), (24, 30), size, view_size=(8, 10), receptive_field=lost)
        ).tolist()
        patches = torch.stack([cut(one, y, x, size) for one in image])
        total = total + attention[:, cell, None] * model.feature(patches)
    return total


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


def test_modules_pass_their_options_on(images):
    """An option forgotten on the way would silently be the default."""
    _, image = images
    options = {"padding": "edge", "mean": 0.3, "std": 2.0, "dtype": torch.float32}
    logits = torch.randn(2, 8, 10, generator=seeded(4))
    for method, replace in (("topk", False), ("sample", True)):
        module = ats.nn.SamplePatches(6, (9, 4), selection=method, replace=replace, **options)
        got = module(image, logits, generator=seeded())
        want = ats.sample_patches(
            image, logits, 6, (9, 4), selection=method, replace=replace, generator=seeded(), **options
        )
        assert torch.equal(got.patches, want.patches)
        assert torch.equal(got.indices, want.indices)
    lossy = ats.nn.SamplePatches(6, 4, receptive_field=2)(image, logits, view_size=(12, 15), generator=seeded())
    want = ats.sample_patches(image, logits, 6, 4, receptive_field=2, view_size=(12, 15), generator=seeded())
    assert torch.equal(lossy.offsets, want.offsets)
    for replace in (False, True):
        pool = ats.nn.Expectation(replace=replace)
        pooled = pool(got.patches, got.log_attention)
        assert torch.equal(pooled, ats.expectation(got.patches, got.log_attention, replace=replace))


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


def test_options_changed_for_evaluation(images):
    model = make_model()
    model.n_patches, model.selection = 7, "topk"
    _, logits, sample = model(*images)
    assert torch.equal(sample.indices, logits.flatten(1).topk(7).indices)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"receptive_field": "full"}, ValueError, "must be an int, 'auto' or an ats.Placement, got 'full'"),
        ({"n_patches": 0}, ValueError, "n(_patches)? must be at least 1, got 0"),
        ({"n_patches": 81}, ValueError, "n=81 .* K=80"),
        ({"selection": "best"}, ValueError, "unknown selection 'best'"),
        ({"estimator": "best"}, ValueError, "unknown estimator 'best'"),
        ({"estimator": "unordered", "replace": True}, ValueError, "without replacement, got replace=True"),
        ({"padding": "mirror"}, ValueError, "unknown padding 'mirror'"),
        ({"mean": [0.1, 0.2]}, ValueError, "mean has 2 values but the image has 1 channels"),
        ({"receptive_field": 8}, ValueError, r"receptive_field=8 leaves nothing of a view of \(8, 10\)"),
    ],
)
def test_errors(options, error, message, images):
    """Raised when the model is built or, at the latest, when it is first used."""
    with pytest.raises(error, match=message):
        make_model(**options)(*images)


def test_features_that_take_no_positions_are_refused_when_the_module_is_made():
    feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(
        TypeError, match=r"feature\(patches, positions\), which Sequential does not take; .*PlacedFeatures"
    ):
        ats.nn.AttentionSampling(FromView(), feature, 3, 4, positions=True)
    placed = PlacedFeatures(feature, 3)
    model = ats.nn.AttentionSampling(FromView(), placed, 3, 4, positions=True)
    pooled, _, _ = model(torch.rand(2, 5, 6), torch.rand(2, 1, 20, 24))
    assert pooled.shape == (2, 3)


def test_patch_size_is_checked_when_the_module_is_made():
    with pytest.raises(ValueError, match="patch_size must be at least 1, got 0"):
        ats.nn.SamplePatches(3, 0)


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


def test_representation():
    """What is set stands in a printed model, and only that."""
    plain = ats.nn.SamplePatches(3, (4, 5))
    assert plain.extra_repr() == "n_patches=3, patch_size=(4, 5), replace=False, selection='sample'"
    full = ats.nn.SamplePatches(
        3,
        4,
        replace=True,
        receptive_field=2,
        padding="edge",
        mean=0.5,
        std=torch.tensor([0.5, 2.0]),
        dtype=torch.float16,
    )
    assert full.extra_repr() == (
        "n_patches=3, patch_size=(4, 4), replace=True, selection='sample', receptive_field=2, padding='edge', "
        "mean=0.5, std=[0.5, 2.0], dtype=torch.float16"
    )
    full.n_patches, full.padding = 7, "zeros"
    assert "n_patches=7" in repr(full)
    assert "padding" not in repr(full)


def test_a_rest_of_the_view_that_the_grid_does_not_cover_moves_no_cell() -> None:
    """Pooling floors the rest away: cell i still sees view pixels 8i to 8i + 10, so its centre is 8i + 5."""
    attention = nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(8))
    model = ats.nn.AttentionSampling(attention, nn.Flatten(), 36, 10, receptive_field="auto")
    for height, width in ((57, 58), (50, 52), (53, 57)):
        _, logits, sample = model(torch.rand(1, 1, height, width), torch.rand(1, 1, 10 * height, 10 * width))
        cells = torch.cartesian_prod(*(torch.arange(n) for n in logits.shape[-2:]))
        assert torch.equal(sample.offsets[0], cells[sample.indices[0]] * 80 + 45)  # (8i + 5)·10 less half a patch


def test_options_are_checked_when_a_module_is_made() -> None:
    for options in ({"selection": "best"}, {"padding": "reflect"}, {"n_patches": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ats.nn.SamplePatches(**({"n_patches": 2, "patch_size": 4} | options))


class Placed(nn.Module):
    """Features of a patch's mean colour and, where it is told, of where the patch lies."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8), UnitNorm())
        self.told = told
        self.calls: list[Tensor] = []

    def forward(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        assert (positions is not None) == self.told
        if positions is None:
            positions = torch.zeros(len(patches), 2, dtype=patches.dtype)
        self.calls.append(positions)
        return self.layers(torch.cat([patches.mean((1, 2, 3)).unsqueeze(-1), positions], dim=-1))


class FromView(nn.Module):
    def forward(self, view: Tensor) -> Tensor:
        return 5 * view


def test_features_are_told_where_their_patches_lie(images):
    """(y, x) of the patches' centres, for drawn cells and for all of them, in their order."""
    view, image = images
    model = ats.nn.AttentionSampling(FromView(), Placed(told=True).double(), 4, (5, 7), positions=True)
    _, _, sample = model(view, image, generator=seeded())
    centres = sample.offsets + torch.tensor([2.5, 3.5])
    assert torch.equal(model.feature.calls[0].view(2, 4, 2), (centres / torch.tensor([24.0, 30.0])).double())
    model.full(view, image)
    every = model.feature.calls[1].view(2, 8, 10, 2)
    assert (every[0, 1:, :, 0] > every[0, :-1, :, 0]).all()
    assert (every[0, :, 1:, 1] > every[0, :, :-1, 1]).all()


@pytest.mark.parametrize("told", [True, False])
def test_a_class_that_is_a_place_is_learned_only_by_features_that_know_it(told: bool) -> None:
    """Each image has one bright cell; the class is the quarter that it lies in, which no patch shows."""
    torch.manual_seed(0)
    cells = torch.randint(64, (512,), generator=seeded())
    label = 2 * (cells // 8 >= 4) + (cells % 8 >= 4)
    view = nn.functional.one_hot(cells, 64).view(-1, 1, 8, 8).float()
    image = view.repeat_interleave(4, 2).repeat_interleave(4, 3)
    model, head = ats.nn.AttentionSampling(FromView(), Placed(told), 3, 4, positions=told), nn.Linear(8, 4)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=0.02)
    for step in range(150):
        chosen = torch.randint(384, (64,), generator=seeded(step))
        pooled, _, _ = model(view[chosen], image[chosen], generator=seeded(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(8 * pooled), label[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        error = (head(8 * model.full(view[384:], image[384:])).argmax(-1) != label[384:]).float().mean()
    assert error < 0.1 if told else error > 0.5


class FromElsewhere(ats.nn.AttentionSampling):
    """Reads cells that are twice as bright, and counts them."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.cells_read = 0

    def read_cells(self, image, indices, grid_size, view_size):
        self.cells_read += indices.numel()
        patches, offsets = super().read_cells(image, indices, grid_size, view_size)
        return 2 * patches, offsets


def test_all_reading_goes_through_one_method(images):
    """forward, draw, full, predict and anytime: patches of an overridden read_cells, in each of them."""
    view, image = images
    ours, plain = (
        kind(FromView(), nn.Flatten(), 4, 2).double().eval() for kind in (FromElsewhere, ats.nn.AttentionSampling)
    )
    head = nn.Linear(4, 2, bias=False).double()
    inputs = (ours, head, view, image), (plain, head, view, image)
    logits, size = ours.attention_logits(view, image), (8, 10)
    reads = []
    for run in (
        lambda model, *_: model(view, image, generator=seeded())[0],
        lambda model, *_: model.draw(image, logits, size, generator=seeded())[0],
        lambda model, *_: model.full(view, image),
        lambda *given: ats.predict(*given, generator=seeded()).logits,
        lambda *given: ats.anytime(*given, budget=12, tolerance=0.0, generator=seeded()).logits,
    ):
        before = ours.cells_read
        assert_close(run(*inputs[0]), 2 * run(*inputs[1]))
        reads.append(ours.cells_read - before)
    assert reads == [8, 8, 160, 8, 24]


def test_options_are_properties_that_are_checked() -> None:
    model = make_model()
    assert (model.n_patches, model.selection, model.replace, model.estimator) == (4, "sample", False, "ordered")
    model.n_patches, model.estimator = 7, "unordered"
    assert (model.sampler.n_patches, model.sampler.selection) == (7, "sample")
    for name, value, error, message in (
        ("n_patches", 0, ValueError, "n_patches must be at least 1, got 0"),
        ("selection", "best", ValueError, "unknown selection 'best', expected one of 'sample', 'topk'"),
        ("estimator", "best", ValueError, "unknown estimator 'best'"),
        ("replace", True, ValueError, "without replacement, got replace=True"),  # it is unordered
        ("replace", 1, TypeError, "replace must be True or False, got 1"),
    ):
        with pytest.raises(error, match=message):
            setattr(model, name, value)
    model.estimator, model.selection = "ordered", "topk"
    with pytest.raises(ValueError, match="cannot be combined with replace=True"):
        model.replace = True
    model.selection, model.replace = "sample", True
    with pytest.raises(ValueError, match="cannot be combined with replace=True"):
        model.sampler.selection = "topk"
    with pytest.raises(ValueError, match="without replacement"):
        model.estimator = "unordered"
    with pytest.raises(ValueError, match="unknown padding 'mirror'"):
        model.sampler.padding = "mirror"
    model.sampler.patch_size = 9
    assert model.sampler.patch_size == (9, 9)
    assert (model.n_patches, model.selection, model.replace, model.estimator) == (7, "sample", True, "ordered")


def test_a_name_that_means_nothing_cannot_be_assigned(images) -> None:
    model = make_model()
    for module, name, hint in (
        (model, "n_patch", "did you mean n_patches"),
        (model, "estimater", "did you mean estimator"),
        (model.sampler, "foo", "in the __init__ of a subclass"),
        (ats.nn.SamplePatches(3, 4), "patchsize", "did you mean patch_size"),
        (ats.nn.Expectation(), "method", "__init__ of a subclass"),
        (model, "featur", "did you mean feature"),
    ):
        value = nn.Identity() if name == "featur" else 5
        with pytest.raises(AttributeError, match=rf"{type(module).__name__} has no attribute '{name}'.*{hint}"):
            setattr(module, name, value)
    model.feature, model.training, model._note = nn.Flatten(), False, "private"
    other = FromElsewhere(FromView(), nn.Flatten(), 4, 2)  # which has a name of its own
    other.cells_read = 3
    with pytest.raises(AttributeError, match=r"no attribute 'cell_read'.*did you mean cells_read"):
        other.cell_read = 3
    again = copy.deepcopy(make_model(estimator="unordered"))
    with pytest.raises(AttributeError):
        again.n_patch = 5
    again.load_state_dict(make_model().state_dict())
    assert again.estimator == "unordered"
    assert pickle.loads(pickle.dumps(ats.nn.SamplePatches(3, 4))).n_patches == 3
    compiled = torch.compile(make_model().eval(), backend="eager")
    assert compiled(*images)[0].shape == (2, 3)


def test_the_old_name_of_selection(images) -> None:
    """As an option and as an attribute."""
    for make in (lambda **o: ats.nn.SamplePatches(3, 4, **o), lambda **o: make_model(**o).sampler):
        with pytest.warns(DeprecationWarning, match="method= is now selection="):
            old = make(method="topk")
        assert old.selection == "topk"
        with pytest.raises(TypeError, match="got both selection= and method="):
            make(method="topk", selection="topk")
        with pytest.warns(DeprecationWarning, match=r"\.method is now \.selection") as caught:
            old.method = "sample"
        assert [warning.filename for warning in caught] == [__file__]
        assert old.selection == "sample"
        with pytest.warns(DeprecationWarning, match="the old name will go"):
            assert old.method == "sample"


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


class Trained(nn.Module):
    """What looks at its own mode, as layers outside of torch do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if self.training else 1)


DIFFERENT = {
    "BatchNorm1d": nn.BatchNorm1d(3),
    "Dropout": nn.Dropout(0.1),
    "AlphaDropout": nn.AlphaDropout(0.1),
    "RReLU": nn.RReLU(),
    "InstanceNorm1d": nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()
    ),
    "Trained": Trained(),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_reading_all_cells_is_refused_while_a_layer_is_training(name, images) -> None:
    """One layer is enough, wherever it is; its statistics stay, and the error says which it is."""
    layer = copy.deepcopy(DIFFERENT[name])
    model = make_model()
    model.feature = nn.Sequential(model.feature, nn.Sequential(layer)).double()
    model.eval()
    full = model.full(*images, chunk_size=7)
    assert_close(full, model.full(*images))
    layer.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    where = rf"sampling\.feature\.1\.0(\.1)? \({name}\) is in training mode.*model\.eval\(\)"
    for run in (lambda: model.full(*images), lambda: ats.predict(model, nn.Linear(3, 2).double(), *images)):
        with pytest.raises(ValueError, match=where):
            run()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_that_are_the_same_in_training_may_be(images) -> None:
    model = make_model()
    model.feature = nn.Sequential(
        model.feature, nn.Dropout(0.0), nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1), nn.Flatten()
    )
    assert model.training
    got = model.full(*images)
    assert_close(got, model.eval().full(*images))
    model.feature = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(25, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=r"keeps no running statistics.*track_running_stats=True"):
        model.full(*images)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, images) -> None:
    """torch's own generator is wound back for the second pass; one that is passed is not, and is refused there."""
    view, image = images
    model = make_model()

    def gradient(step) -> list[Tensor]:
        torch.manual_seed(3)
        torch.rand(())  # a state that no fresh process begins with
        start = view.clone().requires_grad_()
        model.zero_grad()
        pooled = step(start)
        torch.rand(5)  # and that has moved on before the backward pass
        pooled.square().sum().backward()
        return [start.grad, *(value.grad.clone() for value in model.parameters())]

    def recomputed(start: Tensor) -> Tensor:
        return checkpoint(lambda v: model(v, image)[0], start, use_reentrant=reentrant)

    for got, want in zip(gradient(recomputed), gradient(lambda start: model(start, image)[0]), strict=True):
        assert_close(got, want)

    generator = seeded()
    start = view.clone().requires_grad_()
    pooled = checkpoint(lambda v: model(v, image, generator=generator)[0], start, use_reentrant=reentrant)
    with pytest.raises(
        ValueError, match=r"a draw with a generator of its own was run again in the backward pass.*checkpointing"
    ):
        pooled.sum().backward()
