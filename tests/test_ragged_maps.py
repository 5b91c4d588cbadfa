"""Pictures and numbers of attention for batches of images of different sizes."""

import pytest
import torch

import ats
from ats import diagnostics
from ats.functional import pad_logits
from tests.helpers import assert_close, seeded
from tests.ragged import SIZES, make_images, make_model, stored, views_of

VIEW_SIZES = [(12, 16), (24, 10), (12, 16), (9, 20)]


def drawn():
    images = make_images()
    _, logits, sample = make_model()(views_of(images), images, generator=seeded())
    return images, logits, sample


@pytest.mark.parametrize("size", [None, (8, 6)])
@pytest.mark.parametrize("what", ["logits", "maps", "patches", "cells"])
def test_a_picture_is_that_of_the_image_alone(what, size):
    images, logits, sample = drawn()
    options = {"size": size, "receptive_field": 2}
    own = [logits[i : i + 1, :h, :w] for i, (h, w) in enumerate(sample.grid_sizes)]
    given = {"logits": logits, "maps": [one[0] for one in own], "patches": sample, "cells": cells_of(sample)}[what]
    grids = sample.grid_sizes if what == "logits" else None
    for kind in (list(SIZES), images, stored(images)):
        pictures = ats.heatmap(given, kind, view_size=VIEW_SIZES, grid_sizes=grids, **options)
        assert isinstance(pictures, list)
        for number, picture in enumerate(pictures):
            view = {"view_size": VIEW_SIZES[number]}
            if what in ("logits", "maps"):
                want = ats.heatmap(own[number], SIZES[number], **view, **options)
            elif what == "patches":
                want = ats.heatmap(alone(sample, number), SIZES[number], **view, **options)
            else:
                want = ats.heatmap(alone(cells_of(sample), number), SIZES[number], **view, **options)
            assert picture.shape == (SIZES[number] if size is None else size)
            assert_close(picture, want[0])
            assert picture.sum() > 0.7


def cells_of(sample):
    names = "indices", "log_attention", "logsumexp", "entropy", "replace", "selection", "grid_size", "grid_sizes"
    return ats.CellSample(**{name: getattr(sample, name) for name in names})


def alone(sample, number):
    """One image's row as if it had been drawn from its own grid."""
    (height, width), one = sample.grid_sizes[number], sample[number]
    row, column = one.indices // one.grid_size[1], one.indices % one.grid_size[1]
    fields = {name: getattr(one, name) for name in one._tensors + one._static}
    return type(one)(**fields | {"indices": row * width + column, "grid_size": (height, width), "grid_sizes": None})


def test_a_tensors_pictures_are_a_tensor():
    images = torch.stack(make_images(sizes=[(40, 56)] * 2))
    maps = [torch.randn(grid, generator=seeded(1)) for grid in [(3, 4), (6, 2)]]
    pictures = ats.heatmap(maps, images)
    assert pictures.shape == (2, 40, 56)
    assert torch.equal(pictures, ats.heatmap(maps, (40, 56)))
    assert_close(pictures.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="image_size has 3 sizes for 2 images"):
        ats.heatmap(maps, [(40, 56)] * 3)


def test_masks_of_own_grids():
    maps = [torch.zeros(2, 2), torch.zeros(1, 3)]
    masks = [torch.tensor([[True, False], [False, False]]), torch.tensor([[True, False, True]])]
    first, second = ats.heatmap(maps, [(4, 4), (2, 3)], mask=masks)
    assert first[:2, :2].sum() == 1
    assert second.sum(0).tolist() == [0.5, 0, 0.5]


def test_numbers_of_attention_are_those_of_each_image_alone():
    _, logits, sample = drawn()
    own = [logits[i : i + 1, :h, :w] for i, (h, w) in enumerate(sample.grid_sizes)]
    got = diagnostics.border_mass(logits, grid_sizes=sample.grid_sizes)
    assert_close(got, torch.cat([diagnostics.border_mass(one) for one in own]))
    assert (got > 0.2).all()
    assert_close(diagnostics.peak_mass(logits), torch.cat([diagnostics.peak_mass(one) for one in own]))
    area = diagnostics.distinct_area(sample)
    assert_close(area, torch.cat([diagnostics.distinct_area(alone(sample, number)) for number in range(4)]))
    relative = diagnostics.relative_entropy(sample.entropy, [h * w for h, w in sample.grid_sizes])
    assert not relative.requires_grad
    alike = [diagnostics.relative_entropy(sample.entropy[i], h * w) for i, (h, w) in enumerate(sample.grid_sizes)]
    assert_close(relative, torch.stack(alike))
    with pytest.raises(ValueError, match="cells must be K, or one an image"):
        diagnostics.relative_entropy(sample.entropy, [3, 4])


def test_attention_on_the_border_of_its_own_grid_is_a_sign():
    """Of the common grid it lies inside."""
    edge = torch.full((6, 6), -9.0)
    edge[-1] = edge[:, -1] = 0.0
    maps = [edge, torch.zeros(12, 12)]
    logits, _ = pad_logits([edge, edge, torch.zeros(12, 12)])
    sample = ats.sample_patches(make_images(sizes=[(48, 48), (48, 48), (96, 96)]), [edge, *maps], 4, 8)
    assert "edge" in diagnostics.warning_signs(logits[:2], sample=sample[:2])
    assert "edge" not in diagnostics.warning_signs(logits[:2])
    assert "edge" not in diagnostics.warning_signs(logits[2:], sample=sample[2:])
