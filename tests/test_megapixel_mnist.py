"""`ats.datasets.megapixel_mnist`: the same images everywhere, and images that are what the paper describes."""

import hashlib

import numpy as np
import pytest
import torch

from ats.datasets.megapixel_mnist import GLYPH, MegapixelMNIST
from ats.datasets.mnist import Digits, load_digits

# SHA-256 of the rendered bytes of images 0, 1 and 2 and their labels, from the bundled digits. A change here
# changes every published figure: it must be meant, and the figures made anew.
PINNED = {
    "train": ("103a9aef520393c880f8a2f5a8bc21aa38b7fbdd9e85e1183695cacdb39e93c4", [9, 8, 8]),
    "test": ("7fb1c206eb218eddb2f8ba596b61f03e919c7a1340066c363e1f9460cb59e180", [4, 3, 1]),
}


@pytest.fixture(scope="module")
def digits():
    return load_digits("train")


@pytest.fixture(scope="module")
def dataset(digits):
    return MegapixelMNIST(digits, 60, image_size=300, n_noise=20, n_digits=7, n_target=4)


@pytest.mark.parametrize("split", PINNED)
def test_images_are_the_same_on_every_machine(split):
    dataset = MegapixelMNIST(load_digits(split), 3, split=split)
    checksum, labels = PINNED[split]
    assert hashlib.sha256(dataset.render([0, 1, 2]).numpy().tobytes()).hexdigest() == checksum
    assert dataset.labels.tolist() == labels


def same(a, b):
    return torch.equal(a.render(range(len(a))), b.render(range(len(b)))) and torch.equal(a.labels, b.labels)


def test_a_seed_a_split_and_an_index_make_an_image(digits):
    """Same arguments, same images; the longer set starts with the shorter; another seed or split is another set."""
    small = MegapixelMNIST(digits, 6, image_size=200, seed=3)
    assert same(small, MegapixelMNIST(digits, 6, image_size=200, seed=3))
    longer = MegapixelMNIST(digits, 9, image_size=200, seed=3)
    assert torch.equal(longer.render(range(6)), small.render(range(6)))
    assert torch.equal(longer.labels[:6], small.labels)
    later = MegapixelMNIST(digits, 3, image_size=200, seed=3, first=6)
    assert torch.equal(later.render(range(3)), longer.render([6, 7, 8]))
    assert torch.equal(later.labels, longer.labels[6:])
    others = [{"seed": 4}] + [{"seed": 3, "split": split} for split in ("validation", "test", "small", "medium")]
    sets = [small] + [MegapixelMNIST(digits, 6, image_size=200, **other) for other in others]
    images = [image.numpy().tobytes() for one in sets for image in one.render(range(6))]
    assert len(set(images)) == len(images), "two images are equal that have nothing to do with each other"


def test_label_is_the_class_that_occurs_most(dataset, digits):
    """Exactly n_target digits of it, and the others of other classes."""
    classes = digits.labels[dataset.glyph_ids[:, :7].long()]  # (60, 7)
    for row, label in zip(classes, dataset.labels, strict=True):
        assert row.bincount(minlength=10)[label] == 4
        assert row.bincount().argmax() == label
    assert (dataset.glyph_ids[:, 7:] >= len(digits.images)).all(), "noise must not be a digit"
    assert len(dataset.labels.unique()) == 10


def test_digits_do_not_overlap_and_all_is_inside(dataset):
    places = dataset.places.long()
    assert places.min() >= 0
    assert places.max() <= 300 - GLYPH
    assert places.max() > 300 - 2 * GLYPH, "places must reach the far border"
    digits = places[:, :7]
    apart = (digits.unsqueeze(1) - digits.unsqueeze(2)).abs().amax(-1)  # (60, 7, 7)
    apart += GLYPH * torch.eye(7, dtype=torch.int64)
    assert (apart >= GLYPH).all()


def test_render_is_a_loop_over_glyphs(dataset):
    """The brighter pixel wins where glyphs overlap, and a batch holds its images in the order asked for."""
    images = dataset.render(torch.tensor([5, 2]))
    for image, index in zip(images, (5, 2), strict=True):
        canvas = np.zeros((300, 300), dtype=np.uint8)
        for glyph, (y, x) in zip(dataset.glyph_ids[index].tolist(), dataset.places[index].tolist(), strict=True):
            window = canvas[y : y + GLYPH, x : x + GLYPH]
            np.maximum(window, dataset.glyphs[glyph].numpy(), out=window)
        assert np.array_equal(image[0].numpy(), canvas)


def test_render_equals_getitem(dataset):
    images = dataset.render([0, 7, 59])
    for image, index in zip(images, (0, 7, 59), strict=True):
        one, label = dataset[index]
        assert torch.equal(one, image)
        assert one.dtype == torch.uint8
        assert label == int(dataset.labels[index])
        assert isinstance(label, int)


def test_iteration_ends(digits):
    """Python iterates over indices until IndexError."""
    assert len(list(MegapixelMNIST(digits, 3, image_size=100, n_noise=2))) == 3


def test_noise_is_two_strokes(dataset):
    """Each stroke is at most a diagonal, 3.5 pixels wide: no blots (a stroke of no length is a dot), nothing empty."""
    noise = dataset.glyphs[-2000:]
    ink = (noise > 0).flatten(1).sum(-1)
    assert ink.min() >= 5
    assert ink.max() <= 28 * 28 / 3, f"{int((ink > 28 * 28 / 3).sum())} of 2,000 patches of noise are blots"
    assert len({glyph.numpy().tobytes() for glyph in noise}) > 1990


def test_paper_sized_set_is_small_in_memory(digits):
    """5,000 images of 1500×1500 are 11 GB rendered; kept as glyphs and places they must stay below 50 MB."""
    dataset = MegapixelMNIST(digits, 5000)
    assert dataset[4999][0].shape == (1, 1500, 1500)
    tensors = [value for value in vars(dataset).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) < 50e6
    others = [value for value in vars(dataset).values() if not isinstance(value, (torch.Tensor, int))]
    assert not others, "something that is not counted above"
    frequency = dataset.labels.bincount(minlength=10)
    assert frequency.min() > 370, "5,000/10 less 6 standard deviations: a class that is drawn too seldom"


def test_all_digits_may_be_of_the_target_class(digits):
    dataset = MegapixelMNIST(digits, 5, image_size=200, n_digits=3, n_target=3, n_noise=0)
    assert (digits.labels[dataset.glyph_ids.long()] == dataset.labels.unsqueeze(1)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev', expected one of 'train', 'validation', 'test'"),
        ({"image_size": 27}, "image_size must be at least 28, a digit's size, got 27"),
        ({"image_size": 60}, "5 digits of 28×28 that don't overlap found no room in 60×60; make the images larger"),
        ({"n_target": 2}, "n_target must be more than half of n_digits=5 and no more, got 2"),
        ({"n_target": 6}, "n_target must be more than half of n_digits=5 and no more, got 6"),
        ({"n_digits": 6}, "n_target must be more than half of n_digits=6 and no more, got 3"),
    ],
)
def test_errors(options, message, digits):
    with pytest.raises(ValueError, match=message):
        MegapixelMNIST(digits, 1, **options)


def test_a_class_without_digits(digits):
    few = Digits(digits.images[digits.labels < 9], digits.labels[digits.labels < 9])
    with pytest.raises(ValueError, match=r"every class 0-9, got \[0, 1, 2, 3, 4, 5, 6, 7, 8\]"):
        MegapixelMNIST(few, 1)
