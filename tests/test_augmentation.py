"""Random changes of training images: what they do to pixels, and that a seed, an epoch and an index fix them."""

import dataclasses

import pytest
import torch

from ats.experiments.augmentation import Change, apply_change, draw_change
from ats.experiments.colon_cancer import ColonCancerConfig
from ats.experiments.speed_limits import SpeedLimitsConfig
from tests.helpers import seeded

SQUARE = torch.randint(256, (3, 12, 12), dtype=torch.uint8, generator=seeded())
WIDE = torch.randint(256, (3, 8, 12), dtype=torch.uint8, generator=seeded(1))


def test_no_change_is_none() -> None:
    assert apply_change(WIDE, Change()) is WIDE


def test_brightness_and_contrast_are_affine_rounded_and_clipped() -> None:
    """Cutting off in place of rounding would darken every training image by half a level."""
    changed = apply_change(WIDE, Change(scale=1.1, shift=(-0.05, 0.0, -0.1)))
    shift = torch.tensor([-0.05, 0.0, -0.1], dtype=torch.float64).view(3, 1, 1)
    exact = (WIDE.double() * 1.1 + shift * 255).clamp(0, 255)
    assert changed.dtype == torch.uint8
    assert float((changed.double() - exact).abs().max()) <= 0.5 + 1e-4
    assert int(changed.min()) == 0  # clipped, not wrapped around


@pytest.mark.parametrize(("down", "right"), [(2, 0), (0, -3), (-1, 4), (7, 11), (8, 0), (-20, 20)])
def test_what_moves_in_is_black(down: int, right: int) -> None:
    moved = apply_change(WIDE, Change(down=down, right=right))
    for y in range(8):
        for x in range(12):
            inside = 0 <= y - down < 8 and 0 <= x - right < 12
            expected = WIDE[:, y - down, x - right] if inside else torch.zeros(3, dtype=torch.uint8)
            assert torch.equal(moved[:, y, x], expected)


@pytest.mark.parametrize("zoom", [(2.0, 2.0), (0.5, 0.5), (2.0, 0.5)])
def test_a_zoom_keeps_the_middle_and_the_size(zoom: tuple[float, float]) -> None:
    """A bright square in the middle grows by the factor along each axis, and black comes in around a smaller image."""
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    image[:, 16:24, 26:34] = 200
    changed = apply_change(image, Change(zoom=zoom))
    assert changed.shape == image.shape
    assert changed.dtype == torch.uint8
    bright = (changed[0] > 150).nonzero()
    for axis, (middle, factor) in enumerate(zip((20, 30), zoom, strict=True)):
        low, high = int(bright[:, axis].min()), int(bright[:, axis].max()) + 1
        assert (low + high) / 2 == middle
        assert high - low == 8 * factor
    filled = [min(1.0, factor) * size for factor, size in zip(zoom, (40, 60), strict=True)]
    assert int((changed[0] > 0).sum()) == filled[0] * filled[1]


def test_a_zoom_comes_before_the_move() -> None:
    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    moved = apply_change(image, Change(zoom=(0.5, 0.5), down=12, right=-20))
    assert torch.equal(
        moved[0] > 0,
        torch.zeros(40, 60, dtype=torch.bool).index_put_(
            (torch.arange(22, 40)[:, None], torch.arange(0, 25)[None]), torch.tensor(True)
        ),
    )


def test_zooms_keep_to_their_ranges_and_change_nothing_else() -> None:
    data = SpeedLimitsConfig(zoom=1.35, stretch=1.1)
    plain = SpeedLimitsConfig()
    changes = [draw_change(data, 0, epoch, index) for epoch in range(20) for index in range(50)]
    zooms = [change.zoom for change in changes if change.zoom != (1.0, 1.0)]
    assert abs(len(zooms) - 800) < 76  # 6 standard deviations: a false alarm once in 10⁹
    sizes = [(height * width) ** 0.5 for height, width in zooms]
    assert 1 / (1.35 * 1.1) <= min(sizes) < 0.78
    assert 1.28 < max(sizes) <= 1.35 * 1.1
    assert 1.1 < max(height / width for height, width in zooms) <= 1.1**2
    drawn = [dataclasses.replace(change, zoom=(1.0, 1.0)) for change in changes[:50]]
    assert drawn == [draw_change(plain, 0, 0, index) for index in range(50)]


def test_there_are_eight_symmetries_and_none_loses_a_pixel() -> None:
    changes = [Change(mirror=mirror, quarter_turns=turns) for mirror in (False, True) for turns in range(4)]
    images = [apply_change(SQUARE, change) for change in changes]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8
    for image in images:
        assert torch.equal(image.flatten(1).sort(1).values, SQUARE.flatten(1).sort(1).values)
    with pytest.raises(ValueError, match=r"8×12 cannot be turned.*data\.symmetries=False"):
        apply_change(WIDE, Change(quarter_turns=1))


def test_a_change_is_a_function_of_seed_epoch_and_index() -> None:
    """Batches, ranks and interruptions must not matter, and no two epochs may show the same image."""
    data = SpeedLimitsConfig(probability=1.0)
    base = draw_change(data, 0, 0, 0)
    assert draw_change(data, 0, 0, 0) == base
    others = [draw_change(data, *where) for where in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({base, *others}) == 4


def test_changes_keep_to_their_ranges_and_reach_them() -> None:
    data = SpeedLimitsConfig()
    changes = [draw_change(data, 0, epoch, index) for epoch in range(20) for index in range(50)]
    coloured = [change for change in changes if change.scale != 1]
    moved = [change for change in changes if change.down or change.right]
    # 1000 draws with probability 0.8: outside of 6 standard deviations once in 10⁹.
    assert abs(len(coloured) - 800) < 76
    assert abs(len(moved) - 800) < 76
    assert {change.quarter_turns for change in changes} == {0}
    assert all(len(set(change.shift)) == 1 for change in changes)  # no tint: all colours alike
    for values, low, high in (
        ([change.scale for change in coloured], 0.8, 1.2),
        ([change.shift[0] for change in coloured], -0.1, 0.1),
        ([float(change.down) for change in moved], -100, 100),
        ([float(change.right) for change in moved], -100, 100),
    ):
        margin = (high - low) * 0.02  # beyond it lies no draw of 700 once in 10⁶
        assert low <= min(values) < low + margin
        assert high - margin < max(values) <= high


def test_a_tint_shifts_each_colour_by_itself() -> None:
    data = ColonCancerConfig(brightness=0.0, tint=0.05, probability=1.0)
    shifts = [shift for index in range(300) for shift in draw_change(data, 0, 0, index).shift]
    assert len(set(shifts)) == 900
    assert -0.05 <= min(shifts) < -0.048  # beyond lies no draw of 900 once in 10⁷
    assert 0.048 < max(shifts) <= 0.05


def test_symmetries_are_drawn_evenly_and_only_where_asked_for() -> None:
    data = ColonCancerConfig(symmetries=True)
    changes = [draw_change(data, 0, 0, index) for index in range(800)]
    kinds = [4 * change.mirror + change.quarter_turns for change in changes]
    for kind in range(8):  # 100 expected, standard deviation 9.4: a false alarm once in 10⁸
        assert 44 < kinds.count(kind) < 156
    plain = draw_change(dataclasses.replace(data, symmetries=False), 0, 0, 3)
    assert (plain.scale, plain.shift) == (changes[3].scale, changes[3].shift)  # one option does not change another
