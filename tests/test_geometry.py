"""`ats.geometry`: offsets against the formula in fractions, receptive fields against what a network really sees."""

import random
from fractions import Fraction

import pytest
import torch
from torch import nn

import ats

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


def conv(kernel=3, **options):
    return nn.Conv2d(1, 1, kernel, **options)


STACKS = {
    # name: (layers, lost view pixels, side of a view that the grid covers without remainder)
    "same, by number": (lambda: [conv(padding=1), nn.Tanh(), conv(5, padding=2), nn.ReLU()], 0, 12),
    "same, by name": (lambda: [conv(padding="same"), nn.BatchNorm2d(1), conv(1)], 0, 12),
    "unpadded": (lambda: [conv(), nn.ReLU(), conv(5, padding="valid")], 6, 12),
    "speed limits": (lambda: [*(conv() for _ in range(4)), nn.MaxPool2d(8)], 8, 40),
    "dilated": (lambda: [conv(dilation=2), conv(dilation=(3, 3))], 10, 20),
    "half padded": (lambda: [conv(5, padding=1)], 2, 12),
    "kernel as large as its stride": (lambda: [conv(2, stride=2), nn.AvgPool2d(3)], 0, 24),
    "wide kernel, stride 2": (lambda: [conv(4, stride=2), conv()], 6, 20),
    "overlapping pool": (lambda: [nn.MaxPool2d(3, stride=1, dilation=2), nn.AvgPool2d(2)], 4, 20),
    "nested": (lambda: [nn.Sequential(conv(), nn.Sequential(nn.ReLU(), conv())), nn.Dropout(), nn.MaxPool2d(2)], 4, 20),
}


def pixels_seen(network, side):
    """For each row of the grid, the first and last row of the view that it depends on, found with NaNs."""
    seen = []
    for row in range(side):
        view = torch.zeros(1, 1, side, side, dtype=torch.float64)
        view[:, :, row] = float("nan")
        seen.append(network(view)[0, 0].isnan().any(-1))
    depends = torch.stack(seen)  # (h, gh)
    return [(int(rows.nonzero()[0]), int(rows.nonzero()[-1])) for rows in depends.t()]


@pytest.mark.parametrize("name", STACKS)
def test_receptive_field_puts_cells_where_the_network_looks(name):
    """The centre of what a cell sees is rf/2 + (i + ½)·step; cells at a padded border see less and are left out."""
    layers, lost, side = STACKS[name]
    torch.manual_seed(0)
    network = nn.Sequential(*layers()).double().eval()
    assert ats.receptive_field(network) == lost
    seen = pixels_seen(network, side)
    step = (side - lost) / len(seen)
    inner = [cell for cell, (first, last) in enumerate(seen) if first > 0 and last < side - 1]
    assert inner, "the view is too small to look at a cell away from its border"
    for cell in inner:
        assert sum(seen[cell]) / 2 + 0.5 == pytest.approx(lost / 2 + (cell + 0.5) * step)


def test_receptive_field_of_a_single_layer_and_of_none():
    assert ats.receptive_field(conv(7)) == 6
    assert ats.receptive_field(nn.Sequential()) == 0


def test_receptive_field_counts_a_layer_as_often_as_it_is_used():
    """One convolution applied twice loses its pixels twice."""
    shared = conv()
    network = nn.Sequential(shared, nn.ReLU(), shared)
    assert network(torch.zeros(1, 1, 12, 12)).shape[-1] == 12 - 4
    assert ats.receptive_field(network) == 4


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = conv()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(conv(), nn.Sequential(nn.Upsample(2))), r"Upsample \(1.0\); pass receptive_field as a number"),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), r"ConvTranspose2d \(0\)"),
        (nn.Sequential(nn.AdaptiveMaxPool2d(4)), r"AdaptiveMaxPool2d \(0\)"),
        (Unknown(), r"Unknown \(the module itself\)"),
        (conv((3, 5)), r"kernel_size=\(3, 5\), which differs along the axes"),
        (nn.Sequential(conv(stride=(1, 2))), r"layer '0' has stride=\(1, 2\)"),
        (nn.Sequential(nn.ReLU(), conv(padding=(1, 0))), r"layer '1' has padding=\(1, 0\)"),
        (conv(dilation=(1, 2)), r"dilation=\(1, 2\)"),
        (conv(2, padding="same"), "pads an even kernel on one side more"),
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


def test_a_layer_of_ones_own_can_say_that_it_mixes_no_positions() -> None:
    class Halve(nn.Module):
        pointwise = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2

    assert ats.receptive_field(nn.Sequential(nn.Conv2d(1, 4, 3), Halve(), nn.Conv2d(4, 1, 3))) == 4
