"""Sizes and statistics in NumPy's types, tensors and Python's own: the same everywhere, or refused by name."""

import numpy as np
import pytest
import torch
from torch import nn

import ats
from ats_kernels import area_downsample, extract_patches, sample
from ats_kernels.checks import check_count, check_pair
from tests.helpers import seeded

IMAGE = torch.randint(256, (2, 3, 24, 20), dtype=torch.uint8, generator=seeded())
LOGITS = torch.randn(2, 6, 5, generator=seeded())

WHOLE = [np.int64, np.uint8, np.array, torch.tensor, lambda n: np.array([n])[0]]
NUMBERS = [np.float32, np.float64, np.array, torch.tensor, lambda x: torch.tensor(x, requires_grad=True), float]
SEQUENCES = [
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda v: np.array(v, np.float32),
    lambda v: [np.float32(x) for x in v],
]


@pytest.mark.parametrize("make", WHOLE)
def test_whole_numbers(make):
    """n, patch and view sizes, receptive field: all ways of calling give what Python's int gives."""

    def run(make):
        generator = seeded()
        out = [sample(LOGITS.flatten(1), make(4), generator=generator).indices]
        for sizes in (make(4), (make(4), make(4)), [make(4)] * 2):
            out.append(ats.sample_patches(IMAGE, LOGITS, make(4), sizes, generator=generator).patches)
            out.append(area_downsample(IMAGE, sizes))
        options = {"receptive_field": make(2), "view_size": (make(12), make(10))}
        out.append(ats.sample_patches(IMAGE, LOGITS, make(4), make(4), generator=generator, **options).offsets)
        pairs = (make(6), make(5)), (make(24), make(20)), (make(4), make(4))
        out.append(ats.cell_offsets(torch.arange(30), *pairs, **options))
        out.append(ats.patch_positions(out[-1], pairs[2], pairs[1]))
        sampler = ats.nn.SamplePatches(make(4), make(4), receptive_field=make(2))
        out.append(sampler(IMAGE, LOGITS, view_size=(make(12), make(10)), generator=generator).offsets)
        return out

    for got, want in zip(run(make), run(int), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("make", [np.array, torch.tensor, torch.Size, tuple, list])
def test_pairs(make):
    assert check_pair("size", make([3, 4])) == (3, 4)
    assert all(type(side) is int for side in check_pair("size", make([3, 4])))


@pytest.mark.parametrize("make", NUMBERS)
def test_a_number_for_all_channels(make):
    expected = area_downsample(IMAGE, 4, mean=0.5, std=0.25)
    assert torch.equal(area_downsample(IMAGE, 4, mean=make(0.5), std=make(0.25)), expected)
    sampler = ats.nn.SamplePatches(4, 4, mean=make(0.5), std=make(0.25))
    assert "mean=" in repr(sampler)


@pytest.mark.parametrize("make", SEQUENCES)
def test_one_a_channel(make):
    mean, std = [0.5, 0.25, 0.125], [0.5, 1.0, 2.0]
    offsets = torch.zeros(2, 1, 2).long()
    expected = extract_patches(IMAGE, offsets, 4, mean=mean, std=std)
    assert torch.equal(extract_patches(IMAGE, offsets, 4, mean=make(mean), std=make(std)), expected)


@pytest.mark.parametrize("make", [*SEQUENCES, np.float32])
def test_a_model_prints(make):
    """Statistics of every kind are in its description."""
    mean = make(0.5) if make is np.float32 else make([0.5, 0.25, 0.125])
    model = ats.nn.AttentionSampling(nn.Conv2d(3, 1, 3), nn.Identity(), 4, 8, mean=mean, std=mean)
    assert "mean=" in str(model)
    assert "0.5" in str(model)


@pytest.mark.parametrize("make", WHOLE)
def test_how_patches_are_inferred(make):
    model = ats.nn.AttentionSampling(nn.Conv2d(3, 1, 1), nn.Flatten(), 4, 2).eval()
    head = nn.Linear(12, 2)
    view = area_downsample(IMAGE, 6)
    run = [
        lambda make: ats.predict(model, head, view, IMAGE, n_patches=make(3), repeats=make(2), generator=seeded()),
        lambda make: ats.anytime(
            model, head, view, IMAGE, budget=make(6), min_patches=make(2), chunk_size=make(2), lead=1.0,
            generator=seeded(),
        ),
    ]  # fmt: skip
    for call in run:
        assert torch.equal(call(make).logits, call(int).logits)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.0, r"n must be an int, got float: 2.0; n=int\(2.0\) is the same number"),
        (2.5, "n must be an int, got float: 2.5$"),
        (np.float32(2), r"n must be an int, got float32: .*int\("),
        (True, "n must be an int, got bool"),
        (np.True_, "n must be an int, got bool"),
        (torch.tensor(True), "n must be an int, got Tensor"),
        (torch.tensor(2.0), "n must be an int, got Tensor"),
        (np.array([2, 3]), "n must be an int, got ndarray"),
        (torch.tensor([2, 3]), "n must be an int, got Tensor"),
        ("2", "n must be an int, got str"),
        (None, "n must be an int, got NoneType"),
    ],
    ids=repr,
)
def test_what_is_no_whole_number_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        check_count("n", value)
    with pytest.raises(TypeError, match="receptive_field must be an int, got"):
        ats.nn.SamplePatches(4, 4, receptive_field=value)


@pytest.mark.parametrize("value", ["0.5", True, [0.5, None, 0.5], {"a": 1}, np.array(["a", "b", "c"]), 1j], ids=repr)
@pytest.mark.parametrize("name", ["mean", "std"])
def test_what_is_no_number_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, or one a channel, got"):
        area_downsample(IMAGE, 4, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [0.5, float("nan"), 0.5]], ids=repr)
@pytest.mark.parametrize("name", ["mean", "std"])
def test_numbers_are_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        area_downsample(IMAGE, 4, **{name: value})
