"""`ats.datasets.gigapixel_mnist`: images are what they say, the same everywhere, and any box is their mean."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ats
from ats.datasets.gigapixel_mnist import INHABITED_SHADE, SHADE, GigapixelMNIST
from ats.datasets.mnist import Digits, load_digits
from ats.nn import NestedAttentionSampling, Zoom
from tests.helpers import assert_close, seeded

SMALL = {
    "image_size": 640,
    "n_places": 6,
    "place_size": 128,
    "place_noise": 3,
    "n_noise": 40,
    "n_inhabited": 3,
    "n_target": 2,
}
PINNED = (
    "002af217a4e06a811c462155cc2cc3e870213cc2e6a9acacb4f319ae80abe051"  # of pixels and labels; must be meant to change
)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits("train")


@pytest.fixture(scope="module")
def dataset(digits: Digits) -> GigapixelMNIST:
    return GigapixelMNIST(digits, 12, **SMALL)


def painted(dataset: GigapixelMNIST, index: int) -> np.ndarray:
    """The image painted glyph by glyph, (H, W) bytes, in which whatever is brighter wins."""
    scene = dataset.scene(index)
    canvas = np.zeros((dataset.image_size, dataset.image_size), np.uint8)
    for number, (y, x) in enumerate(scene.places):
        shade = INHABITED_SHADE if number < dataset.n_inhabited else SHADE
        canvas[y : y + dataset.place_size, x : x + dataset.place_size] = shade
    for glyph, (y, x) in zip(scene.glyph_ids, scene.corners, strict=True):
        box = canvas[y : y + 28, x : x + 28]
        np.maximum(box, dataset.glyphs[glyph], out=box)
    return canvas


@pytest.mark.parametrize("index", [0, 7])
def test_any_box_at_any_scale_is_the_mean_of_its_pixels(dataset, index):
    """Inside, across glyphs and places, beyond the border; scales that do and don't divide what they meet."""
    whole = torch.from_numpy(painted(dataset, index).astype(np.float64) / 255)[None, None]
    padded = F.pad(whole, [400] * 4)
    corners = torch.randint(-200, 600, (40, 2), generator=seeded(index)).tolist()
    for number, (top, left) in enumerate([[0, 0], *corners]):
        for scale in (1, 2, 5, 8, 27, 28, 30, 128):
            height, width = scale * max(1, 96 // scale), scale * max(1, (40 + number) // scale)
            want = F.avg_pool2d(padded[..., top + 400 : top + 400 + height, left + 400 : left + 400 + width], scale)[0]
            assert_close(dataset.render(index, top, left, height, width, scale=scale), want, torch.float32)


def test_what_is_in_an_image(dataset, digits):
    """Glyphs keep apart, digits lie in inhabited places, noise elsewhere lies outside of all places."""
    labels = torch.cat([digits.labels, torch.full((2000,), -1)])
    for index in range(len(dataset)):
        scene = dataset.scene(index)
        apart = np.abs(scene.corners[:, None] - scene.corners).max(-1) + 28 * np.eye(len(scene.corners), dtype=int)
        assert apart.min() >= 28
        between = np.abs(scene.places[:, None] - scene.places).max(-1) + 128 * np.eye(6, dtype=int)
        assert between.min() >= 128
        assert scene.corners.min() >= 0
        assert scene.corners.max() <= 640 - 28
        classes = labels[scene.glyph_ids].numpy()
        assert (classes[:3] >= 0).all()
        assert (classes[3:] == -1).all()
        assert np.bincount(classes[:3]).argmax() == dataset.labels[index]
        assert (classes[:3] == int(dataset.labels[index])).sum() == 2
        inside = ((scene.corners[:, None] >= scene.places) & (scene.corners[:, None] <= scene.places + 100)).all(-1)
        assert inside[:3].argmax(1).tolist() == [0, 1, 2]
        assert inside[3:21].sum(0).tolist() == [3] * 6
        beyond = (scene.corners[21:, None] + 28 <= scene.places) | (scene.corners[21:, None] >= scene.places + 128)
        assert beyond.any(-1).all()
        assert len(scene.corners) == 3 + 18 + 40


def test_a_seed_a_split_and_an_index_make_an_image(digits):
    assert fingerprint_of(GigapixelMNIST(digits, 2, **SMALL)) == PINNED
    small = GigapixelMNIST(digits, 4, seed=3, **SMALL)
    longer = GigapixelMNIST(digits, 6, seed=3, **SMALL)
    later = GigapixelMNIST(digits, 2, seed=3, first=4, **SMALL)
    assert torch.equal(longer.labels, torch.cat([small.labels, later.labels]))
    for index in range(2):
        assert (painted(later, index) == painted(longer, 4 + index)).all()
        assert later[index][0].fingerprint == longer[4 + index][0].fingerprint
    others = [GigapixelMNIST(digits, 1, **{**SMALL, **change}) for change in ({"seed": 4}, {"split": "test"}, {})]
    images = {painted(one, 0).tobytes() for one in others}
    assert len(images) == 3
    assert len({one[0][0].fingerprint for one in others}) == 3


def fingerprint_of(dataset: GigapixelMNIST) -> str:
    pixels = b"".join(painted(dataset, index).tobytes() for index in range(len(dataset)))
    return hashlib.sha256(pixels + bytes(dataset.labels.tolist())).hexdigest()


def test_labels_are_spread_over_all_classes(digits):
    counts = GigapixelMNIST(digits, 1000, **SMALL).labels.bincount(minlength=10)
    assert counts.min() > 60  # of 1,000 even draws: below once in 100,000 seeds


@pytest.mark.parametrize("size", [8192, 32768])
def test_the_sizes_of_the_task(digits, size):
    """A gigapixel takes as much memory as its glyphs; at 1/128 places show, and inhabited ones a little more."""
    dataset = GigapixelMNIST(digits, 1, image_size=size)
    scene, (image, _) = dataset.scene(0), dataset[0]
    assert len(scene.corners) == 5 + 24 * 40 + 20_000 * size**2 // 32768**2
    assert sum(part.nbytes for part in scene) < 1_000_000
    view = ats.read_view(image, scale=1 / 128)[0]
    assert view.shape == (size // 128, size // 128)
    means = [view[y // 128 + 1 : y // 128 + 8, x // 128 + 1 : x // 128 + 8].mean() * 255 for y, x in scene.places]
    assert min(means[:5]) > max(means[5:]) + 4
    assert view.mean() * 255 < 12


def test_an_image_is_a_source(dataset):
    """Levels, boxes and views are those of the painted image in memory; nested sampling sees the same."""
    image, label = dataset[5]
    assert isinstance(image, ats.ImageSource)
    assert label == dataset.labels[5]
    assert [level.height for level in image.levels] == [640, 320, 160, 80, 40, 20, 10, 5]
    whole = torch.from_numpy(painted(dataset, 5))[None].float() / 255
    assert_close(image.read(0, 100, 200, 50, 60), whole[:, 100:150, 200:260])
    assert_close(image.read(3, 10, 20, 5, 6), F.avg_pool2d(whole, 8)[:, 10:15, 20:26])
    assert_close(ats.read_view(image, scale=1 / 16), ats.area_downsample(whole[None], (40, 40))[0])
    again = pickle.loads(pickle.dumps(image))
    assert torch.equal(again.read(2, 0, 0, 160, 160), image.read(2, 0, 0, 160, 160))
    torch.manual_seed(0)
    zooms = Zoom(nn.Conv2d(1, 1, 4, 4), 32, 3), Zoom(nn.Conv2d(1, 1, 3, padding=1), 8, 2, context=1)
    model = NestedAttentionSampling(zooms, nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 3)), 32).eval()
    (from_source, _, one), (from_memory, _, other) = (
        model(None, [each], generator=seeded()) for each in (image, whole)
    )
    assert torch.equal(one.offsets, other.offsets)
    assert_close(from_source, from_memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "small"}, "unknown split 'small'"),
        ({"n_noise": -1}, "at least 0"),
        ({"n_target": 1}, "more than half"),
        ({"n_inhabited": 7, "n_target": 4}, "no more than n_places"),
        ({"place_noise": 4}, "has room for 4 glyphs"),
        ({"n_places": 17}, "have room for 9 places"),
        ({"image_size": 100}, "have room for 0 places"),
    ],
)
def test_mistakes(digits, change, message):
    with pytest.raises(ValueError, match=message):
        GigapixelMNIST(digits, 1, **{**SMALL, **change})


def test_mistakes_in_use(dataset, digits):
    with pytest.raises(ValueError, match="every class 0-9"):
        GigapixelMNIST(Digits(digits.images[:1], digits.labels[:1]), 1, **SMALL)
    with pytest.raises(ValueError, match="pass a smaller n_noise"):
        GigapixelMNIST(digits, 1, **{**SMALL, "n_noise": 200}).scene(0)
    with pytest.raises(ValueError, match="whole pixels of scale=3"):
        dataset.render(0, 0, 0, 4, 3, scale=3)
    with pytest.raises(ValueError, match="not inside level 0"):
        dataset[0][0].read(0, 0, 0, 641, 1)
    with pytest.raises(IndexError):
        dataset[12]
    assert dataset[-1][0].index == 11
