"""The options of `ats.nn`'s modules: passed on, changed, checked, printed, and refused by their names."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import ats
from tests.helpers import assert_close, seeded
from tests.small_models import FromView, make_images, make_model


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return make_images()


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


def test_options_changed_for_evaluation(images):
    model = make_model()
    model.n_patches, model.selection = 7, "topk"
    _, logits, sample = model(*images)
    assert torch.equal(sample.indices, logits.flatten(1).topk(7).indices)


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


def test_patch_size_is_checked_when_the_module_is_made():
    with pytest.raises(ValueError, match="patch_size must be at least 1, got 0"):
        ats.nn.SamplePatches(3, 0)


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


def test_options_are_checked_when_a_module_is_made() -> None:
    for options in ({"selection": "best"}, {"padding": "reflect"}, {"n_patches": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ats.nn.SamplePatches(**({"n_patches": 2, "patch_size": 4} | options))


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
