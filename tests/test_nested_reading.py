"""What nested sampling reads: views of regions from tensors and sources, cells that partition them, masks, mistakes."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ats
from ats.nn import NestedAttentionSampling, Zoom
from ats.regions import Reading, read_regions, read_views
from ats.samples import BoxSample, PatchSample
from tests.helpers import assert_close, cut, seeded
from tests.nested_models import bytes_of, cells_of, draw_image, model_of, small_model, written_out


def pyramid(image: Tensor, *downsamples: int):
    """A source of float64 levels that are exact means."""
    levels = [image] + [F.avg_pool2d(image[None].double(), down)[0].to(image.dtype) for down in downsamples]
    return ats.sources.from_arrays(levels)


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("scale", [1, 2, 8])
@pytest.mark.parametrize("kind", ["tensor", "tensors", "sources", "pyramids"])
def test_views_of_boxes_are_means_of_slices(kind, scale, padding, monkeypatch):
    """Inside, across the border and wholly outside, in chunks as small as a box."""
    monkeypatch.setattr("ats.regions.AT_ONCE", 1)
    image = torch.rand(2, 3, 64, 48, dtype=torch.float64, generator=seeded())
    origins = torch.tensor([[[0, 0], [40, 32], [-8, 16]], [[56, -16], [-24, -24], [80, 8]]])
    how = Reading(padding, [0.1, 0.2, 0.3], 0.5)
    images = {
        "tensor": image,
        "tensors": list(image),
        "sources": [ats.sources.from_arrays([one]) for one in image],
        "pyramids": [pyramid(one, 2, 4) for one in image],
    }[kind]
    got = read_regions(images, origins, (16, 24), scale, how)
    normal = (image - torch.tensor(how.mean, dtype=torch.float64).view(-1, 1, 1)) / 0.5
    mode = "constant" if padding == "zeros" else "replicate"
    for i in range(2):
        for m in range(3):
            box = cut(normal[i], *origins[i, m].tolist(), (16, 24), mode)
            assert_close(got[i, m], F.avg_pool2d(box[None], scale)[0])


def test_whole_views_of_any_size(monkeypatch):
    """What is missing to a whole pixel is padded, a strip at a time or at once, from bytes as from sources."""
    monkeypatch.setattr("ats.regions.AT_ONCE", 5000)
    image = bytes_of(1, 50, 37)
    want = F.avg_pool2d(F.pad(image.double() / 255, (0, 3, 0, 6)), 8)
    for images in (image, [image[0]], [ats.sources.from_arrays([image[0]])]):
        (view,) = read_views(images, 8, Reading())
        assert_close(view, want[0], torch.float32)


def test_views_padded_to_whole_cells_are_not_taken_for_those_of_other_images():
    """Of images of 20×24 and 58×66 at 1/4 with cells of 4: padding gives each view the other image's shape."""
    images = [bytes_of(1, 20, 24)[0], bytes_of(1, 58, 66)[0]]
    views = [torch.rand(3, 8, 8), torch.rand(3, 16, 20)]
    placement = ats.Placement(0, 4)
    model = model_of(
        Zoom(cells_of(4), 4, 2, receptive_field=placement), Zoom(cells_of(4), 1, 2, receptive_field=placement)
    )
    pooled, logits, sample = model(views, images)
    assert (len(pooled), logits.shape[1:], len(sample)) == (2, (4, 5), 2)
    with pytest.raises(ValueError, match="view"):  # in the wrong order they still are told
        model(views[::-1], images)


def test_levels_that_would_be_resampled_are_not_read():
    """A level of a third cannot give pixels of 8×8; one of a half can, where a box begins at an even pixel."""
    image = torch.rand(3, 48, 48, dtype=torch.float64, generator=seeded())
    asked: list[tuple[int, ...]] = []

    class Spy:
        def __init__(self, source):
            self._source = source

        def __getattr__(self, name):
            return getattr(self._source, name)

        def read(self, level, top, left, height, width):
            asked.append((level, top, left, height, width))
            return self._source.read(level, top, left, height, width)

    for downsamples, origin, scale, level in [
        ((2, 3), 16, 8, 1),
        ((2, 3), 15, 8, 0),
        ((2, 4), 16, 8, 2),
        ((3,), 16, 8, 0),
    ]:
        asked.clear()
        source = Spy(pyramid(image, *downsamples))
        read_regions([source], torch.tensor([[[origin, 0]]]), (16, 16), scale, Reading())
        assert [one[0] for one in asked] == [level]


@pytest.mark.parametrize(
    ("network", "context"),
    [
        (nn.Conv2d(1, 1, 3, padding=1), 2),
        (nn.Conv2d(1, 1, 3), 1),
        (nn.Conv2d(1, 1, 4, 4), 4),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3), nn.MaxPool2d(4)), 2),
        (nn.Sequential(nn.Conv2d(1, 2, 7, 2, 3), nn.MaxPool2d(3, 2, 1)), 2),  # as ResNets begin: half a pixel beside
    ],
    ids=["same", "valid", "stride", "lost", "padded"],
)
def test_cells_partition_their_region(network, context):
    """The boxes of a second level tile the regions of the first, and patches lie on the middle of what a cell sees."""
    if isinstance(network, nn.Sequential):
        network.append(nn.Conv2d(2, 1, 1)) if not isinstance(network[1], nn.Conv2d) else None
    outer = Zoom(cells_of(8, 1), 8, 1)
    inner = Zoom(network, 2, 1, context=context, receptive_field="auto")
    third = Zoom(cells_of(1, 1), 1, 1)
    model = model_of(outer, inner, third, channels=1)
    image = torch.rand(1, 1, 128, 64, generator=seeded())
    look = model.look(None, image)
    regions, size = model.boxes(0, look, torch.arange(2)[None])
    assert size == (64, 64)
    inside = model.look_into(1, image, regions, size, look.ground)
    count = inside.cells.grid.cells[0] * inside.cells.grid.cells[1]
    assert inside.logits[0].numel() == count
    boxes, side = model.boxes(1, inside, torch.arange(count).expand(2, -1))
    seen = torch.zeros(130, 66, dtype=torch.int64)
    for top, left in boxes.flatten(0, 1).tolist():
        assert top >= 0
        seen[top : top + side[0], left : left + side[1]] += 1
    assert (seen[2:126, 2:62] == 1).all()
    assert seen.sum() == 128 * 64


def test_patches_of_the_last_level_lie_on_their_cells():
    """The brightest pixel of a view has the largest logit; the patch there has that pixel in its middle."""

    class Bright(nn.Module):
        def forward(self, view: Tensor) -> Tensor:
            return 50 * view[:, 0]

    model = model_of(
        Zoom(nn.Sequential(Bright(), nn.MaxPool2d(4)), 8, 1), Zoom(Bright(), 2, 1, context=3), channels=1, patch=2
    )
    for y, x in [(0, 0), (62, 94), (30, 32), (32, 30)]:
        image = torch.zeros(1, 1, 64, 96)
        image[..., y : y + 2, x : x + 2] = 1
        model.selection = "topk"
        _, _, sample = model(None, image)
        assert sample.offsets.tolist() == [[[y, x]]]
        assert sample.patches.min() == 1


def test_sources_and_tensors_of_any_sizes_give_the_same():
    """A batch of equal sizes as a tensor, as tensors, as sources; and unequal ones as each alone."""
    zooms = Zoom(cells_of(4), 8, 2), Zoom(nn.Conv2d(3, 1, 3, padding=1), 4, 3, context=1)
    torch.manual_seed(0)
    model = model_of(*zooms, mean=0.4, std=0.3, positions=False)
    image = bytes_of(2, 64, 96)
    ways = image, list(image), [ats.sources.from_arrays([one]) for one in image]
    results = [model(None, way, generator=seeded(1)) for way in ways]
    for pooled, logits, sample in results[1:]:
        assert_close(pooled, results[0][0])
        assert_close(logits, results[0][1].squeeze(1))
        assert torch.equal(sample.offsets, results[0][2].offsets)
    unequal = [
        bytes_of(1, 64, 96)[0],
        bytes_of(1, 70, 45, seed=1)[0],
        ats.sources.from_arrays([bytes_of(1, 33, 150)[0]]),
    ]
    together = model.full(None, unequal)
    for one, own in zip(unequal, together, strict=True):
        assert_close(model.full(None, [one])[0], own)
    _, logits, sample = model(None, unequal, generator=seeded(2))
    assert logits.shape == (3, 2, 4)
    assert logits[1].isneginf().sum() == 6
    assert torch.equal(sample.counts, torch.tensor([6, 6, 6]))


def test_one_level_of_images_of_any_sizes_is_attention_sampling():
    """The same draws and values, of each image's own grid."""
    attention, feature = nn.Conv2d(3, 1, 3, padding=1), nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 4))
    flat = ats.nn.AttentionSampling(attention, feature, 3, 6, receptive_field="auto")
    deep = NestedAttentionSampling([Zoom(attention, 8, 3)], feature, 6)
    images = [bytes_of(1, 64, 96)[0], bytes_of(1, 72, 40, seed=1)[0], ats.sources.from_arrays([bytes_of(1, 32, 8)[0]])]
    views = read_views(images, 8, Reading())
    want, _, flat_sample = flat(views, images, generator=seeded())
    got, _, sample = deep(views, images, generator=seeded())
    assert_close(got, want)
    assert torch.equal(sample.levels[0].indices, flat_sample.indices)
    assert torch.equal(sample.offsets, flat_sample.offsets)


def test_a_view_may_be_given():
    model, image = small_model((2, 2)), draw_image(2)
    view = ats.area_downsample(image, (1, 9))
    for got, want in zip(
        model(view, image, generator=seeded())[:2], model(None, image, generator=seeded())[:2], strict=True
    ):
        assert_close(got, want)
    with pytest.raises(ValueError, match=r"view of \(2, 18\) pixels is not that .* scale=8, which has \(1, 9\)"):
        model(ats.area_downsample(image, (2, 18)), image)


def test_nothing_is_drawn_outside_of_images_or_masks():
    """At both levels; and with as many draws as there are cells the full model comes out, exactly."""
    zooms = Zoom(cells_of(4, 1), 4, 4), Zoom(cells_of(2, 1), 2, 16)  # regions of 16, cells of 4
    model, image = model_of(*zooms, channels=1, estimator="unordered").double(), draw_image(3, width=90)
    image = F.pad(image, (0, 0, 0, 12))  # 20×90: the second row of cells and the last column are half outside
    view = F.pad(read_views(image, 4, Reading()), (0, 1, 0, 3))  # to 2×6 cells
    mask = torch.rand(3, 8, 24, generator=seeded(1)) < 0.1  # 4×4 elements a cell
    mask[0, 1, 3] = True
    for own in (None, mask, mask[:1]):
        model.levels[0].n, model.levels[1].n = 12, 16
        pooled, _, _ = model(view, image, mask=own)
        assert_close(pooled, model.full(view, image, mask=own))
        model.levels[0].n, model.levels[1].n = 3, 5
        _, _, sample = model(view, image, mask=own)
        for row in sample.table("unordered"):
            y, x = row["top"] + 1, row["left"] + 1  # patches of 6 on cells of 4
            assert y < 20
            assert x < 90
            if own is not None:
                assert own.expand(3, -1, -1)[row["image"], y // 4, x // 4]
        weights = sample.weights("unordered")
        assert_close(weights.sum(1), torch.ones(3).double())
        assert (weights[sample.surplus] == 0).all()
    with pytest.raises(ValueError, match=r"every cell is masked"):
        model(view, image, mask=torch.zeros(8, 24, dtype=torch.bool))


def test_a_mask_of_cells_alone_leaves_the_inner_levels_free():
    model, image = small_model((2, 2)), draw_image(2)
    mask = torch.tensor([[True, False, True]])
    _, logits, sample = model(None, image, mask=mask)
    assert logits.isneginf().tolist() == [[[[False, True, False]]]] * 2
    assert set(sample.levels[0].indices.flatten().tolist()) == {0, 2}
    for own, image_alone in zip(model.full(None, image, mask=mask), image, strict=True):
        logits = model.look(None, image_alone[None], mask).logits.flatten()
        sides = [written_out(model, image_alone[None], 1, (0, 24 * cell, 8, 24))[0] for cell in (0, 2)]
        assert_close(own, logits.softmax(-1)[0] * sides[0] + logits.softmax(-1)[2] * sides[1])


def test_what_was_drawn():
    model, image = small_model((2, 3)), draw_image(4)
    pooled, _, sample = model(None, image, generator=seeded())
    assert len(sample) == 4
    assert [type(level) for level in sample.levels] == [BoxSample, PatchSample]
    assert sample.levels[0].offsets[..., 1].eq(24 * sample.levels[0].indices).all()
    assert (sample.offsets.view(8, 3, 2) == sample.levels[1].offsets).all()
    features = model.feature(sample.patches.flatten(0, 1)).unflatten(0, (4, 6))
    assert_close(torch.einsum("bn,bnd->bd", sample.weights(), features), pooled)
    table = sample.table()
    assert len(table) == 24
    for row in table:
        assert_close(torch.tensor(row["weight"], dtype=torch.float64), sample.weights()[row["image"], row["draw"]])
        place = [row["top"], row["left"]]
        assert sample.offsets[row["image"], row["draw"]].tolist() == place
        region = sample.levels[0].offsets[row["image"], row["region"]]
        assert region.tolist() == [0, (row["left"] + 3) // 24 * 24]
    one = sample[2]
    assert len(one) == 1
    assert torch.equal(one.patches, sample.patches[2:3])
    assert torch.equal(type(sample).cat(list(sample)).offsets, sample.offsets)
    again = pickle.loads(pickle.dumps(sample.detach()))
    assert torch.equal(again.log_attention, sample.log_attention)
    assert sample.boxes().table() == table
    doubled = torch.utils._pytree.tree_map(lambda tensor: tensor * 2, sample)
    assert torch.equal(doubled.entropy, 2 * sample.entropy)
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            sample[wrong]
    with pytest.raises(AttributeError, match="without its patches"):
        _ = sample.boxes().patches


def test_positions_are_of_the_whole_image():
    class Where(nn.Module):
        def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
            return positions

    zooms = Zoom(cells_of(4, 1), 4, 2), Zoom(cells_of(2, 1), 2, 2)
    model = NestedAttentionSampling(zooms, Where(), 4, positions=True)
    image = torch.rand(1, 1, 32, 64, generator=seeded())
    features, levels = model.draw(image, model.look(None, image))
    assert_close(features.view(1, 4, 2), (levels[1].offsets.view(1, 4, 2) + 2) / torch.tensor([32.0, 64.0]))
