"""Batches of images of different sizes, in memory and on disk: what comes out is what each image alone gives."""

import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torch import nn
from torch.utils.data import DataLoader

import ats
from ats.functional import live_cells, mean_entropy, pad_logits, relative_entropy
from tests.enumeration import enumerate_draws
from tests.helpers import assert_close, cut, seeded
from tests.ragged import SIZES, STEP, Attention, make_images, make_model, one_by_one, stored, views_of

DATA = Path(os.environ.get("ATS_DATA", ""))
needs_files = pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not (DATA / "slides").is_dir(),
    reason="real slides and rasters: set ATS_DATA to a folder that holds slides/ and rasters/",
)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "memory maps", "mixed"])
@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32], ids=str)
def test_a_forward_pass_is_that_of_each_image_alone(kind, padding, dtype, tmp_path):
    images = make_images(dtype)
    views = views_of(images)
    model = make_model(padding=padding, mean=[0.2, 0.3, 0.4], std=[0.5, 0.7, 0.9])
    given = {
        "tensors": lambda: images,
        "arrays": lambda: stored(images),
        "memory maps": lambda: stored(images, tmp_path),
        "mixed": lambda: [images[0], *stored(images)[1:3], images[3]],
    }[kind]()
    pooled, logits, sample = model(views, given, generator=seeded(5))
    assert model.attention.seen == [(2, 3, 12, 16), (1, 3, 24, 10), (1, 3, 9, 20)], "once for all views of one size"
    assert sample.grid_size == (11, 9)
    assert sample.grid_sizes == ((5, 7), (11, 4), (5, 7), (3, 9))
    for number, (own, flat, patches, offsets) in enumerate(one_by_one(model, views, images, sample)):
        height, width = own.shape[-2:]
        assert torch.equal(logits[number, :height, :width], own[0])
        assert logits[number].isneginf().sum() == 99 - height * width, "and nothing but −inf around it"
        assert (flat < height * width).all()
        assert_close(sample.log_attention[number], own.flatten().log_softmax(0)[flat[0]])
        assert torch.equal(sample.offsets[number], offsets[0])
        assert torch.equal(sample.patches[number], patches[0])
        features = model.patch_features(patches, offsets, SIZES[number])
        assert_close(pooled[number], ats.pool(features, sample[number])[0])
    table = sample.table()
    assert [row["top"] for row in table] == sample.offsets[..., 0].flatten().tolist()
    assert all(row["row"] < sample.grid_sizes[row["image"]][0] for row in table)
    assert all(row["column"] < sample.grid_sizes[row["image"]][1] for row in table)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("padding", ["zeros", "edge"])
def test_sources_of_one_size_are_a_tensor(dtype, padding):
    """The very draw and offsets, and the same patches but for rounding."""
    images = make_images(dtype, sizes=[(40, 56)] * 3)
    logits = torch.randn(3, 5, 7, generator=seeded(1))
    options = {"padding": padding, "mean": 0.1, "std": [0.5, 1.0, 2.0]}
    for patch in (6, (50, 3)):  # the second is larger than the image
        want = ats.sample_patches(torch.stack(images), logits, 8, patch, generator=seeded(2), **options)
        for given in (images, stored(images)):
            got = ats.sample_patches(given, logits, 8, patch, generator=seeded(2), **options)
            for name in ("indices", "log_attention", "offsets", "entropy"):
                assert torch.equal(getattr(got, name), getattr(want, name)), name
            torch.testing.assert_close(got.patches, want.patches, rtol=1e-6, atol=1e-6)
            assert got.patches.dtype == want.patches.dtype
            assert (got.grid_sizes, got.padded) == (None, want.padded)


@pytest.mark.parametrize("padding", ["zeros", "edge"])
def test_patches_that_miss_the_image(padding):
    """Cells outside the image: an origin of a placement may put them there, and what is next to them is read."""
    placement = ats.Placement(-9, 10)
    image = make_images(sizes=[(20, 24)])
    cells = ats.sample_cells(torch.zeros(1, 2, 2), 4, generator=seeded())
    options = {"receptive_field": placement, "view_size": (20, 24), "padding": padding}
    (want, got) = (ats.read_patches(given, cells, (2, 9), **options) for given in (image[0][None], stored(image)))
    assert (want.offsets[..., 0] == -5).any()
    assert torch.equal(got.offsets, want.offsets)
    assert torch.equal(got.patches, want.patches)


def test_functions_take_maps_of_different_sizes():
    images, grids = make_images(), [(3, 4), (6, 2), (3, 4), (2, 5)]
    maps = [torch.randn(grid, generator=seeded(i)) for i, grid in enumerate(grids)]
    sample = ats.sample_patches(images, maps, 4, 5, generator=seeded(3))
    padded, own = pad_logits(maps)
    assert own == tuple(grids) == sample.grid_sizes
    again = ats.sample_patches(images, padded, 4, 5, grid_sizes=grids, generator=seeded(3))
    cells = ats.sample_cells(maps, 4, generator=seeded(3))
    module = ats.nn.SamplePatches(4, 5)
    for other in (again, ats.read_patches(images, cells, 5), module(images, maps, generator=seeded(3))):
        assert torch.equal(other.patches, sample.patches)
        assert other.grid_sizes == sample.grid_sizes
    for number, (image, own) in enumerate(zip(images, grids, strict=True)):
        row, column = sample.indices[number] // 5, sample.indices[number] % 5
        for n in range(4):
            y = round((row[n].item() + 0.5) * image.shape[1] / own[0] - 2.5)
            x = round((column[n].item() + 0.5) * image.shape[2] / own[1] - 2.5)
            assert_close(sample.patches[number, n].double(), cut(image, y, x, (5, 5)) / 255, torch.float32)
    with pytest.raises(ValueError, match=r"image 0 is −inf, as padding is: pass .*grid_sizes=sample.grid_sizes"):
        ats.sample_patches(images, padded, 4, 5)
    assert ats.sample_patches(images, padded, 4, 5, grid_sizes=[(6, 5)] * 4).grid_sizes is None  # it is a mask then


def test_an_image_with_fewer_cells_than_draws_stops_no_batch():
    """All of its cells are read, and weighted by their attention: the sum itself."""
    images = make_images()
    views = views_of(images)
    model = make_model(n=30)
    for given in (images, stored(images)):
        pooled, logits, sample = model(views, given, generator=seeded())
        assert sample.padded
        assert sample.counts.tolist() == [30, 30, 30, 27]
        assert_close(pooled[3], model.full(views[3][None], images[3][None])[0])
        assert (sample.indices[3, 27:] == -1).all()
        again, _ = model.draw(
            given, logits, [view.shape[-2:] for view in views], grid_sizes=sample.grid_sizes, generator=seeded()
        )
        assert_close(again, pooled)
    masks = [torch.ones(grid, dtype=torch.bool) for grid in sample.grid_sizes]
    masks[1][:, 1:] = False
    masks[1][1:] = False
    pooled, logits, sample = model(views, stored(images), mask=masks, generator=seeded())
    assert sample.counts.tolist() == [30, 1, 30, 27]
    assert live_cells(logits).tolist() == [35, 1, 35, 27]
    assert_close(
        pooled, torch.stack([full(model, views, images, masks, b) if b in (1, 3) else pooled[b] for b in range(4)])
    )


def full(model, views, images, masks, number):
    return model.full(views[number][None], images[number][None], mask=masks[number])[0]


def test_full_predict_and_anytime_are_each_images_own(tmp_path):
    images = make_images()
    views = views_of(images)
    model, head = make_model(), nn.Linear(7, 3).double()
    masks = [torch.rand(grid, generator=seeded(9)) > 0.3 for grid in [(5, 7), (11, 4), (5, 7), (3, 9)]]
    masks[0][1:] = False  # 7 cells at most
    for given in (images, stored(images, tmp_path)):
        whole = model.full(views, given, mask=masks, chunk_size=10)
        alone = [model.full(v[None], i[None], mask=m) for v, i, m in zip(views, images, masks, strict=True)]
        assert_close(whole, torch.cat(alone))
        exact = head(whole)
        read_all = ats.predict(model, head, views, given, mask=masks, n_patches=60, generator=seeded())
        assert_close(read_all.logits, exact)
        assert read_all.patches_used.tolist() == [int(mask.sum()) for mask in masks]
        assert_close(ats.anytime(model, head, views, given, mask=masks, budget=60, tolerance=0.0).logits, exact)
        some = ats.anytime(model, head, views, given, budget=20, tolerance=0.05, min_patches=4, generator=seeded(1))
        assert len(set(some.patches_used.tolist())) > 1, "images that stop one by one are what is to be tried"
        predicted = ats.predict(model, head, views, given, n_patches=5, repeats=2, generator=seeded(1))
        for result in (some, predicted):
            for number, sample in enumerate(result.samples):
                assert set(sample.own_grids()) == {(5, 7) if number in (0, 2) else [0, (11, 4), 0, (3, 9)][number]}
                boxes = list(one_by_one(model, [views[number]], [images[number]], sample))
                assert torch.equal(sample.offsets[:1], boxes[0][3])
                features = [
                    model.patch_features(p, o, SIZES[number])
                    for row in sample
                    for _, _, p, o in one_by_one(model, [views[number]], [images[number]], row)
                ]
                pooled = ats.pool(torch.cat(features), sample, estimator="unordered")
                assert_close(result.logits[number], head(pooled).mean(0))


def test_the_estimate_and_its_gradient_are_unbiased_with_padded_rows(monkeypatch):
    """Every draw of both images by enumeration, through the model: one has as many cells as are drawn, one has more."""
    images = [torch.rand(1, *size, generator=seeded(i), dtype=torch.float64) for i, size in enumerate([(2, 2), (4, 6)])]
    views = [
        torch.rand(1, *size, generator=seeded(i + 5), dtype=torch.float64) for i, size in enumerate([(1, 1), (2, 3)])
    ]
    attention = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()).double()
    feature = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    model = ats.nn.AttentionSampling(attention, feature, 2, 2)
    parameters = [*attention.parameters(), *feature.parameters()]
    target = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)

    def gradient(pooled):
        return torch.autograd.grad((pooled * target).sum(), parameters)

    logits, grids = model.attend(views, images)
    assert grids == ((1, 1), (2, 3))
    draws, probabilities = enumerate_draws(logits.detach()[1].flatten().softmax(0), 2)  # of the second image's 6 cells
    value, slope = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for draw, probability in zip(draws, probabilities, strict=True):
        fresh, _ = model.attend(views, images)
        flat = fresh.flatten(1)
        log_attention = flat.log_softmax(1)
        surplus = torch.tensor(-torch.inf, dtype=torch.float64)
        cells = ats.CellSample(
            indices=torch.stack([torch.tensor([0, -1]), draw]),
            log_attention=torch.stack([torch.stack([log_attention[0, 0], surplus]), log_attention[1, draw]]),
            logsumexp=flat.logsumexp(1),
            entropy=flat.new_zeros(2),
            replace=False,
            selection="sample",
            grid_size=(2, 3),
            grid_sizes=grids,
            padded=True,
        )
        monkeypatch.setattr(model.sampler, "draw", lambda *_, cells=cells, **__: cells)
        pooled, _, _ = model(views, images)
        value = value + probability * pooled.detach()
        slope = [total + probability * part for total, part in zip(slope, gradient(pooled), strict=True)]
    whole = model.full(views, images)
    assert_close(value, whole.detach())
    for got, want in zip(slope, gradient(whole), strict=True):
        assert_close(got, want)


def test_gradients_reach_images_and_networks():
    images = [image.double().requires_grad_() for image in make_images(torch.float32)]
    model = make_model()
    views = views_of([image.detach() for image in images])
    pooled, _, sample = model(views, images, generator=seeded())
    got = torch.autograd.grad(pooled.square().sum(), [*images, *model.parameters()])
    model.sampler.draw = None
    parts = []
    for number, (_, _, patches, offsets) in enumerate(one_by_one(model, views, images, sample)):
        features = model.patch_features(patches, offsets, SIZES[number])
        logits = model.attention(views[number][None]).flatten()
        row, column = sample.indices[number] // 9, sample.indices[number] % 9
        own = logits.log_softmax(0)[row * sample.grid_sizes[number][1] + column]
        parts.append(ats.expectation(features, own[None]))
    want = torch.autograd.grad(torch.cat(parts).square().sum(), [*images, *model.parameters()])
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs)
    assert all(gradient.abs().sum() > 0 for gradient in got)
    pooled, _, _ = model_of_stored = make_model()(views, stored(make_images(torch.float32)), generator=seeded())
    assert len(model_of_stored) == 3
    assert all(p.grad is None for p in model.parameters())
    pooled.sum().backward()


class Views(torch.utils.data.Dataset):
    def __init__(self, sources):
        self.sources = sources

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, number):
        return number, ats.read_view(self.sources[number], scale=1 / STEP)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["memory maps", "slides"])
def test_workers_read_views_while_the_parent_reads_patches(start, kind, tmp_path):
    images = make_images(sizes=[(160, 96), (96, 160), (128, 128), (160, 96), (96, 160), (128, 128)])
    if kind == "slides":
        for number, image in enumerate(images):
            write_slide(tmp_path / f"{number}.tif", image)
        sources = [ats.open_image(tmp_path / f"{number}.tif", backend="openslide") for number in range(6)]
    else:
        sources = stored(images, tmp_path)
    torch.manual_seed(0)
    model = ats.nn.AttentionSampling(Attention(), nn.Flatten(), 5, 7, receptive_field=2).eval()
    model([ats.read_view(sources[0], scale=1 / STEP)], sources[:1])  # so that files are open before a fork
    loader = DataLoader(
        Views(sources), 3, num_workers=2, collate_fn=list, multiprocessing_context=multiprocessing.get_context(start)
    )
    seen = 0
    for batch in loader:
        numbers, views = zip(*batch, strict=True)
        got = model(views, [sources[number] for number in numbers], generator=seeded())[2]
        memory = [ats.area_downsample(images[number][None], view.shape[-2:])[0] for number, view in batch]
        want = model(memory, [images[number] for number in numbers], generator=seeded())[2]
        for name in ("indices", "offsets", "patches"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=1e-6)
        seen += len(numbers)
    assert seen == 6


def write_slide(path, image):
    with tifffile.TiffWriter(path) as file:
        file.write(image.permute(1, 2, 0).numpy(), tile=(64, 64), photometric="rgb", metadata=None)


@needs_files
def test_real_slides_and_rasters():
    """OpenSlide beside rasterio beside a tensor, in one batch."""
    sources = [
        ats.open_image(DATA / "slides" / "CMU-1-Small-Region.svs"),
        ats.open_image(DATA / "rasters" / "RGB.byte.tif"),
    ]
    images = [source.read(0, 0, 0, source.levels[0].height, source.levels[0].width) for source in sources]
    assert len({(type(source).__name__, source.levels[0]) for source in sources}) == 2
    views = [ats.read_view(source, scale=1 / 32) for source in sources]
    torch.manual_seed(0)
    model = ats.nn.AttentionSampling(Attention(), nn.Flatten(), 12, 50, receptive_field=2, mean=0.5, std=0.2).eval()
    for given in (sources, [images[0], sources[1]]):
        got = model(views, given, generator=seeded())[2]
        want = model(views, images, generator=seeded())[2]
        for name in ("indices", "offsets", "patches"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.patches.std() > 0.1


def test_samples_keep_each_images_grid():
    maps = [torch.randn(grid, generator=seeded(1)) for grid in [(3, 4), (6, 2), (2, 5)]]
    sample = ats.sample_patches(make_images(sizes=SIZES[:3]), maps, 4, 5)
    assert sample[1].grid_sizes == ((6, 2),)
    assert sample[-2:].grid_sizes == ((6, 2), (2, 5))
    assert sample[0].grid_size == (6, 5)
    together = type(sample).cat([sample[2], sample[0]])
    assert together.grid_sizes == ((2, 5), (3, 4))
    for copied in (sample.boxes(), sample.cpu(), pickle.loads(pickle.dumps(sample))):
        assert copied.grid_sizes == sample.grid_sizes
    leaves, spec = torch.utils._pytree.tree_flatten(sample)
    spec = torch.utils._pytree.treespec_loads(torch.utils._pytree.treespec_dumps(spec))
    assert torch.utils._pytree.tree_unflatten(leaves, spec).grid_sizes == sample.grid_sizes
    assert "grid_sizes=((3, 4), (6, 2), (2, 5))" in repr(sample)
    assert "grid_sizes" not in repr(ats.sample_cells(torch.zeros(1, 2, 2), 1))


def test_relative_entropy_compares_images_of_different_sizes():
    maps = [torch.zeros(3, 4), torch.zeros(2, 2), torch.tensor([[0.0]]), torch.tensor([[0.0, -torch.inf]])]
    maps = [one.double().requires_grad_() for one in maps]
    sample = ats.sample_cells(maps, 1)
    logits, _ = pad_logits(maps)
    assert live_cells(logits).tolist() == [12, 4, 1, 1]
    assert_close(relative_entropy(sample.entropy, live_cells(logits)), torch.ones(4, dtype=torch.float64))
    assert_close(mean_entropy(ats.sample_cells(logits[:2], 1)), sample.entropy[:2].mean())
    uniform = ats.sample_cells([torch.zeros(3, 4).double(), torch.zeros(2, 2).double()], 1)
    assert_close(mean_entropy(uniform), torch.tensor(np.log(12)).double())
    peaked = [torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True), torch.zeros(1, 1).double()]
    sample = ats.sample_cells(peaked, 1)
    relative = relative_entropy(sample.entropy, live_cells(pad_logits(peaked)[0]))
    (gradient,) = torch.autograd.grad(relative.sum(), peaked[:1])
    attention = peaked[0].detach().flatten().softmax(0)
    entropy = -(attention * attention.log()).sum()
    assert_close(gradient.flatten(), -attention * (attention.log() + entropy) / np.log(3))
