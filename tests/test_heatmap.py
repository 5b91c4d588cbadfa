"""`ats.heatmap`: where attention and drawn patches lie in the image, with nothing lost or made up."""

from fractions import Fraction

import pytest
import torch

import ats
from tests.helpers import assert_close, randn, seeded

IMAGE = torch.zeros(3, 1, 24, 30)


def test_attention_is_spread_over_the_pixels_of_its_cells() -> None:
    """Cells of 6×5 pixels: a pixel has 1/30 of its cell's attention; a smaller picture is the sum of a larger one."""
    logits = randn(3, 4, 6)
    attention = logits.flatten(1).softmax(-1).view(3, 4, 6)
    picture = ats.heatmap(logits.unsqueeze(1), (24, 30))
    assert_close(picture, attention.repeat_interleave(6, 1).repeat_interleave(5, 2) / 30)
    for size in ((8, 10), (4, 6), (7, 11), (1, 1)):
        small = ats.heatmap(logits, (24, 30), size=size)
        assert small.shape == (3, *size)
        assert_close(small.sum((1, 2)), torch.ones(3).double())
    assert_close(ats.heatmap(logits, (24, 30), size=(8, 10)), picture.view(3, 8, 3, 10, 3).sum((2, 4)))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = True
    alone = ats.heatmap(logits, (24, 30), mask=mask)
    assert_close(alone[:, 6:12, 10:15].sum((1, 2)), torch.ones(3).double())
    assert not ats.heatmap(logits.clone().requires_grad_(), (24, 30)).requires_grad


def test_cells_lie_where_their_network_sees() -> None:
    """A view of 12×15 of which 2 are lost at each side: the first cell begins at pixel 2·2, and nothing lies before."""
    logits = torch.full((1, 4, 11), -torch.inf)
    logits[0, 0, 0] = 0
    picture = ats.heatmap(logits, (24, 30), view_size=(12, 15), receptive_field=4)[0]
    assert_close(picture[4:8, 4:6], torch.full((4, 2), 1 / 8).double())
    assert picture.sum() == pytest.approx(1)
    placed = ats.Placement(Fraction(-1, 2), 2)  # cells of 2 view pixels, 4 of the image, the first begins outside
    outside = ats.heatmap(logits, (24, 30), view_size=(8, 22), receptive_field=placed)[0]
    assert 0 < float(outside.sum()) < 1, "what reaches outside the image is not in its picture"


@pytest.mark.parametrize("options", [{}, {"replace": True}, {"selection": "topk"}, {"masked": True}])
def test_samples_show_their_weights_where_their_patches_lie(options: dict[str, object]) -> None:
    """Each patch's weight, painted pixel by pixel; surplus draws are nowhere."""
    mask = torch.ones(3, 4, 6, dtype=torch.bool)
    mask[1] = False
    mask[1, 1, 3:5] = True
    given = {"mask": mask} if options.pop("masked", False) else {}
    sample = ats.sample_patches(IMAGE, randn(3, 4, 6), 5, (7, 8), generator=seeded(), **options, **given)  # type: ignore[arg-type]
    estimator = "ordered" if sample.replace else "unordered"
    expected = torch.zeros(3, 44, 50).double()
    for row in sample.table(estimator):  # type: ignore[arg-type]
        y, x = int(row["top"]) + 10, int(row["left"]) + 10
        expected[int(row["image"]), y : y + 7, x : x + 8] += row["weight"] / 56
    got = ats.heatmap(sample, (24, 30), estimator=estimator)  # type: ignore[arg-type]
    assert_close(got, expected[:, 10:34, 10:40], torch.float32)
    cells = ats.heatmap(
        ats.sample_cells(randn(3, 4, 6), 5, generator=seeded(), **options, **given), (24, 30), size=(4, 6)
    )  # type: ignore[arg-type]
    assert_close(cells.sum((1, 2)), torch.ones(3).double(), torch.float32)
    rows = sample.weights().double()
    for image in range(3):
        want = torch.zeros(24).double().index_add_(0, sample.readable()[image], rows[image])
        assert_close(cells[image].flatten(), want, torch.float32)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"logits must be \(B, gh, gw\)"):
        ats.heatmap(torch.zeros(4, 6), (24, 30))
    with pytest.raises(ValueError, match=r"size\[0\] must be at least 1, got 0"):
        ats.heatmap(torch.zeros(1, 4, 6), (24, 30), size=(0, 3))
    with pytest.raises(TypeError, match=r"logits must be a torch.Tensor, got str"):
        ats.heatmap("logits", (24, 30))  # type: ignore[arg-type]
