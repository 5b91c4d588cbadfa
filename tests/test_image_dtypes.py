"""Images of whole numbers: 16 bits are read as they are, and advice for all others keeps their numbers."""

import ast
import contextlib
import re

import numpy as np
import pytest
import torch

import ats
from ats_kernels import area_downsample, extract_patches
from tests.helpers import assert_close, seeded
from tests.test_area_downsample import LAYOUTS as VIEW_LAYOUTS
from tests.test_area_downsample import slow_view
from tests.test_extract_patches import OFFSETS, slow_patches

SIXTEEN = pytest.mark.parametrize("dtype", [torch.uint16, torch.int16], ids=str)
BACKENDS = pytest.mark.parametrize("backend", ["", "reference"])
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.nn.functional.pad(x, [1, 2, 3, 4])[:, :, 3:-4, 1:-2],
}
MEAN, STD = [1000.0, 30000.0, -7.0], [250.0, 9000.0, 3.0]


def whole_numbers(dtype, *shape):
    """Over the whole of the dtype's range, both ends among them, and NumPy's as torch makes few of uint16."""
    ends = np.iinfo(str(dtype).removeprefix("torch."))
    numbers = np.random.default_rng(0).integers(ends.min, ends.max, shape, ends.dtype, endpoint=True)
    numbers.flat[:2] = ends.min, ends.max
    return torch.from_numpy(numbers)


@SIXTEEN
@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", ["zeros", "edge"])
def test_patches_hold_the_very_numbers(padding, layout, backend, dtype, monkeypatch):
    monkeypatch.setenv("ATS_BACKEND", backend)
    image = LAYOUTS[layout](whole_numbers(dtype, 2, 3, 7, 9))
    offsets = torch.tensor([OFFSETS, OFFSETS[::-1]])
    for size in ((3, 4), (12, 16)):
        patches = extract_patches(image, offsets, size, padding=padding)
        assert patches.dtype == torch.float32
        assert torch.equal(patches.double(), slow_patches(image, offsets, size, padding))
    for out in (torch.float32, torch.float64, torch.float16):
        patches = extract_patches(image, offsets, (3, 4), padding=padding, mean=MEAN, std=STD, dtype=out)
        assert_close(patches, slow_patches(image, offsets, (3, 4), padding, MEAN, STD))


@SIXTEEN
@BACKENDS
@pytest.mark.parametrize("layout", VIEW_LAYOUTS)
@pytest.mark.parametrize(("image_size", "size"), [((8, 12), (4, 3)), ((9, 10), (4, 7)), ((300, 6), (1, 1))])
def test_views_are_means_of_the_very_numbers(image_size, size, layout, backend, dtype, monkeypatch):
    monkeypatch.setenv("ATS_BACKEND", backend)
    numbers = whole_numbers(dtype, 2, 3, *image_size)
    image = (LAYOUTS | VIEW_LAYOUTS)[layout](numbers) if layout != "strided" else numbers.repeat(1, 1, 2, 1)[:, :, ::2]
    expected = slow_view(image, size)
    view = area_downsample(image, size)
    assert view.dtype == torch.float32
    torch.testing.assert_close(view.double(), expected, rtol=2e-6, atol=0.01)
    normalised = area_downsample(image, size, mean=MEAN, std=STD, dtype=torch.float64)
    mean, std = (torch.tensor(values).double().view(-1, 1, 1) for values in (MEAN, STD))
    assert_close(normalised, (expected - mean) / std)


@pytest.mark.interpreter
@SIXTEEN
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_read_them(layout, dtype, device, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("ATS_BACKEND", "triton")
    image = LAYOUTS[layout](whole_numbers(dtype, 1, 3, 7, 9))
    offsets = torch.tensor([OFFSETS[:6]])
    for padding in ("zeros", "edge"):
        for given in ({}, {"mean": MEAN, "std": STD}):
            patches = extract_patches(image.to(device), offsets.to(device), (3, 4), padding=padding, **given)
            assert_close(patches.cpu(), slow_patches(image, offsets, (3, 4), padding, *given.values()))
    view = area_downsample(image.to(device), (3, 4)).cpu()
    torch.testing.assert_close(view.double(), slow_view(image, (3, 4)), rtol=2e-6, atol=0.01)


@SIXTEEN
def test_the_whole_way(dtype):
    """From images to pooled features, as a float image of the same numbers goes."""
    image = whole_numbers(dtype, 2, 3, 40, 50)
    samples = [
        ats.sample_patches(x, torch.zeros(2, 8, 10), 4, 6, mean=1000.0, std=250.0, generator=seeded())
        for x in (image, image.double().float())
    ]
    assert torch.equal(samples[0].patches, samples[1].patches)


OTHERS = [torch.bool, torch.int8, torch.int32, torch.int64, torch.uint32, torch.uint64]


def advised(message, name):
    """The pieces of code in a message that work on `name`, each as long as it parses."""
    text, pieces, end = message, [], 0
    for start in re.finditer(rf"(?:[\w.]+\()*\b{name}[.\[)]", text):
        if start.start() < end:
            continue
        for stop in range(len(text), start.end() - 1, -1):
            with contextlib.suppress(SyntaxError):
                tree = ast.parse(text[start.start() : stop].strip(), mode="eval").body
                if isinstance(tree, ast.Call | ast.Subscript | ast.Attribute):
                    pieces.append(text[start.start() : stop].strip())
                    end = stop
                    break
    return pieces


def follow(message, **names):
    """What a user gets who types the first piece of advice."""
    (name,) = names
    return eval(advised(message, name)[0], {"torch": torch, "numpy": np, **names})


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("op", ["patches", "view"])
def test_advice_for_an_image_keeps_its_numbers(op, dtype):
    numbers = whole_numbers(dtype, 1, 3, 6, 6) if dtype != torch.bool else torch.eye(6).bool().expand(1, 3, 6, 6)
    if dtype in (torch.int64, torch.uint64):
        numbers = torch.from_numpy(numbers.numpy() % 2**50)
    run = {
        "patches": lambda x: extract_patches(x, torch.zeros(1, 1, 2).long(), 6, dtype=torch.float64),
        "view": lambda x: area_downsample(x, 6, dtype=torch.float64),
    }[op]
    with pytest.raises(TypeError, match=f"image has dtype {dtype}, expected one of uint8, uint16, int16") as error:
        run(numbers)
    converted = follow(str(error.value), image=numbers)
    result = run(converted).reshape(1, 3, 6, 6).numpy()
    assert np.array_equal(result.astype(numbers.numpy().dtype), numbers.numpy())


def test_advice_says_where_nothing_holds_the_numbers():
    image = torch.full((1, 3, 6, 6), 2**60 + 1)
    with pytest.raises(TypeError, match=r"which reach 1152921504606846977, are brought below 2\*\*53"):
        area_downsample(image, 3)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(9, 8),
        torch.zeros(3, 9, 8),
        torch.zeros(2, 5, 3, 9, 8),
        torch.zeros(64, 64, 3),
        torch.zeros(2, 64, 64, 3),
        torch.zeros(2, 256, 300, 13),
        torch.zeros(2, 256, 256, 1),
        torch.zeros(2, 64, 64, 1, dtype=torch.uint16),
        torch.zeros(1, 64, 64, 2),
        torch.zeros(70, 80, 7),
    ],
    ids=lambda x: str(tuple(x.shape)),
)
def test_advice_for_the_layout_leads_to_an_image(image):
    with pytest.raises(ValueError, match=r"image must be \(B, C, H, W\)") as error:
        area_downsample(image, 4)
    mended = follow(str(error.value), image=image) if image.ndim != 4 else image.movedim(-1, 1)
    if image.ndim == 4:
        assert "image.movedim(-1, 1)" in str(error.value)
        said = image.to(memory_format=torch.channels_last)  # the other way out
        assert area_downsample(said, (4, 1)).shape == (*image.shape[:2], 4, 1)
    assert mended.numel() == image.numel()
    assert area_downsample(mended, 4).shape[-2:] == (4, 4)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((1, 3, 8, 8), ">u2"),
        np.zeros((1, 3, 8, 8), np.float32)[..., ::-1],
        np.zeros((1, 3, 8, 8), np.uint8),
        np.zeros((1, 3, 8, 8)).tolist(),
        [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)],
        memoryview(np.zeros((1, 3, 8, 8), np.uint8)),
    ],
    ids=["big-endian", "mirrored", "array", "list", "tensors", "buffer"],
)
def test_advice_makes_a_tensor(image):
    with pytest.raises(TypeError, match=r"image must be a torch\.Tensor") as error:
        area_downsample(image, 4)
    assert area_downsample(follow(str(error.value), image=image), 4).shape[-2:] == (4, 4)


@pytest.mark.parametrize("image", [None, "a.png", object()], ids=["nothing", "text", "object"])
def test_no_advice_where_none_would_work(image):
    with pytest.raises(TypeError, match=rf"image must be a torch.Tensor, got {type(image).__name__}$"):
        area_downsample(image, 4)


def test_images_of_different_sizes():
    with pytest.raises(TypeError, match=r"tensors of different sizes.*one at a time, e.g. image\[0\]\[None\]"):
        area_downsample([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)], 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_advice_for_logits(dtype):
    logits = torch.tensor([[2**31 - 1, 5, 1]]).to(dtype)
    with pytest.raises(TypeError, match="logits must be floating point") as error:
        ats.sample_patches(torch.zeros(1, 3, 40, 40), logits[None], 1, 4)
    converted = follow(str(error.value), logits=logits)
    assert converted.is_floating_point()
    wanted = logits.real if dtype.is_complex else logits
    assert torch.equal(converted.double(), wanted.double())


@pytest.mark.parametrize("shape", [(16,), (4, 4), (2, 16), (2, 3, 4, 4)], ids=str)
def test_advice_for_the_shape_of_logits(shape):
    batch = 1 if shape in ((16,), (4, 4)) else 2
    logits = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"logits must be \(B, gh, gw\)") as error:
        ats.sample_patches(torch.zeros(batch, 3, 40, 40), logits, 1, 4)
    pieces = advised(str(error.value), "logits")
    mended = eval(pieces[-1 if shape == (2, 16) else 0], {"logits": logits, "gh": 4, "gw": 4})
    assert ats.sample_patches(torch.zeros(batch, 3, 40, 40), mended, 1, 4).indices.shape == (batch, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8], ids=str)
def test_advice_for_offsets(dtype):
    image = torch.arange(64.0).view(1, 1, 8, 8)
    offsets = torch.tensor([[[2.0, 3.0]]]).to(dtype)
    if dtype == torch.float32:
        offsets += 0.9 - 1  # 1.9, 2.9: cut off they would be a pixel wrong
    with pytest.raises(TypeError, match="offsets must be int32 or int64") as error:
        extract_patches(image, offsets, 1)
    assert extract_patches(image, follow(str(error.value), offsets=offsets), 1).item() == 19
