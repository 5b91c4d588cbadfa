"""Where the cells of public architectures lie: the arithmetic by hand, gradients, and an impulse in the image."""

import copy
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import ats
from ats.models import colon_cancer, megapixel_mnist, speed_limits
from tests.architectures import NETWORKS, Same, UNetDecoder, attention_network, averaging, convnext
from tests.helpers import seeded


@pytest.mark.parametrize("name", NETWORKS)
def test_placement_is_that_of_the_arithmetic(name):
    network, placement = attention_network(name)
    assert ats.measure_placement(network) == placement


def sides(placement, axis, name):
    """A view that is no multiple of the steps, where the network takes that, long along an axis and narrow across."""
    view = [2 * int(step) + 11 for step in placement.step]
    view[axis] = 14 * int(placement.step[axis]) + 53
    return tuple(side // 8 * 8 for side in view) if name == "U-Net decoder" else tuple(view)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_centred_where_the_placement_says(name, axis):
    """The centroid of what pulls at a cell in the middle is its centre, over a period where cells take turns."""
    network, placement = attention_network(name)
    view = torch.full((1, 3, *sides(placement, axis, name)), 0.5, dtype=torch.float64, requires_grad=True)
    logits = averaging(network)(view)[0, 0].movedim(axis, 0)
    period = 4 if name == "U-Net decoder" else 1
    middle = len(logits) // 2 // period * period
    centroids = []
    for cell in range(middle, middle + period):
        (pull,) = torch.autograd.grad(logits[cell].sum(), view, retain_graph=True)
        weight = pull[0].sum(0).sum(1 - axis)
        assert weight[0] == weight[-1] == 0, "the cell must not reach the border"
        centroids.append(float((weight * (torch.arange(len(weight)) + 0.5)).sum() / weight.sum()))
    expected = placement.origin[axis] + (middle + Fraction(period, 2)) * placement.step[axis]
    assert sum(centroids) / period == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "U-Net decoder"])  # its cells take turns
def test_an_impulse_in_the_image_answers_in_its_cell(name, axis):
    """A bright patch where the sampler reads cell i, shrunk to the view: logits answer in cell i, as far to each side.

    As control, the same with receptive_field=0, which must answer elsewhere where it is off by a quarter of a cell.
    """
    network, placement = attention_network(name)
    network, view = averaging(network), sides(placement, axis, name)
    scale, patch = 4, (8, 8)
    size = (scale * view[0], scale * view[1])
    with torch.no_grad():
        quiet = network(torch.zeros(1, 3, *view, dtype=torch.float64))
    grid = tuple(quiet.shape[-2:])
    middle = grid[axis] // 2
    cell = torch.tensor([middle, 0] if axis == 0 else [0, middle]) @ torch.tensor([grid[1], 1])

    def answer(receptive_field):
        top_left = ats.cell_offsets(cell, grid, size, patch, view_size=view, receptive_field=receptive_field)
        start = int(top_left[axis])
        image = torch.zeros(1, 3, *size, dtype=torch.float64)
        image.movedim(2 + axis, 0)[start : start + patch[axis]] = 1  # a bar: as bright across the whole image
        with torch.no_grad():
            response = (network(ats.area_downsample(image, view)) - quiet)[0, 0].sum(1 - axis)
        return float((response * torch.arange(len(response))).sum() / response.sum())

    assert answer(placement) == pytest.approx(middle, abs=1e-9)
    spread = (middle + Fraction(1, 2)) * (Fraction(view[axis], grid[axis]) - placement.step[axis])
    off = float(abs(spread - placement.origin[axis]) / placement.step[axis])  # cells
    if off > 1 / 4:
        assert abs(answer(0) - middle) > off / 5


def test_padding_by_the_views_size_is_refused_or_measured_at_a_size():
    """'Same' by TensorFlow: of 3×3 at stride 2, even sides pad (0, 1) and odd ones (1, 1)."""
    network = nn.Sequential(Same(1, 2, 3, 2), nn.ReLU(), Same(2, 1, 5, 2))
    with pytest.raises(
        ValueError, match=r"depends on the view's size.*measure_placement\(network, view_size=\(h, w\)\)"
    ):
        ats.measure_placement(network)

    def start(pixels, kernel):
        """Pixels that the first window begins before the first one."""
        return max(0, (math.ceil(pixels / 2) - 1) * 2 + kernel - pixels) // 2

    for view in ((64, 64), (66, 64), (65, 67)):
        placement = ats.measure_placement(network, view_size=view)
        assert placement.view_size == view
        assert placement.step == (4, 4)
        first = [2 * (2.5 - start(math.ceil(side / 2), 5)) + 0.5 - start(side, 3) for side in view]
        assert [origin + 2 for origin in placement.origin] == first
    logits, image = torch.zeros(1, 17, 17), torch.zeros(1, 1, 300, 300)
    with pytest.raises(ValueError, match=r"measured for views of \(65, 67\) but the view is \(65, 65\)"):
        ats.sample_patches(image, logits, 2, 4, receptive_field=placement, view_size=(65, 65))
    fixed = ats.measure_placement(nn.Conv2d(1, 1, 3, 2, 1), view_size=(64, 64))
    assert fixed == ats.Placement(Fraction(-1, 2), 2), "where the size makes no difference it is not recorded"


def test_auto_follows_the_advice():
    """What the error of "auto" says to do works."""
    network, feature = Same(1, 1, 3, 2), nn.Flatten()
    with pytest.raises(ValueError, match="measure_placement"):
        ats.nn.AttentionSampling(network, feature, 2, 4, receptive_field="auto")
    placement = ats.measure_placement(network, view_size=(32, 48))
    model = ats.nn.AttentionSampling(network, feature, 2, 4, receptive_field=placement)
    assert model(torch.rand(1, 1, 32, 48), torch.rand(1, 1, 320, 480))[0].shape == (1, 16)


def test_one_number_stays_where_it_describes_the_network_and_names_the_placement_where_not():
    assert ats.receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(8))) == 2
    for name in ("ResNet stage 2", "causal along x", "axes that differ"):
        with pytest.raises(ValueError, match=r"ats\.measure_placement"):
            ats.receptive_field(attention_network(name)[0])


EXPERIMENTS = {
    "megapixel-mnist": (megapixel_mnist, (1500, 1500), 0.12),
    "colon-cancer": (colon_cancer, (500, 500), 0.2),
    "speed-limits": (speed_limits, (960, 1280), 0.3),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_experiments_patches_lie_where_they_did(experiment):
    """One number rf spread the cells over what is left of the view; the measured placement gives equal offsets."""
    package, image, scale = EXPERIMENTS[experiment]
    for networks in package.NETWORKS.values():
        model = ats.nn.AttentionSampling(networks.attention(), nn.Flatten(), 5, 50, receptive_field="auto")
        lost, stride = networks.lost, networks.stride
        assert model.sampler.receptive_field == ats.Placement(Fraction(lost, 2), stride)
        view = networks.view_size(image, scale)
        grid = (view[0] - lost) // stride, (view[1] - lost) // stride
        cells = torch.arange(grid[0] * grid[1])
        options = {"view_size": view, "receptive_field": model.sampler.receptive_field}
        offsets = ats.cell_offsets(cells, grid, image, (50, 27), **options).view(*grid, 2)
        for axis, patch in ((0, 50), (1, 27)):
            zoom = Fraction(image[axis], view[axis])
            step = (view[axis] - lost) * zoom / grid[axis]
            centres = (lost * zoom / 2 + (cell + Fraction(1, 2)) * step for cell in range(grid[axis]))
            expected = [round(centre - Fraction(patch, 2)) for centre in centres]
            assert offsets.movedim(axis, 0)[:, 0, axis].tolist() == expected


def resnet_model(**options):
    network, _ = attention_network("ResNet stage 2")
    options = {"receptive_field": "auto"} | options
    return ats.nn.AttentionSampling(network, nn.Sequential(nn.AvgPool2d(16), nn.Flatten()), 4, 16, **options).eval()


def test_a_resnet_at_a_sixteenth_of_the_image_was_read_56_pixels_off():
    """Half a step less half a view pixel: 3.5 view pixels of 16 each, at every cell."""
    view, image = torch.rand(1, 3, 40, 48), torch.rand(1, 3, 640, 768)
    for cells, drawn in ((4, "sample"), (30, "topk")):
        model = resnet_model(method=drawn)
        model.sampler.n_patches = cells
        _, logits, sample = model(view, image, generator=seeded())
        assert logits.shape[-2:] == (5, 6)
        default = ats.cell_offsets(sample.indices, (5, 6), (640, 768), (16, 16))
        assert torch.equal(sample.offsets, default - 56)


@pytest.mark.parametrize("kind", [pickle, copy])
def test_a_placement_survives_copies_and_printing(kind):
    placement = ats.Placement((Fraction(-7, 2), Fraction(1, 3)), 8, view_size=(64, 80))
    again = pickle.loads(pickle.dumps(placement)) if kind is pickle else copy.deepcopy(placement)
    assert again == placement
    assert hash(again) == hash(placement)
    assert repr(again) == "Placement(origin=('-7/2', '1/3'), step=8, view_size=(64, 80))"
    assert eval(repr(again), {"Placement": ats.Placement}) == placement
    model = resnet_model()
    model = pickle.loads(pickle.dumps(model)) if kind is pickle else copy.deepcopy(model)
    assert model.sampler.receptive_field == ats.Placement.padded(8)
    assert "receptive_field=Placement(origin='-7/2', step=8)" in repr(model)
    with pytest.raises(AttributeError):
        placement.step = 4


def test_a_compiled_model_reads_the_same_patches_at_any_size():
    """One graph without breaks for all sizes, none of which the view's cells divide evenly."""

    def offsets(logits, image, view):
        cells = logits.flatten(1).topk(3).indices
        sizes = ((tensor.shape[-2], tensor.shape[-1]) for tensor in (logits, image, view))
        grid, pixels, seen = sizes
        return ats.cell_offsets(cells, grid, pixels, (5, 6), view_size=seen, receptive_field=placement)

    placement = ats.Placement((Fraction(-7, 2), Fraction(-1, 3)), (8, Fraction(15, 2)))
    torch._dynamo.reset()
    compiled = torch.compile(offsets, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (5, 6, 9):
            tensors = torch.rand(2, n, n + 2), torch.rand(1, 1, 99 * n, 90 * n), torch.rand(1, 1, 8 * n - 3, 8 * n + 17)
            assert torch.equal(compiled(*tensors), offsets(*tensors))


def test_a_whole_resnet_compiles_and_exports():
    """Without graph breaks, at sizes that differ, the largest of which is exported."""
    model = resnet_model(method="topk")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for n in (5, 6):
        inputs = torch.rand(1, 3, 8 * n + 3, 8 * n + 5), torch.rand(1, 3, 64 * n, 72 * n)
        (_, _, got), (_, _, want) = compiled(*inputs), model(*inputs)
        assert torch.equal(got.offsets, want.offsets)
    exported = torch.export.export(model, inputs).module()
    assert torch.equal(exported(*inputs)[2].offsets, want.offsets)


def test_placements_of_timms_reductions():
    """`feature_info` lists dictionaries; the numbers may be numpy's."""
    feature_info = [{"num_chs": 8, "reduction": reduction} for reduction in (2, np.int64(4), 8, 16, np.float32(32))]
    placements = [ats.Placement.padded(stage["reduction"]) for stage in feature_info]
    assert placements[1:] == [
        attention_network(f"ResNet {name}")[1] for name in ("stem", *(f"stage {i}" for i in (2, 3, 4)))
    ]
    assert all(type(value.numerator) is int for placement in placements for value in placement.step)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0), ValueError, "step must be positive view pixels, got 0"),
        ((0, (4, -1)), ValueError, r"step must be positive view pixels, got \(4, -1\)"),
        ((float("nan"), 1), TypeError, "origin must be a finite number of view pixels, or two, .*got nan"),
        (((1, 2, 3), 1), TypeError, r"origin must be .*got \(1, 2, 3\)"),
        ((0, True), TypeError, "step must be .*got True"),
        ((0, "eight"), TypeError, "step must be .*got 'eight'"),
        ((0, 8, (8, 0)), ValueError, r"view_size\[1\] must be at least 1"),
    ],
)
def test_placements_that_are_none(arguments, error, message):
    with pytest.raises(error, match=message):
        ats.Placement(*arguments)


def test_a_placement_of_another_network_or_view_is_refused():
    """Twice the stride would leave the view, half of it half of the view."""
    image, logits = torch.zeros(1, 1, 640, 640), torch.zeros(1, 10, 10)
    options = {"view_size": (80, 80), "n_patches": 2, "patch_size": 4}
    for wrong in (ats.Placement.padded(16), ats.Placement.padded(3)):
        with pytest.raises(ValueError, match=r"10 cells do not lie in 80 view pixels as Placement"):
            ats.sample_patches(image, logits, receptive_field=wrong, **options)
    with pytest.raises(ValueError, match="pass view_size"):
        ats.sample_patches(image, logits, 2, 4, receptive_field=ats.Placement(0, 8))
    assert len(ats.sample_patches(image, logits, receptive_field=ats.Placement.padded(8), **options).patches) == 1


@pytest.mark.parametrize("name", ["ResNet stem", "MobileNet", "unpadded", "one side padded more", "axes that differ"])
def test_a_default_that_misplaces_is_told(name):
    """Without a receptive_field, a layer that shifts cells is named; with any, or none that shifts, nothing is said."""
    network, feature = attention_network(name)[0], nn.Flatten()
    with pytest.warns(
        UserWarning, match=r"Conv2d\(3, .*\) \(0\.\d.*\) in the attention network shifts.*receptive_field='auto'"
    ):
        ats.nn.AttentionSampling(network, feature, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in ("auto", 0, ats.Placement(0, 4)):
            ats.nn.AttentionSampling(network, feature, 2, 4, receptive_field=given)
        for quiet in (convnext(), nn.Conv2d(3, 1, 3, padding="same"), nn.AvgPool2d(4), nn.Identity(), UNetDecoder()):
            ats.nn.AttentionSampling(quiet, feature, 2, 4)
    with pytest.warns(UserWarning, match="padding=same"):
        ats.nn.AttentionSampling(nn.Conv2d(3, 1, 2, padding="same"), feature, 2, 4)
