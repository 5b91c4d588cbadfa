"""The kernels of `area_downsample` against the reference, forward and backward."""

import pytest
import torch

from ats_kernels import area_downsample, area_downsample_ref
from ats_kernels.checks import IMAGE_DTYPES
from tests.helpers import assert_close
from tests.test_area_downsample import LAYOUTS, slow_view, values

pytestmark = pytest.mark.interpreter

triton_kernels = pytest.importorskip("ats_kernels.views.triton")

SIZES = [((8, 12), (4, 3)), ((9, 10), (4, 7)), ((7, 5), (7, 5)), ((25, 64), (3, 9))]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    """Kernels even on CPU tensors, and NaN wherever one of them writes nothing."""
    monkeypatch.setenv("ATS_BACKEND", "triton")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


CASES = [
    *((SIZES[-1], dtype, layout) for layout in LAYOUTS for dtype in IMAGE_DTYPES),
    *((sizes, dtype, "contiguous") for sizes in SIZES[:-1] for dtype in (torch.uint8, torch.float32)),
]


@pytest.mark.parametrize(("sizes", "dtype", "layout"), CASES, ids=str)
def test_mean_of_areas(sizes, dtype, layout, device):
    image_size, size = sizes
    image = LAYOUTS[layout](values(1, 2, *image_size, dtype=dtype)).to(device)
    view = area_downsample(image, size)
    assert view.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert_close(view.cpu(), slow_view(image.cpu(), size))
    assert view.is_contiguous(
        memory_format=torch.channels_last if layout == "channels-last" else torch.contiguous_format
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_channels(channels, layout, device):
    """Channels-last images of more channels than a program interleaves; mean and std of more than a launch takes."""
    image = LAYOUTS[layout](values(1, channels, 7, 12, dtype=torch.uint8)).to(device)
    mean, std = [0.1 * c for c in range(channels)], [0.5 + c for c in range(channels)]
    expected = area_downsample_ref(image, (2, 5), means=mean, stds=std, dtype=torch.float64)
    assert_close(area_downsample(image, (2, 5), mean=mean, std=std), expected, torch.float32)
    for dtype in (torch.float16, torch.float64):
        assert_close(area_downsample(image, (2, 5), mean=mean, std=std, dtype=dtype), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("image_size", "size"),
    [((3, 700), (2, 90)), ((3, 2064), (2, 130)), ((40, 300), (2, 2)), ((2, 5000), (1, 2)), ((19, 4100), (1, 1))],
)
def test_many_tiles_and_wide_bins(image_size, size, dtype, device):
    """Several programs to a row, rows of 16-byte loads, bins of many rows, bins wider than a tile."""
    for layout in ("contiguous", "channels-last"):
        image = LAYOUTS[layout](values(1, 2, *image_size, dtype=dtype)).to(device)
        assert_close(area_downsample(image, size).cpu(), slow_view(image.cpu(), size))


def test_crop_of_a_larger_image(device):
    """A view into an image: rows begin anywhere and are not as far apart as they are long."""
    image = values(2, 3, 20, 33, dtype=torch.uint8).to(device)[:, 1:, 3:18, 5:30]
    assert_close(area_downsample(image, (4, 7)).cpu(), slow_view(image.cpu(), (4, 7)))


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_white_bytes_stay_white(size, device):
    """Bins of more than 65,793 pixels, whose sums float32 cannot hold."""
    image = torch.full((1, 1, 300, 700), 255, dtype=torch.uint8, device=device)
    assert (area_downsample(image, size) == 1).all()


def test_a_pixel_that_is_not_finite_stays_in_its_bins(device):
    image = torch.ones(1, 1, 6, 9, device=device)
    image[0, 0, 1, 4] = float("nan")
    image[0, 0, 4, 0] = float("inf")
    view = area_downsample(image, (3, 3))[0, 0].cpu()
    nan, inf = float("nan"), float("inf")
    assert_close(view, torch.tensor([[1, nan, 1], [1, 1, 1], [inf, 1, 1]]))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float16, "contiguous"), (torch.float64, "channels-last"), (torch.float64, "strided")],
    ids=str,
)
@pytest.mark.parametrize(("image_size", "size"), [*SIZES[1:], ((3, 1100), (2, 130))])
def test_gradient(image_size, size, dtype, layout, device):
    image = LAYOUTS[layout](values(2, 2, *image_size, dtype=dtype)).to(device).requires_grad_()
    options = {"mean": [0.1, 0.2], "std": [0.5, 2.0]}
    view = area_downsample(image, size, **options)
    wide = image.detach().double().requires_grad_()
    expected = area_downsample_ref(wide, size, means=options["mean"], stds=options["std"], dtype=torch.float64)
    assert_close(view, expected)
    transposed = values(2, 2, *size[::-1], dtype=dtype).transpose(2, 3).to(device)
    for grad_out in (transposed, torch.ones((), dtype=dtype, device=device).expand(view.shape)):
        (got,) = torch.autograd.grad(view, image, grad_out, retain_graph=True)
        (want,) = torch.autograd.grad(expected, wide, grad_out.double(), retain_graph=True)
        assert_close(got, want)


@pytest.mark.parametrize("channels", [1, 6])
def test_gradient_of_other_channels(channels, device):
    image = values(1, channels, 7, 9, dtype=torch.float32).to(device).requires_grad_()
    std = [1.0 + c for c in range(channels)]
    view = area_downsample(image, (3, 4), std=std)
    expected = area_downsample_ref(image, (3, 4), stds=std, dtype=torch.float32)
    grad_out = torch.ones_like(view)
    assert_close(*(torch.autograd.grad(y, image, grad_out)[0] for y in (view, expected)))
