"""`ats_kernels.area_downsample` against the mean over each output pixel's area, and against F.interpolate."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ats_kernels import area_downsample
from ats_kernels.views import cpu as area_downsample_cpu
from tests.helpers import assert_close, seeded

SIZES = [((8, 12), (4, 3)), ((9, 10), (4, 7)), ((7, 5), (7, 5)), ((13, 6), (1, 1)), ((30, 17), (11, 16))]
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3)[:, :, ::2, ::3],
}


def values(*shape, dtype):
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=seeded(), dtype=torch.uint8)
    return torch.randn(shape, generator=seeded(), dtype=torch.float64).to(dtype)


def slow_view(image, size):
    """Output row i is the mean of the input rows ⌊i·H/h⌋ .. ⌈(i + 1)·H/h⌉ − 1; columns likewise. In float64."""
    pixels = image.double().numpy() / (255 if image.dtype == torch.uint8 else 1)
    view = np.empty((*pixels.shape[:2], *size))
    ratio = [Fraction(length, count) for length, count in zip(pixels.shape[2:], size, strict=True)]
    for cell in np.ndindex(*size):
        rows, columns = (slice(math.floor(i * r), math.ceil((i + 1) * r)) for i, r in zip(cell, ratio, strict=True))
        view[:, :, cell[0], cell[1]] = pixels[:, :, rows, columns].mean((2, 3))
    return torch.from_numpy(view)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("image_size", "size"), SIZES)
def test_mean_of_areas(image_size, size, dtype, layout):
    """Ratios that are integers and that are not (bins overlap then), for each dtype and layout."""
    image = LAYOUTS[layout](values(2, 3, *image_size, dtype=dtype))
    view = area_downsample(image, size)
    expected = slow_view(image, size)
    assert view.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert_close(view, expected)
    wide = image.double() / (255 if dtype == torch.uint8 else 1)
    assert_close(expected, F.interpolate(wide, size=size, mode="area"))


def test_int_size_is_square():
    image = values(1, 2, 9, 8, dtype=torch.float64)
    assert_close(area_downsample(image, 4), slow_view(image, (4, 4)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_normalisation_and_dtype(dtype):
    """(x − mean) / std by channel, of x / 255 for bytes."""
    image = values(2, 3, 9, 10, dtype=dtype)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    expected = (slow_view(image, (4, 7)) - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    assert_close(area_downsample(image, (4, 7), mean=mean, std=std), expected)
    for out in (torch.float16, torch.bfloat16, torch.float64):
        view = area_downsample(image, (4, 7), mean=[0.1, 0.2, 0.3], std=(0.5, 0.25, 2.0), dtype=out)
        assert view.dtype == out
        assert_close(view, expected, torch.float32 if out == torch.float64 else out)
    assert_close(area_downsample(image, (4, 7), mean=0.5), slow_view(image, (4, 7)) - 0.5)


@pytest.mark.parametrize("side", [256, 300])
def test_white_bytes_stay_white(side):
    """A view pixel over a large area: sums of bytes are not exact in float32 past 65,793 pixels, far less in half."""
    image = torch.full((1, 1, 2 * side, 2 * side), 255, dtype=torch.uint8)
    for dtype in (torch.float16, torch.float32):
        assert_close(area_downsample(image, 2, dtype=dtype), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 1)])
def test_bins_of_many_rows(size):
    """White stays exactly 1 and noise its mean where a bin has more rows, or pixels, than one type can add up."""
    image = values(1, 1, 300, 700, dtype=torch.uint8)
    assert_close(area_downsample(image, size), slow_view(image, size))
    assert (area_downsample(torch.full_like(image, 255), size) == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [1, 100, 700])
def test_chunks(chunk, dtype, layout, monkeypatch):
    """Several images, an image, or a few rows at a time; chunks that end within a period of the bins and do not."""
    monkeypatch.setattr(area_downsample_cpu, "CHUNK", chunk)
    image = LAYOUTS[layout](values(5, 2, 15, 9, dtype=dtype))
    for size in ((6, 4), (7, 9), (15, 2)):
        assert_close(area_downsample(image, size), slow_view(image, size))


def test_channels_last_stays_channels_last():
    image = LAYOUTS["channels-last"](values(2, 3, 9, 8, dtype=torch.uint8))
    assert area_downsample(image, (3, 4)).is_contiguous(memory_format=torch.channels_last)
    assert area_downsample(image.contiguous(), (3, 4)).is_contiguous()


def test_a_pixel_that_is_not_finite_stays_in_its_bins():
    image = torch.ones(1, 1, 6, 9)
    image[0, 0, 1, 4], image[0, 0, 4, 0] = float("nan"), float("inf")
    view = area_downsample(image, (3, 3))[0, 0]
    assert view.isnan().tolist() == [[False, True, False], [False] * 3, [False] * 3]
    assert view.isinf().tolist() == [[False] * 3, [False] * 3, [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_compiles_whole(dtype):
    """No graph break, forward and backward, and the same values."""
    image = values(2, 3, 9, 10, dtype=dtype)
    image.requires_grad_(image.is_floating_point())
    compiled = torch.compile(area_downsample, fullgraph=True, backend="aot_eager")
    view, expected = (
        function(image, (4, 7), mean=[0.1, 0.2, 0.3], std=0.5) for function in (compiled, area_downsample)
    )
    assert_close(view, expected)
    if image.requires_grad:
        assert_close(*(torch.autograd.grad(x.square().sum(), image)[0] for x in (view, expected)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_a_compiler_is_told_of_the_lean_path(channels_last):
    """Shapes, strides and dtype without running it, as `torch.library.opcheck` wants them."""
    image = values(2, 3, 9, 10, dtype=torch.uint8)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    arguments = image, [4, 7], [0.1, 0.2, 0.3], [0.5] * 3, torch.float32
    torch.library.opcheck(torch.ops.ats_kernels.area_downsample_cpu.default, arguments)
    assert_close(
        torch.ops.ats_kernels.area_downsample_cpu(*arguments),
        area_downsample(image, (4, 7), mean=[0.1, 0.2, 0.3], std=0.5),
    )


def test_autocast_changes_nothing():
    image = values(1, 3, 9, 10, dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = area_downsample(image, (4, 7))
    assert view.dtype == torch.float32
    assert_close(view, slow_view(image, (4, 7)))


@pytest.mark.parametrize(("image_size", "size"), SIZES[:3])
def test_gradient(image_size, size):
    image = values(1, 2, *image_size, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: area_downsample(x, size, mean=[0.1, 0.2], std=[0.5, 2.0]), image)


IMAGE = torch.zeros(2, 3, 7, 9)


@pytest.mark.parametrize(
    ("image", "size", "options", "error", "message"),
    [
        ("image.png", 3, {}, TypeError, "image must be a torch.Tensor, got str"),
        (IMAGE.bool(), 3, {}, TypeError, "image has dtype torch.bool, expected one of uint8"),
        (IMAGE.to(torch.complex64), 3, {}, TypeError, "image has dtype torch.complex64"),
        (IMAGE[0], 3, {}, ValueError, r"\(B, C, H, W\), got 3 dimensions: \(3, 7, 9\)"),
        (IMAGE[:0], 3, {}, ValueError, r"image is empty: \(0, 3, 7, 9\)"),
        (IMAGE, 0, {}, ValueError, "size must be at least 1, got 0"),
        (IMAGE, (3, -2), {}, ValueError, r"size\[1\] must be at least 1, got -2"),
        (IMAGE, (3,), {}, ValueError, r"size must be an int or a pair \(height, width\), got \(3,\)"),
        (IMAGE, 0.12, {}, TypeError, "size must be an int, got float: 0.12"),
        (IMAGE, (8, 9), {}, ValueError, r"size \(8, 9\) is larger than the image, \(7, 9\)"),
        (IMAGE, (7, 10), {}, ValueError, r"size \(7, 10\) is larger than the image, \(7, 9\)"),
        (IMAGE, 3, {"mean": [0.1]}, ValueError, "mean has 1 values but the image has 3 channels"),
        (IMAGE, 3, {"std": 0}, ValueError, r"std must be positive, got \[0.0, 0.0, 0.0\]"),
        (IMAGE, 3, {"dtype": torch.int64}, TypeError, "dtype must be a floating point.*got torch.int64"),
    ],
)
def test_errors(image, size, options, error, message):
    with pytest.raises(error, match=message):
        area_downsample(image, size, **options)
