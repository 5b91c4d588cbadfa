"""Quantities that fit but cannot be meant: refused, or warned of once; and those beside them that can pass."""

import warnings

import numpy as np
import pytest
import torch

import ats
from ats_kernels import area_downsample, estimator_weights, expectation, extract_patches, plausible, sample
from ats_kernels.pooling.variance import estimate
from tests.helpers import randn, seeded

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(autouse=True)
def nothing_warned_of(monkeypatch):
    monkeypatch.setattr(plausible, "_warned", set())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cells", [2, 400, 40_000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
def test_attention_in_place_of_logits(scale, cells, dtype):
    """A second softmax makes it next to uniform. What comes before it, and its logarithm, are taken."""
    logits = scale * randn(3, cells)
    attention = logits.softmax(-1).to(dtype)
    with pytest.raises(ValueError, match=r"add up to 1 in every row.*pass what comes before it, or logits.log\(\)"):
        sample(attention, 2)
    grid = attention.view(3, 1, -1) if cells == 2 else attention.view(3, 20, -1)
    with pytest.raises(ValueError, match="add up to 1 in every row"):
        ats.sample_patches(torch.zeros(3, 1, 50, 50), grid, 2, 4)
    draw, expected = (sample(z, 1, generator=seeded()) for z in (attention.double().log(), logits))
    if dtype == torch.float64:
        assert torch.equal(draw.indices, expected.indices)
    sample(logits.to(dtype), 2)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(2, 400),
        torch.full((2, 400), 1 / 401),
        torch.tensor([[0.5, 0.5], [0.5, 0.6]]),
        torch.tensor([[1.5, -0.5]]),
        torch.zeros(1, 1) + 1,
        torch.full((2, 40), 1 / 40).log(),
    ],
    ids=["zeros", "sum below 1", "one row of two", "a negative one", "one cell", "log"],
)
def test_logits_beside_an_attention_pass(logits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(logits, 1)


def test_one_cell_marked_by_1_is_warned_of_once():
    logits = torch.zeros(2, 30)
    logits[:, 4] = 1.0
    with pytest.warns(UserWarning, match="every row has a single 1"):
        sample(logits, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(logits, 2)


@pytest.mark.parametrize(
    "given",
    [
        {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
        {"mean": 127.5},
        {"mean": 1.01},
        {"std": 255.0},
        {"mean": np.array([0.5, 0.5, 128])},
    ],
)
def test_statistics_of_bytes_are_refused_for_bytes(given):
    image = torch.randint(256, (1, 3, 20, 20), dtype=torch.uint8)
    for run in (
        lambda **kw: area_downsample(image, 4, **kw),
        lambda **kw: extract_patches(image, torch.zeros(1, 1, 2).long(), 4, **kw),
        lambda **kw: ats.sample_patches(image, torch.zeros(1, 4, 4), 1, 4, **kw),
    ):
        with pytest.raises(ValueError, match=r"of bytes, but a uint8 image is scaled to.*divide mean and std by 255"):
            run(**given)
        run(**{name: torch.as_tensor(value) / 255 for name, value in given.items()})
    area_downsample(image.to(torch.int16), 4, **given)
    area_downsample(image.float(), 4, **given)


@pytest.mark.parametrize("op", ["patches", "view"])
def test_a_float_image_of_bytes_is_warned_of_once(op):
    def run(image, **given):
        if op == "view":
            return area_downsample(image, 4, **given)
        return extract_patches(image, torch.zeros(1, 1, 2).long(), 9, **given)

    image = torch.randint(256, (1, 3, 20, 20), generator=seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(image.to(torch.uint8), **IMAGENET)
        run(image / 255, **IMAGENET)
        run(image.float(), mean=[120.0] * 3, std=[60.0] * 3)
        run(image.float())
    with pytest.warns(UserWarning, match=r"floating-point numbers up to .* pass image / 255, or bytes as uint8"):
        run(image.float(), **IMAGENET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(image.float(), **IMAGENET)


@pytest.mark.parametrize("grid", [(1, 400), (400, 1), (1, 16)], ids=str)
def test_a_list_of_scores_is_no_map(grid):
    image = torch.zeros(2, 1, 60, 60)
    scores = torch.randn(2, *grid)
    with pytest.raises(ValueError, match=r"cuts an image of \(60, 60\) into strips.*logits.reshape\(B, gh, gw\)"):
        ats.sample_patches(image, scores, 2, 4)
    side = int((grid[0] * grid[1]) ** 0.5)
    ats.sample_patches(image, scores.reshape(2, side, side), 2, 4)


@pytest.mark.parametrize(
    ("grid", "image"), [((1, 4), (60, 60)), ((1, 40), (30, 1200)), ((16, 1), (160, 20)), ((2, 40), (60, 60))], ids=str
)
def test_strips_that_can_be_meant_pass(grid, image):
    ats.sample_patches(torch.zeros(2, 1, *image), torch.randn(2, *grid), 2, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("estimator", ["ordered", "unordered"])
def test_more_probability_than_there_is(estimator, dtype):
    """Cells drawn with replacement repeat: as different cells they would have more than all of the mass."""
    logits = torch.zeros(2, 8)
    logits[1, 0] = 8.0
    log_attention = sample(logits, 5, replace=True, generator=seeded()).log_attention.to(dtype)
    features = torch.ones(2, 5, 3)
    for pool in (expectation, estimate):
        with pytest.raises(ValueError, match=r"of row 1 add up to 4\.9.*pooled with replace=True"):
            pool(features, log_attention, estimator=estimator)
        pool(features, log_attention, replace=True)
    with pytest.raises(ValueError, match="pooled with replace=True"):
        estimator_weights(log_attention, estimator=estimator)
    distinct = sample(torch.zeros(2, 5), 5, generator=seeded()).log_attention.to(dtype)  # all of the mass, rounded
    expectation(features, distinct, estimator=estimator)


def test_values_are_not_looked_at_on_another_device_or_in_a_trace():
    attention = torch.full((2, 16), 1 / 16)
    sample(attention.to("meta"), 2)
    compiled = torch.compile(lambda x: sample(x, 2).log_attention, backend="aot_eager", fullgraph=True)
    compiled(attention)
