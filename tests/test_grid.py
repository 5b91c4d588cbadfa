"""`ats.grid`: offsets against the formula in fractions, receptive fields against what a network really sees."""

import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import activation

import ats
from ats import models as ats_models
from tests.helpers import seeded

# One axis each: image, view, receptive field, grid, patch.
MNIST = (1500, 180, 0, 180, 50)
COLON = (500, 100, 0, 100, 27)
SIGNS = ((960, 288, 8, 35, 100), (1280, 384, 8, 47, 100))


def exact_offset(cell, image, view, lost, grid, patch):
    """Section 2 of the method in fractions; Python's round takes a half to the even neighbour."""
    scale = Fraction(image, view)
    step = (view - lost) * scale / grid
    centre = Fraction(lost, 2) * scale + (cell + Fraction(1, 2)) * step
    return round(centre - Fraction(patch, 2))


def offsets_of(axis_y, axis_x, indices=None):
    image, view, lost, grid, patch = zip(axis_y, axis_x, strict=True)
    assert lost[0] == lost[1]
    if indices is None:
        indices = torch.arange(grid[0] * grid[1])
    return ats.cell_offsets(indices, grid, image, patch, view_size=view, receptive_field=lost[0])


def exact_offsets(axis_y, axis_x):
    rows, columns = ([exact_offset(i, *axis) for i in range(axis[3])] for axis in (axis_y, axis_x))
    return torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns)).view(-1, 2)


@pytest.mark.parametrize(
    "axes", [(MNIST, MNIST), (COLON, COLON), SIGNS, (MNIST, COLON)], ids=["mnist", "colon", "signs", "mixed"]
)
def test_offsets_of_the_experiments(axes):
    """Every cell of the paper's grids, row-major, (y, x)."""
    assert torch.equal(offsets_of(*axes), exact_offsets(*axes))


def test_known_offsets():
    """By hand: MNIST's cells centre at 25/6 + 25/3·i, so patches start at −20.83, −12.5 (to even: −12), …, 1470.83."""
    offsets = offsets_of(MNIST, MNIST, torch.tensor([0, 179, 180, 180 * 180 - 1]))
    assert offsets.tolist() == [[-21, -21], [-21, 1471], [-12, -21], [1471, 1471]]


def test_a_half_goes_to_the_even_pixel():
    """Image 8, grid 8, patch 2: centre − 1 = i − 0.5, so tops are 0, 0, 2, 2, …; rounding up would give 0, 1, 2."""
    axis = (8, 8, 0, 8, 2)
    assert offsets_of(axis, axis, torch.arange(8))[:, 1].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    odd = (6, 6, 0, 2, 4)  # 1.5 − 2 and 4.5 − 2
    assert offsets_of(odd, odd, torch.arange(2))[:, 1].tolist() == [0, 2]


def test_offsets_of_random_sizes():
    """Images up to 200,000 pixels a side, views, grids, receptive fields and patches that divide nothing."""
    rng = random.Random(0)
    for _ in range(200):
        lost = rng.choice([0, rng.randrange(20)])
        axes = []
        for _ in range(2):
            view = rng.randrange(lost + 1, 10_000)
            grid, patch = rng.randrange(1, view - lost + 1), rng.randrange(1, 999)
            axes.append((rng.randrange(view, 200_000), view, lost, grid, patch))
        cells = [(rng.randrange(axes[0][3]), rng.randrange(axes[1][3])) for _ in range(20)]
        indices = torch.tensor([y * axes[1][3] + x for y, x in cells])
        expected = [[exact_offset(i, *axis) for i, axis in zip(cell, axes, strict=True)] for cell in cells]
        assert offsets_of(*axes, indices.view(4, 5)).tolist() == torch.tensor(expected).view(4, 5, 2).tolist()


def test_view_size_only_matters_with_a_receptive_field():
    indices = torch.arange(12)
    expected = ats.cell_offsets(indices, (3, 4), (50, 70), (9, 8))
    assert torch.equal(ats.cell_offsets(indices, (3, 4), (50, 70), (9, 8), view_size=(10, 14)), expected)
    lossy = ats.cell_offsets(indices, (3, 4), (50, 70), (9, 8), view_size=(10, 14), receptive_field=2)
    assert not torch.equal(lossy, expected)


@pytest.mark.parametrize(("image", "grid", "patch"), [(24, 8, 5), (7, 7, 4), (7, 14, 3), (100, 9, 50), (5, 40, 2)])
def test_positions_are_centres_in_the_unit_square(image, grid, patch):
    """Within half a pixel of the cell's own centre, and never outside, however fine the grid or large the patch."""
    offsets = ats.cell_offsets(torch.arange(grid * grid), (grid, grid), (image, 2 * image), (patch, patch))
    positions = ats.patch_positions(offsets, (patch, patch), (image, 2 * image))
    centres = (torch.arange(grid) + 0.5) / grid
    exact = torch.cartesian_prod(centres, centres)
    assert ((positions - exact).abs() * torch.tensor([image, 2 * image]) < 0.5001).all()
    assert positions.dtype == torch.float32
    assert 0 <= positions.min() <= positions.max() <= 1


def conv(kernel=3, inputs=1, outputs=1, **options):
    return nn.Conv2d(inputs, outputs, kernel, **options)


class Residual(nn.Module):
    """Branches that are added and concatenated, by functions rather than layers; logits without a channel."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = conv(3, 3, 8, padding=1), conv(3, 8, 8, padding=1), conv(3, 16, 1)

    def forward(self, view):
        maps = self.first(view).relu()
        maps = maps + self.second(maps)
        return self.last(torch.cat([maps, F.max_pool2d(maps, 3, stride=1, padding=1)], 1)).squeeze(1)


class UNet(nn.Module):
    """Down by 4 and up again, beside a branch at full resolution."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse, self.last = conv(3, 1, 4, padding=1), conv(3, 4, 4, padding=1), conv(3, 8, 1, padding=1)

    def forward(self, view):
        fine = torch.tanh(self.fine(view))
        coarse = F.interpolate(self.coarse(F.avg_pool2d(fine, 4)), scale_factor=4, mode="bilinear")
        return self.last(torch.cat([fine, coarse], 1))


class Gated(nn.Module):
    """Squeeze and excitation, in three ways, and logits of mean 0: positions stay what they were."""

    def __init__(self):
        super().__init__()
        self.pool, self.first, self.last = nn.AdaptiveMaxPool2d(1), conv(3), conv(4, stride=4)

    def forward(self, view):
        maps = self.first(view)
        maps = maps * maps.mean((2, 3), keepdim=True).sigmoid() * self.pool(maps)
        logits = self.last(maps / maps.std((-2, -1), keepdim=True))
        return logits - torch.mean(logits, dim=(1, 2, 3), keepdim=True)


class Shifted(nn.Module):
    """A layer of one's own: each cell looks at its own pixel and at the one three to the left and above."""

    def forward(self, view):
        return view[:, :, 3:, 3:] * view[:, :, :-3, :-3]


NETWORKS = {
    # name: (network, lost view pixels, step, side of a view that the grid covers without remainder)
    "same, by number": (lambda: [conv(padding=1), nn.Tanh(), conv(5, padding=2), nn.ReLU()], 0, 1, 24),
    "same, by name": (lambda: [conv(padding="same"), nn.BatchNorm2d(1), conv(1)], 0, 1, 12),
    "unpadded": (lambda: [conv(), nn.ReLU(), conv(5, padding="valid")], 6, 1, 24),
    "speed limits": (lambda: [*(conv() for _ in range(4)), nn.MaxPool2d(8)], 8, 8, 40),
    "dilated": (lambda: [conv(dilation=2), conv(dilation=(3, 3))], 10, 1, 30),
    "half padded": (lambda: [conv(5, padding=1)], 2, 1, 12),
    "kernel as large as its stride": (lambda: [conv(2, stride=2), nn.AvgPool2d(3)], 0, 6, 24),
    "wide kernel, stride 2": (lambda: [conv(4, stride=2), conv()], 6, 2, 20),
    "overlapping pool": (lambda: [nn.MaxPool2d(3, stride=1, dilation=2), nn.AvgPool2d(2)], 4, 2, 20),
    "nested": (
        lambda: [nn.Sequential(conv(), nn.Sequential(nn.ReLU(), conv())), nn.Dropout(), nn.MaxPool2d(2)], 4, 2, 20
    ),
    "residual": (lambda: [Residual()], 2, 1, 24),
    "u-net": (lambda: [UNet()], 0, 1, 32),
    "own layer": (lambda: [conv(), Shifted()], 5, 1, 20),
    "group norm and softmax": (lambda: [conv(3, 1, 4), nn.GroupNorm(2, 4), conv(1, 4, 1), nn.Softmax2d()], 2, 1, 12),
    "gates and other statistics": (lambda: [Gated()], 2, 4, 22),
    "nearest upsampling": (lambda: [nn.MaxPool2d(4), conv(padding=1), nn.Upsample(scale_factor=2)], 0, 2, 40),
    "bilinear upsampling": (lambda: [conv(), nn.Upsample(scale_factor=2, mode="bilinear")], 2, Fraction(1, 2), 20),
    "transposed": (lambda: [nn.AvgPool2d(4), nn.ConvTranspose2d(1, 1, 2, stride=2)], 0, 2, 24),
    "rounded up": (lambda: [nn.MaxPool2d(2, ceil_mode=True)], 0, 2, 12),
    "one side padded more, made up for by the stride": (lambda: [nn.ZeroPad2d((0, 1, 0, 1)), conv(stride=2)], 1, 2, 21),
    "reflected": (lambda: [conv(5, padding=2, padding_mode="reflect")], 0, 1, 12),
}  # fmt: skip


def pixels_seen(network, channels, side, axis):
    """For each cell along an axis, the first and last row of the view that change it: finite impulses, many times.

    A ReLU or a maximum hides most impulses, so each row gets 12 of them, on views of their own.
    """
    changes = []
    for number in range(12):
        view = torch.randn(1, channels, side, side, dtype=torch.float64, generator=seeded(number))
        views = view.repeat(side, 1, 1, 1)
        rows = torch.arange(side)
        views.movedim(2 + axis, 1)[rows, rows] += (-1) ** number * 10
        with torch.no_grad():
            changed = (network(views) - network(view)).reshape(side, -1, *network(view).shape[-2:]).abs().sum(1) > 1e-12
        changes.append(changed.movedim(1 + axis, 1).any(-1))
    depends = torch.stack(changes).any(0)  # (side, cells)
    return [(int(cell.nonzero()[0]), int(cell.nonzero()[-1])) for cell in depends.t()]


@pytest.mark.parametrize("name", NETWORKS)
def test_receptive_field_puts_cells_where_the_network_looks(name):
    """The centre of what changes a cell is rf/2 + (i + ½)·step; cells at a padded border see less and are left out.

    Upsampled cells take turns at what they share, so their centres are right on average and within a source cell.
    """
    layers, lost, step, side = NETWORKS[name]
    torch.manual_seed(0)
    network = nn.Sequential(*layers()).double().eval()
    for parameter in network.parameters():  # biases in reach of both sides of a ReLU
        parameter.data.mul_(2)
    channels = 3 if name == "residual" else 1
    assert ats.measure_placement(network) == ats.Placement(Fraction(lost, 2), step)
    assert ats.receptive_field(network) == lost
    if "softmax" in name or "statistics" in name:
        return  # every pixel has a small part in each cell, so that impulses do not tell where it looks
    for axis in (0, 1):
        seen = pixels_seen(network, channels, side, axis)
        assert lost + len(seen) * step == side
        inner = [cell for cell, (first, last) in enumerate(seen) if first > 0 and last < side - 1]
        assert inner, "the view is too small to look at a cell away from its border"
        off = torch.tensor([float(sum(seen[cell]) / 2 + 0.5 - lost / 2 - (cell + 0.5) * step) for cell in inner])
        if "upsampling" in name or name in ("transposed", "u-net"):
            assert off.abs().max() <= 2
            assert off[: len(off) // 4 * 4].mean().abs() < 1e-9 or name == "u-net"
        else:
            assert off.abs().max() < 1e-9


def test_measuring_leaves_the_network_and_the_random_numbers_alone():
    """It runs on a copy: batch norm keeps its statistics, parameters their gradients, the random stream its place."""
    network = nn.Sequential(conv(), nn.BatchNorm2d(1), nn.Dropout(), conv())
    network(torch.randn(2, 1, 12, 12)).sum().backward()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    gradient, state = network[0].weight.grad.clone(), torch.get_rng_state()
    assert ats.receptive_field(network) == 4
    assert network.training
    assert network[0].weight.dtype == torch.float32
    assert torch.equal(network[0].weight.grad, gradient)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_channels_are_found_out_or_given():
    class Brightness(nn.Module):
        def forward(self, view):
            red, green, blue = view.unbind(1)
            return F.avg_pool2d((red + green + blue).unsqueeze(1), 2)

    assert ats.measure_placement(Brightness()) == ats.Placement(0, 2)
    nine = nn.Sequential(nn.PixelShuffle(3), nn.AvgPool2d(3), conv())
    assert ats.receptive_field(nine, channels=9) == 2


@pytest.mark.parametrize("name", [n for n in activation.__all__ if n not in ("MultiheadAttention", "GLU")])
def test_no_activation_hides_what_a_cell_depends_on(name):
    """One that turned NaN into a number would make the receptive field too small."""
    options = {"Threshold": (0.1, 20.0)}.get(name, ())
    layer = getattr(nn, name)(*options)
    assert ats.receptive_field(nn.Sequential(conv(3, 1, 2), layer, conv(3, 2, 1))) == 4


def test_receptive_field_of_a_single_layer_and_of_none():
    assert ats.receptive_field(conv(7)) == 6
    assert ats.receptive_field(nn.Sequential()) == 0


def test_receptive_field_counts_a_layer_as_often_as_it_is_used():
    """One convolution applied twice loses its pixels twice."""
    shared = conv()
    network = nn.Sequential(shared, nn.ReLU(), shared)
    assert network(torch.zeros(1, 1, 12, 12)).shape[-1] == 12 - 4
    assert ats.receptive_field(network) == 4


class SwallowsNaN(nn.Module):
    def forward(self, view):
        return view + F.avg_pool2d(view.nan_to_num(), 3, stride=1, padding=1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.AdaptiveMaxPool2d(4)), "does it mix the whole view, or give a grid of fixed size"),
        (nn.AdaptiveMaxPool2d(8), "the grid's size is fixed .8 cells of 16 pixels, 8 of 24"),
        (nn.Linear(16, 16), "does it mix the whole view"),
        (nn.AdaptiveAvgPool2d(1), "do not depend on the view"),
        (SwallowsNaN(), "a layer replaces NaN by numbers"),
        (nn.Flatten(), r"must give a tensor \(B, gh, gw\)"),
        (conv(3, 7, 1).requires_grad_(False).apply(lambda layer: layer.weight.data.fill_(float("nan"))), "gives NaN"),
        (nn.Sequential(conv(3, 5, 1), conv(3, 2, 1)), "runs on no view from 16 to 512 pixels"),
        (ats_models.UniformAttention(2), "do not depend on the view"),
        (conv((3, 5)), "loses 2 view pixels at a step of 1, along x 4 at 1"),
        (nn.Sequential(conv(stride=(1, 2))), "along x 1 at 2"),
        (nn.Sequential(nn.ReLU(), conv(padding=(1, 0))), "loses 0 view pixels at a step of 1, along x 2"),
        (conv(dilation=(1, 2)), "along x 4 at 1"),
        (conv(2, padding="same"), "one side is padded more"),
        (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(padding=1)), "one side is padded more"),
        (nn.Sequential(conv(), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)), "align_corners"),
        (
            nn.Sequential(conv(stride=2, padding=1)),
            "0.5 view pixels from the edge, less than half .* step of 2",
        ),
    ],
)
def test_receptive_field_errors(network, message):
    """A guess would read every patch beside its cell."""
    with pytest.raises(ValueError, match=message):
        ats.receptive_field(network)
