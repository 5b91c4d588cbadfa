"""The kernels of `ats_kernels.extract_patches` against the reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch

from ats_kernels import extract_patches, extract_patches_ref
from tests.helpers import TOLERANCES, assert_close, seeded
from tests.test_extract_patches import DTYPES, MEAN, STD, make_image, values

pytestmark = pytest.mark.interpreter

OFFSETS = [(2, 3), (3, 5), (-2, 7), (6, -1), (-50, 2), (10**12, -(10**12))]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Kernels run, and whatever they leave unwritten is NaN."""
    monkeypatch.setenv("ATS_BACKEND", "triton")
    empty = torch.empty

    def empty_as_nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty_as_nan)


@pytest.fixture(scope="module")
def offsets(device):
    return torch.tensor([OFFSETS, OFFSETS[::-1]], device=device)


def reference(image, offsets, size, padding="zeros", means=None, stds=None, dtype=None):
    dtype = dtype or (image.dtype if image.is_floating_point() else torch.float32)
    return extract_patches_ref(image, offsets, size, padding=padding, means=means, stds=stds, dtype=dtype)


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_layouts(dtype, layout, padding, offsets, device):
    """Right pixel, image and channel, whatever the strides and wherever the patch lies; floats untouched."""
    image = make_image(layout, dtype).to(device)
    patches = extract_patches(image, offsets, (3, 5), padding=padding)
    expected = reference(image, offsets, (3, 5), padding)
    assert patches.stride() == expected.stride(), "reference and kernel put out the same memory order"
    if dtype == torch.uint8:
        assert_close(patches, expected)
    else:
        assert torch.equal(patches, expected)


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, out, offsets, device):
    """Normalised in the wider of the two precisions, rounded once; zeros are put in afterwards."""
    image = make_image("channels-last", dtype).to(device)
    patches = extract_patches(image, offsets[:, :4], 3, mean=MEAN, std=STD, dtype=out)
    expected = reference(image, offsets[:, :4], (3, 3), means=MEAN, stds=STD, dtype=torch.float64)
    tolerance = TOLERANCES[torch.float64 if torch.float64 in (dtype, out) else torch.float32]
    torch.testing.assert_close(
        patches.double(), expected, rtol=max(torch.finfo(out).eps, tolerance["rtol"]), atol=tolerance["atol"]
    )


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (9, 13), (1, 300), (33, 31), (16, 24)])
def test_sizes(size, device):
    """Rows of one pixel, patches as large as the image and larger, several programs to a patch, odd and even."""
    image = values(2, 2, 7, 9, dtype=torch.uint8).to(device)
    offsets = torch.tensor([[[-1, -2], [3, -7]], [[-20, -10], [0, 0]]], device=device)
    for padding in ("zeros", "edge"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ordered = image.contiguous(memory_format=memory_format)
            patches = extract_patches(ordered, offsets, size, padding=padding, mean=0.5)
            assert_close(patches, reference(ordered, offsets, size, padding, means=[0.5] * 2))


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6])
def test_channels(channels, device):
    """Channels that one program takes together or not, that lie beside each other or not."""
    image = values(1, channels, 6, 5, dtype=torch.float32).to(device)
    offsets = torch.tensor([[[-1, 2], [3, 0]]], device=device)
    means = [0.1 * channel for channel in range(channels)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ordered = image.contiguous(memory_format=memory_format)
        patches = extract_patches(ordered, offsets, (3, 4), mean=means)
        assert_close(patches, reference(ordered, offsets, (3, 4), means=means))


def test_image_of_one_row_and_column(device):
    image = values(2, 1, 1, 1, dtype=torch.float32).to(device)
    offsets = torch.tensor([[[0, 0]], [[-1, -1]]], device=device)
    for padding in ("zeros", "edge"):
        assert torch.equal(
            extract_patches(image, offsets, 2, padding=padding), reference(image, offsets, (2, 2), padding)
        )


def test_offsets_of_other_types(offsets, device):
    """int32, and views that are not contiguous."""
    image = make_image("contiguous", torch.float32).to(device)
    near = offsets[:, :4] % 16
    expected = reference(image, near, (3, 4))
    assert torch.equal(extract_patches(image, near.int(), (3, 4)), expected)
    assert torch.equal(extract_patches(image, near.flip(-1).flip(-1).mT.contiguous().mT, (3, 4)), expected)
    one = near[:1].expand(2, -1, -1)
    assert torch.equal(extract_patches(image, one, (3, 4)), reference(image, one, (3, 4)))
    assert extract_patches(image, near[:, :0], (3, 4)).shape == (2, 0, 3, 3, 4)


@pytest.mark.parametrize("kind", ["contiguous", "expanded", "channels-last"])
def test_image_of_more_than_2_to_31_elements(kind, device):
    """Positions past 2^31, and windows that reach past it: 64-bit arithmetic, from the first pixel on."""
    if kind == "expanded":
        row = values(1, 2, 1, 100, dtype=torch.uint8).to(device)
        image, offset = row.expand(1, 2, 2**30, 100), (2**30 - 2, 96)
    else:
        memory_format = torch.channels_last if kind == "channels-last" else torch.contiguous_format
        image = torch.zeros(1, dtype=torch.uint8).new_empty((1, 2, 6, 2**28), device=device)
        image = image if kind == "contiguous" else image.view(1, 6, 2**28, 2).permute(0, 3, 1, 2)
        image[:, :, :, -8:] = values(1, 2, 6, 8, dtype=torch.uint8).to(device)
        assert image.is_contiguous(memory_format=memory_format)
        offset = (-1, 2**28 - 5)
    offsets = torch.tensor([[offset]], device=device)
    for padding in ("zeros", "edge"):
        patches = extract_patches(image, offsets, (8, 6), padding=padding)
        assert_close(patches, reference(image, offsets, (8, 6), padding))


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradient(dtype, layout, padding, device):
    """Overlapping and equal patches add up, with the reads outside at the border ("edge"); every pixel is written."""
    image = make_image(layout, dtype)[:, :, :5, :6].to(device).requires_grad_()
    places = [[[1, 1], [2, 2], [1, 1], [-2, 4]], [[-1, 4], [3, -2], [-9, 0], [9, 9]]]
    offsets = torch.tensor(places, device=device)
    patches = extract_patches(image, offsets, (3, 4), padding=padding, std=STD)
    grad = values(*patches.shape, dtype=dtype).to(device)
    (actual,) = torch.autograd.grad(patches, image, grad)
    exact = image.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(exact, offsets, (3, 4), padding, stds=STD), exact, grad.double())
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    assert actual.is_contiguous(
        memory_format=torch.channels_last if layout == "channels-last" else torch.contiguous_format
    )


def test_gradient_in_any_memory_order(device):
    """Incoming gradients may be expanded, channels-last or anything else."""
    image = values(2, 3, 5, 6, dtype=torch.float32).to(device).requires_grad_()
    offsets = torch.tensor([[[1, 1], [-1, 2]], [[0, 0], [1, 1]]], device=device)
    patches = extract_patches(image, offsets, (3, 4))
    expected_patches = reference(image, offsets, (3, 4))
    dense = values(2, 2, 3, 3, 4, dtype=torch.float32).to(device)
    ordered = dense.movedim(2, -1).contiguous().movedim(-1, 2), dense.mT.contiguous().mT
    for grad in (dense.new_ones(()).expand_as(patches), dense[:, :1].expand_as(patches), *ordered):
        (actual,) = torch.autograd.grad(patches, image, grad, retain_graph=True)
        (expected,) = torch.autograd.grad(expected_patches, image, grad, retain_graph=True)
        assert_close(actual, expected)


def test_gradient_of_large_patches(device):
    """Several programs to a patch, larger than the image; one program's pixels are read by another's elements."""
    image = values(1, 1, 20, 22, dtype=torch.float64).to(device).requires_grad_()
    offsets = torch.tensor([[[-3, -4], [5, 2], [0, 0]]], device=device)
    for padding in ("zeros", "edge"):
        patches = extract_patches(image, offsets, (26, 27), padding=padding)
        grad = values(*patches.shape, dtype=torch.float64).to(device)
        (actual,) = torch.autograd.grad(patches, image, grad)
        (expected,) = torch.autograd.grad(reference(image, offsets, (26, 27), padding), image, grad)
        assert_close(actual, expected)


def test_gradient_is_rounded_once(device):
    """2,048 + 4 × 1 in float16, where 2,048 + 1 is 2,048: sums are taken in float32."""
    image = torch.zeros((1, 1, 2, 2), dtype=torch.float16, device=device, requires_grad=True)
    offsets = torch.zeros((1, 5, 2), dtype=torch.int64, device=device)
    grad = torch.ones((1, 5, 1, 2, 2), dtype=torch.float16, device=device)
    grad[:, 0] = 2048
    extract_patches(image, offsets, 2).backward(grad)
    assert (image.grad == 2052).all()


@pytest.mark.gpu
class TestOnGpu:
    """What only a GPU can show."""

    @pytest.fixture(autouse=True)
    def chosen_by_device(self, kernels, monkeypatch):
        monkeypatch.delenv("ATS_BACKEND")

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_from_pinned_memory(self, dtype, memory_format, device):
        """A GPU reads patches from a pinned image by itself, without a copy of the image."""
        image = values(4, 3, 512, 640, dtype=dtype).contiguous(memory_format=memory_format).pin_memory()
        offsets = torch.randint(-20, 500, (4, 6, 2), generator=seeded())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        patches = extract_patches(image, offsets.to(device), 40, mean=MEAN, std=STD)
        used = torch.cuda.max_memory_allocated() - before
        assert patches.device.type == "cuda"
        assert used <= 1.05 * patches.nbytes + 65_536, "more than the patches was kept on the GPU"
        assert_close(patches.cpu(), extract_patches(image, offsets, 40, mean=MEAN, std=STD))

    def test_pinned_memory_is_not_reused_too_early(self, device):
        """A batch freed right after the launch, while the GPU is busy, is not overwritten by the next one."""
        offsets = torch.zeros((1, 1, 2), dtype=torch.int64, device=device)
        busy = torch.ones((8192, 8192), device=device)
        extract_patches(torch.ones((1, 1, 256, 256)).pin_memory(), offsets, 256)
        for _ in range(4):
            busy = busy @ busy * 1e-6
        patches = extract_patches(torch.ones((1, 1, 256, 256)).pin_memory(), offsets, 256)
        later = [torch.zeros((1, 1, 256, 256)).pin_memory() for _ in range(8)]
        assert (patches == 1).all()
        del later

    def test_from_pageable_memory(self, device):
        """Cut on the CPU; only patches are copied."""
        image, offsets = values(2, 3, 64, 64, dtype=torch.uint8), torch.randint(-9, 60, (2, 5, 2), generator=seeded())
        patches = extract_patches(image, offsets.to(device), 10)
        assert patches.device.type == "cuda"
        assert_close(patches.cpu(), extract_patches(image, offsets, 10))

    @pytest.mark.parametrize("pinned", [True, False])
    def test_gradient_into_host_memory(self, pinned, device):
        image = values(2, 3, 64, 64, dtype=torch.float32)
        image = (image.pin_memory() if pinned else image).requires_grad_()
        offsets = torch.randint(-9, 60, (2, 5, 2), generator=seeded())
        (actual,) = torch.autograd.grad(extract_patches(image, offsets.to(device), 10).square().sum(), image)
        (expected,) = torch.autograd.grad(reference(image, offsets, (10, 10)).square().sum(), image)
        assert_close(actual, expected)

    def test_devices_that_do_not_go_together(self, device):
        image, offsets = torch.zeros((1, 1, 8, 8), device=device), torch.zeros((1, 1, 2), dtype=torch.int64)
        with pytest.raises(ValueError, match="image is on cuda:0 but offsets are on cpu"):
            extract_patches(image, offsets, 3)

    def test_never_synchronises(self, device):
        image = values(2, 3, 64, 64, dtype=torch.float32).to(device).requires_grad_()
        offsets = torch.zeros((2, 3, 2), dtype=torch.int64, device=device)
        extract_patches(image, offsets, 10, mean=MEAN, std=STD).sum().backward()
        torch.cuda.set_sync_debug_mode("error")  # raises at any wait for the GPU: that is the assertion
        try:
            extract_patches(image, offsets, 10, mean=MEAN, std=STD).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_in_a_graph(self, device):
        """Captured once, replayed with other offsets."""
        image = values(2, 3, 64, 64, dtype=torch.uint8).to(device)
        offsets = torch.zeros((2, 3, 2), dtype=torch.int64, device=device)
        extract_patches(image, offsets, 10, mean=MEAN, std=STD)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            patches = extract_patches(image, offsets, 10, mean=MEAN, std=STD)
        offsets.copy_(torch.randint(-5, 60, (2, 3, 2), generator=seeded()))
        graph.replay()
        assert_close(patches, reference(image, offsets, (10, 10), means=MEAN, stds=STD))

    def test_compiled(self, device):
        image = values(2, 3, 64, 64, dtype=torch.float32).to(device).requires_grad_()
        offsets = torch.randint(-5, 60, (2, 3, 2), generator=seeded()).to(device)
        compiled = torch.compile(lambda x: extract_patches(x, offsets, 10).square(), fullgraph=True)
        (actual,) = torch.autograd.grad(compiled(image).sum(), image)
        (expected,) = torch.autograd.grad(reference(image, offsets, (10, 10)).square().sum(), image)
        assert_close(actual, expected)

    def test_deterministic(self, device):
        """Heavily overlapping patches, bit for bit the same gradient each time."""
        image = values(1, 3, 256, 256, dtype=torch.float32).to(device).requires_grad_()
        offsets = torch.randint(0, 64, (1, 128, 2), generator=seeded()).to(device)
        torch.use_deterministic_algorithms(True)
        try:
            patches = extract_patches(image, offsets, 100)
            grad = values(*patches.shape, dtype=torch.float32).to(device)
            first, second = (torch.autograd.grad(patches, image, grad, retain_graph=True)[0] for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.equal(first, second)
