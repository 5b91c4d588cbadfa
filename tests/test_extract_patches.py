"""`ats_kernels.extract_patches` against a loop over pixels."""

import numpy as np
import pytest
import torch

from ats_kernels import extract_patches, extract_patches_ref
from bench.measure import scratch_bytes
from tests.helpers import assert_close, seeded

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]


def values(*shape, dtype):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)
    return torch.randn(shape, generator=seeded(), dtype=torch.float64).to(dtype)


def make_image(layout, dtype):
    """An image (2, 3, 7, 9) whose memory is laid out in one of the ways that users' images are."""
    if layout == "channels-last":
        return values(2, 3, 7, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return values(2, 3, 14, 27, dtype=dtype)[:, :, ::2, ::3]
    if layout == "sliced":
        return values(4, 5, 12, 15, dtype=dtype)[1:3, 1:4, 2:9, 5:14]
    if layout == "transposed":
        return values(2, 3, 9, 7, dtype=dtype).transpose(2, 3)
    if layout == "expanded":
        return values(1, 1, 7, 9, dtype=dtype).expand(2, 3, 7, 9)
    return values(2, 3, 7, 9, dtype=dtype)


OFFSETS = [(2, 3), (0, 0), (3, 5)]  # inside
OFFSETS += [(-2, 2), (5, 2), (2, -3), (2, 7), (-1, -1), (6, 8)]  # out at the top, bottom, left, right and two corners
OFFSETS += [(-50, 2), (7, 0), (1, -4), (0, 9), (10**9, -(10**9))]  # wholly outside


def slow_patches(image, offsets, size, padding, mean=None, std=None):
    """One pixel after the other, in float64."""
    pixels = image.double().numpy() / (255 if image.dtype == torch.uint8 else 1)
    batch, channels, height, width = pixels.shape
    patches = np.zeros((batch, offsets.shape[1], channels, *size))
    for b, n, c, i, j in np.ndindex(*patches.shape):
        y, x = int(offsets[b, n, 0]) + i, int(offsets[b, n, 1]) + j
        if not (0 <= y < height and 0 <= x < width):
            if padding == "zeros":
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        value = pixels[b, c, y, x]
        if mean is not None:
            value = value - mean[c]
        if std is not None:
            value = value / std[c]
        patches[b, n, c, i, j] = value
    return torch.from_numpy(patches)


@pytest.fixture(scope="module")
def offsets():
    return torch.tensor([OFFSETS, OFFSETS[::-1]])  # (2, N, 2), another order for each image


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_a_loop_over_pixels(dtype, layout, padding, offsets):
    """Right pixel, right image, right channel, whatever the strides and wherever the patch lies; floats untouched."""
    image = make_image(layout, dtype)
    patches = extract_patches(image, offsets, (3, 4), padding=padding)
    expected = slow_patches(image, offsets, (3, 4), padding)
    if dtype == torch.uint8:
        assert patches.dtype == torch.float32
        assert_close(patches, expected)
    else:
        assert patches.dtype == dtype
        assert torch.equal(patches.double(), expected)


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalisation(dtype, padding, offsets):
    """(x − mean) / std by channel, of x / 255 for bytes; zeros are put in afterwards, so they stay 0."""
    image = make_image("contiguous", dtype)
    patches = extract_patches(image, offsets, (3, 4), padding=padding, mean=MEAN, std=STD)
    assert_close(patches, slow_patches(image, offsets, (3, 4), padding, MEAN, STD))
    if padding == "zeros":
        assert (patches[0, 9] == 0).all(), "a patch wholly outside is 0, not −mean / std"


def test_ways_of_giving_mean_and_std(offsets):
    """A float for all channels, a list, a tuple and a tensor say the same; either may be left out."""
    image = make_image("contiguous", torch.uint8)
    expected = slow_patches(image, offsets, (3, 4), "zeros", [0.5] * 3, [0.25] * 3)
    for make in (float, lambda v: [v] * 3, lambda v: (v,) * 3, lambda v: torch.full((3,), v), torch.tensor):
        assert_close(extract_patches(image, offsets, (3, 4), mean=make(0.5), std=make(0.25)), expected)
    only_mean, only_std = (extract_patches(image, offsets, (3, 4), **given) for given in ({"mean": MEAN}, {"std": STD}))
    assert_close(only_mean, slow_patches(image, offsets, (3, 4), "zeros", mean=MEAN))
    assert_close(only_std, slow_patches(image, offsets, (3, 4), "zeros", std=STD))


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_patches_larger_than_the_image(dtype, padding):
    image = make_image("contiguous", dtype)
    offsets = torch.tensor([[[-2, -3], [0, 0], [-10, 4]]]).expand(2, -1, -1)
    patches = extract_patches(image, offsets, (12, 16), padding=padding)
    assert_close(patches, slow_patches(image, offsets, (12, 16), padding))


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("size", [(3, 4), (12, 16)], ids=["smaller", "larger"])
@pytest.mark.parametrize("backend", ["", "reference"])
def test_offsets_at_the_ends_of_int64(backend, size, padding, monkeypatch):
    """They read the farthest edge, or zeros, on their own side: nothing wraps round."""
    monkeypatch.setenv("ATS_BACKEND", backend)
    image = make_image("contiguous", torch.float32)
    ends = torch.tensor([[2**63 - 1, -(2**63)], [-(2**63), 2**63 - 1], [2**63 - 3, 2], [1, 3 - 2**63]])
    near = ends.clamp(-100, 100)
    patches, expected = (
        extract_patches(image, offsets.expand(2, -1, -1), size, padding=padding) for offsets in (ends, near)
    )
    assert torch.equal(patches, expected)
    if padding == "edge":
        assert (patches[:, 0] == image[:, None, :, -1:, :1].squeeze(1)).all()


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_argument(dtype, out, offsets):
    """The result is computed in the wider of the two precisions, not in half, and rounded once."""
    image = make_image("contiguous", dtype)
    patches = extract_patches(image, offsets, 3, mean=MEAN, std=STD, dtype=out)
    expected = slow_patches(image, offsets, (3, 3), "zeros", MEAN, STD)
    assert patches.dtype == out
    if torch.float64 in (dtype, out):
        assert_close(patches, expected)
    else:
        torch.testing.assert_close(patches.double(), expected, rtol=torch.finfo(out).eps, atol=1e-6)


@pytest.mark.parametrize("padding", ["zeros", "edge"])
def test_int32_offsets(padding, offsets):
    """Also where offset + patch size goes past the range of int32: there lies no pixel of the image."""
    image = make_image("contiguous", torch.uint8)
    far = torch.tensor([[[2**31 - 2, 0], [0, -(2**31)]]]).expand(2, -1, -1)
    offsets = torch.cat([offsets, far], 1)
    patches = extract_patches(image, offsets.int(), 4, padding=padding)
    assert torch.equal(patches, extract_patches(image, offsets, 4, padding=padding))
    assert_close(patches[:, -2:], slow_patches(image, far, (4, 4), padding))


def test_int_patch_size_is_square():
    image, offsets = make_image("contiguous", torch.float64), torch.tensor([[[1, 2]], [[3, 4]]])
    expected = extract_patches(image, offsets, (2, 2))
    assert torch.equal(extract_patches(image, offsets, 2), expected)
    assert torch.equal(extract_patches(image, offsets, [2, 2]), expected)


@pytest.mark.parametrize("padding", ["zeros", "edge"])
def test_gradient_into_the_image(padding):
    """Overlapping patches add up, pixels read outside give none ("zeros") or all to the nearest pixel ("edge")."""
    image = torch.randn(2, 2, 5, 6, generator=seeded(), dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([[[1, 1], [2, 2], [1, 1]], [[-1, 4], [3, -2], [-9, 0]]])

    def function(x):
        return extract_patches(x, offsets, 3, padding=padding, mean=MEAN[:2], std=STD[:2])

    assert torch.autograd.gradcheck(function, image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradient_of_a_sum_counts_reads(dtype):
    """Each read of a pixel adds 1 to its gradient, in the image's dtype, whatever its strides."""
    image = make_image("channels-last", dtype).requires_grad_()
    offsets = torch.tensor([[[0, 0], [1, 1]], [[-1, 0], [5, 8]]])
    extract_patches(image, offsets, 2).sum().backward()
    expected = torch.zeros(2, 7, 9)
    expected[0, 0:2, 0:2] += 1
    expected[0, 1:3, 1:3] += 1
    expected[1, 0, 0:2] += 1
    expected[1, 5:7, 8] += 1
    assert torch.equal(image.grad, expected.unsqueeze(1).expand(2, 3, 7, 9).to(dtype))


def test_image_of_more_than_2_to_31_elements():
    """Element numbers past 2^31 must not wrap; reading a patch must not touch, convert or copy the image."""
    side = 28_000
    image = torch.empty((1, 3, side, side), dtype=torch.uint8)  # 2.35e9 bytes of address space, not of memory
    assert image.numel() > 2**31
    window = values(1, 3, 8, 8, dtype=torch.uint8)
    image[:, :, -8:, -8:] = window
    offsets = torch.tensor([[[side - 8, side - 8], [side - 5, side - 6]]])
    patches = extract_patches(image, offsets, 8)
    assert_close(patches[:, 0], window / 255)
    assert_close(patches[:, 1, :, :5, :6], window[..., 3:, 2:] / 255)
    assert (patches[:, 1, :, 5:] == 0).all()


def test_expanded_image_of_more_than_2_to_31_elements():
    """Stride 0 along the rows: 3·10^9 elements on 300 bytes."""
    row = values(1, 3, 1, 100, dtype=torch.uint8)
    image = row.expand(1, 3, 10**7, 100)
    patches = extract_patches(image, torch.tensor([[[10**7 - 4, 90]]]), (4, 10))
    assert_close(patches[:, 0], (row / 255)[..., 90:].expand(1, 3, 4, 10))


@pytest.mark.parametrize("out", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_patches(dtype, layout, out):
    """Conversion goes part by part, through the end of the result or through scratch: each part is the right one."""
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    image = values(3, 3, 90, 80, dtype=dtype).contiguous(memory_format=memory_format)
    offsets = torch.randint(-9, 70, (3, 67, 2), generator=seeded())
    patches = extract_patches(image, offsets, (31, 33), mean=MEAN, std=STD, dtype=out)
    expected = extract_patches_ref(image, offsets, (31, 33), means=MEAN, stds=STD, dtype=out)
    assert patches.stride() == expected.stride()
    assert_close(patches, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "transposed", "expanded"])
def test_memory_order(layout):
    """Channels come last in the patches' memory where they do in the image's: convolutions keep that order."""
    patches = extract_patches(make_image(layout, torch.uint8), torch.zeros(2, 4, 2, dtype=torch.int64), (5, 6))
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    assert patches.shape == (2, 4, 3, 5, 6)
    assert patches.flatten(0, 1).is_contiguous(memory_format=memory_format)
    assert patches.flatten(0, 1).data_ptr() == patches.data_ptr(), "flattened for a network without a copy"


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_no_scratch(dtype, layout, normalised):
    """Beside the result, memory for a few indices at most: no copy of the image, no raw patches."""
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    image = values(2, 3, 400, 500, dtype=dtype).contiguous(memory_format=memory_format)
    offsets = torch.randint(0, 300, (2, 20, 2), generator=seeded())
    options = {"mean": MEAN, "std": STD} if normalised else {}
    scratch, returned = scratch_bytes(
        lambda _: extract_patches(image, offsets, 100, dtype=torch.float32, **options), torch.device("cpu")
    )
    assert returned == 40 * 3 * 100 * 100 * 4
    assert scratch <= 0.05 * returned


def test_no_patches():
    image, offsets = make_image("contiguous", torch.float32).requires_grad_(), torch.zeros(2, 0, 2, dtype=torch.int64)
    patches = extract_patches(image, offsets, 3)
    assert patches.shape == (2, 0, 3, 3, 3)
    patches.sum().backward()
    assert (image.grad == 0).all()


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradient_against_the_reference(dtype, layout, padding):
    """Overlapping, equal, crossing and outside patches; an expanded gradient; the image's dtype and memory order."""
    image = make_image(layout, dtype).requires_grad_()
    offsets = torch.tensor([OFFSETS, [(2, 3)] * len(OFFSETS)])
    patches = extract_patches(image, offsets, (3, 4), padding=padding, std=STD)
    expected = extract_patches_ref(image.double(), offsets, (3, 4), padding=padding, stds=STD, dtype=torch.float64)
    for grad in (values(*patches.shape, dtype=dtype), values(1, 1, 3, 1, 4, dtype=dtype).expand_as(patches)):
        (actual,) = torch.autograd.grad(patches, image, grad, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, image, grad.double(), retain_graph=True)
        assert actual.dtype == dtype
        assert actual.stride() == image.stride()
        # In half precision each of the 14 reads of a pixel is rounded.
        tolerance = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1}.get(dtype, 1e-5)
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def test_no_gradient_without_need():
    image = make_image("contiguous", torch.float32)
    offsets = torch.zeros(2, 4, 2, dtype=torch.int64)
    assert not extract_patches(image, offsets, 3).requires_grad
    with torch.no_grad():
        assert not extract_patches(image.requires_grad_(), offsets, 3).requires_grad
    assert extract_patches(image, offsets, 3).requires_grad


@pytest.mark.parametrize("padding", ["zeros", "edge"])
def test_compiled(padding):
    """Traced as one graph, forward and backward."""
    image, offsets = make_image("channels-last", torch.float32).requires_grad_(), torch.tensor([OFFSETS, OFFSETS])

    def function(x):
        return extract_patches(x, offsets, (3, 4), padding=padding)

    patches = torch.compile(function, fullgraph=True, backend="aot_eager")(image)
    assert torch.equal(patches, function(image))
    (actual,) = torch.autograd.grad(patches.square().sum(), image)
    (expected,) = torch.autograd.grad(function(image).square().sum(), image)
    assert_close(actual, expected)


IMAGE, OFFSET = torch.zeros(2, 3, 7, 9), torch.zeros(2, 4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("image", "offsets", "size", "options", "error", "message"),
    [
        (IMAGE.numpy(), OFFSET, 3, {}, TypeError, "image must be a torch.Tensor, got ndarray"),
        (IMAGE.bool(), OFFSET, 3, {}, TypeError, "image has dtype torch.bool, expected one of uint8"),
        (IMAGE.to(torch.complex64), OFFSET, 3, {}, TypeError, "image has dtype torch.complex64"),
        (IMAGE.int(), OFFSET, 3, {}, TypeError, "image has dtype torch.int32"),
        (IMAGE[0], OFFSET, 3, {}, ValueError, r"\(B, C, H, W\), got 3 dimensions: \(3, 7, 9\).*image\[None\]"),
        (IMAGE[:, :, :0], OFFSET, 3, {}, ValueError, r"image is empty: \(2, 3, 0, 9\)"),
        (IMAGE, [[0, 0]], 3, {}, TypeError, "offsets must be a torch.Tensor, got list"),
        (IMAGE, OFFSET.float(), 3, {}, TypeError, "offsets must be int32 or int64, got torch.float32"),
        (IMAGE, OFFSET[..., 0], 3, {}, ValueError, r"offsets must be \(B, N, 2\), pairs \(y, x\), got \(2, 4\)"),
        (IMAGE, OFFSET[..., :1], 3, {}, ValueError, r"got \(2, 4, 1\)"),
        (IMAGE, OFFSET[:1], 3, {}, ValueError, "image has batch size 2 but offsets have 1"),
        (IMAGE.to("meta"), OFFSET, 3, {}, ValueError, "image is on meta but offsets are on cpu"),
        (IMAGE, OFFSET, 0, {}, ValueError, "patch_size must be at least 1, got 0"),
        (IMAGE, OFFSET, (3, -1), {}, ValueError, r"patch_size\[1\] must be at least 1, got -1"),
        (IMAGE, OFFSET, (3, 3, 3), {}, ValueError, r"an int or a pair \(height, width\), got \(3, 3, 3\)"),
        (IMAGE, OFFSET, 2.5, {}, TypeError, "patch_size must be an int, got float: 2.5"),
        (IMAGE, OFFSET, 3, {"padding": "reflect"}, ValueError, "unknown padding 'reflect'.*'zeros', 'edge'"),
        (IMAGE, OFFSET, 3, {"mean": [0.1, 0.2]}, ValueError, "mean has 2 values but the image has 3 channels"),
        (IMAGE, OFFSET, 3, {"std": torch.ones(4)}, ValueError, "std has 4 values but the image has 3 channels"),
        (IMAGE, OFFSET, 3, {"std": [1.0, 0.0, 1.0]}, ValueError, r"std must be positive, got \[1.0, 0.0, 1.0\]"),
        (IMAGE, OFFSET, 3, {"std": -1.0}, ValueError, "std must be positive"),
        (IMAGE, OFFSET, 3, {"std": float("nan")}, ValueError, "std must be finite, got nan"),
        (IMAGE, OFFSET, 3, {"dtype": torch.uint8}, TypeError, "dtype must be a floating point.*got torch.uint8"),
        (IMAGE, OFFSET, 3, {"dtype": "half"}, TypeError, "dtype must be a floating point.*got half"),
    ],
)
def test_errors(image, offsets, size, options, error, message):
    with pytest.raises(error, match=message):
        extract_patches(image, offsets, size, **options)
