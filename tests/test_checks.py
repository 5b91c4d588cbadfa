"""Checks that several ops share, where no op's own tests reach them on a CPU."""

import pytest
import torch

from ats_kernels.checks import check_generator, check_image, check_log_probabilities
from tests.helpers import randn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_probabilities_pass(dtype):
    """What softmax gives in any precision, masked cells, poisoned rows and a value that rounding left above 0."""
    value = (randn(4, 7) * 30).to(dtype).log_softmax(-1)
    value[1], value[2, 3] = float("nan"), -float("inf")
    check_log_probabilities("log_attention", value)
    check_log_probabilities("log_attention", torch.tensor([[2.0**-23, -3.0]]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_what_is_no_log_probability_is_refused(kind, dtype):
    """Weights of it would be wrong without a word: exp of a probability is above 1."""
    value = randn(3, 5)
    value = (value.softmax(-1) if kind == "probabilities" else value).to(dtype)
    count = int((value > 0).sum())
    with pytest.raises(
        ValueError, match=rf"log_attention holds {count} value\(s\) above 0.*log_attention of PatchSample"
    ):
        check_log_probabilities("log_attention", value.requires_grad_())


def test_a_bad_row_beside_a_poisoned_one_is_found():
    value = torch.tensor([[float("nan"), float("nan")], [0.25, -1.0]])
    with pytest.raises(ValueError, match=r"1 value\(s\) above 0, up to 0.25"):
        check_log_probabilities("log_attention", value)


def test_values_are_looked_at_on_the_cpu_only():
    """On a GPU the host would have to wait; a tensor without values stands in for one there."""
    check_log_probabilities("log_attention", torch.ones(2, 3, device="meta"))


def test_a_generator_belongs_to_the_logits_device():
    check_generator(torch.Generator(), torch.device("cpu"))
    check_generator(None, torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"generator is on cpu but the logits are on cuda:1.*torch.Generator\('cuda'\)"
    ):
        check_generator(torch.Generator(), torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 1500, 1500), torch.uint8),
        ((2, 3, 64, 3), torch.uint8),  # three columns of an image of three channels
        ((1, 16, 64, 4), torch.uint8),
        ((1, 64, 500, 1), torch.float32),  # signals of 64 channels
        ((1, 512, 8, 4), torch.float32),  # a small map of features
    ],
)
def test_images_with_few_columns_pass(shape, dtype):
    check_image(torch.empty(shape, dtype=dtype, device="meta"))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (2, 480, 640, 3),
            torch.uint8,
            r"got \(2, 480, 640, 3\), whose channels seem to come last.*image.movedim\(-1, 1\)",
        ),
        ((2, 480, 640, 4), torch.float32, r"channels seem to come last"),
        ((2, 480, 640, 1), torch.uint8, r"channels seem to come last"),
        (
            (480, 640, 3),
            torch.uint8,
            r"3 dimensions: \(480, 640, 3\); a single image needs image.movedim\(-1, 0\)\[None\]",
        ),
        ((3, 480, 640), torch.uint8, r"3 dimensions: \(3, 480, 640\); a single image needs image\[None\]$"),
    ],
)
def test_images_whose_channels_come_last_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        check_image(torch.empty(shape, dtype=dtype, device="meta"))
