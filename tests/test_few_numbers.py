"""What the CPU path does otherwise where numbers are few, against what it does with many and against the reference."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

import ats
from ats_kernels import estimator_weights, expectation, extract_cells, extract_patches, extract_patches_ref
from ats_kernels.patches import cpu as patches_cpu
from ats_kernels.patches import few as patches_few
from ats_kernels.patches.cells import CellMap, cell_offsets_cpu, cell_offsets_ref
from ats_kernels.pooling import cpu as pooling_cpu
from tests.helpers import assert_close, randn, seeded

NAN = float("nan")
WAYS = [(True, "ordered"), (False, "ordered"), (False, "unordered")]  # (replace, estimator)


def log_attention(n: int, dtype: torch.dtype) -> Tensor:
    """Of rows drawn from flat and sharp attention, one that leaves 1e-12, one of a single cell and one of NaN."""
    logits = torch.stack([randn(40, seed=seed) * scale for seed, scale in enumerate((0, 1, 8, 3, 1))])
    logits[3, 0] += 30
    order = torch.rand(logits.shape, generator=seeded(1)).argsort(-1)[:, :n]
    order[3, 0], order[3, 1:] = 0, torch.arange(1, n)
    values = logits.log_softmax(-1).gather(1, order)
    values[4, 0] = NAN
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize(("replace", "estimator"), WAYS)
def test_pooling_few_numbers(replace, estimator, control_variate, n, dtype, monkeypatch):
    """NumPy, PyTorch's operators and the reference: values, weights and both gradients alike, NaN in the same row."""
    log_a, features, way = log_attention(n, dtype), randn(5, n, 3, 2).to(dtype), {"replace": replace}
    found = {}
    for name, backend, few in (("small", "cpu", 2**10), ("operators", "cpu", 0), ("reference", "reference", 0)):
        monkeypatch.setenv("ATS_BACKEND", backend)
        monkeypatch.setitem(pooling_cpu._FEW, "small", (few, few))
        leaves = features.clone().requires_grad_(), log_a.clone().requires_grad_()
        pooled = expectation(*leaves, estimator=estimator, control_variate=control_variate, **way)
        gradients = torch.autograd.grad((pooled * randn(5, 3, 2, seed=9).to(dtype)).sum(), leaves)
        found[name] = [pooled.detach(), *gradients, estimator_weights(log_a, estimator=estimator, **way)]
    for ours in ("small", "operators"):
        for value, wanted in zip(found[ours], found["reference"], strict=True):
            assert value.dtype == dtype
            assert value[4].isnan().any()
            assert value[:4].isfinite().all()
            assert_close(value, wanted)


def test_pooling_few_numbers_needs_one_gradient_only():
    features, log_a = randn(2, 4, 3), randn(2, 4).log_softmax(-1)
    both = [tensor.clone().requires_grad_() for tensor in (features, log_a)]
    wanted = torch.autograd.grad(expectation(*both).sum(), both)
    for number, tensors in enumerate([(both[0], log_a), (features, both[1])]):
        (gradient,) = torch.autograd.grad(expectation(*tensors).sum(), both[number])
        assert torch.equal(gradient, wanted[number])


def test_offsets_of_few_cells():
    """Halves to even, on both sides of 0, and numbers of cells that no grid has: as fractions round."""
    generator = seeded(2)
    for _ in range(50):
        a, b, d = (int(value) for value in torch.randint(-60, 60, (3,), generator=generator))
        cells = CellMap((4, 5), (a, b, abs(d) + 1), (2 * a, 3, 2))
        indices = torch.randint(-3, 25, (3, 7), generator=generator)
        offsets = cell_offsets_cpu(indices, cells)
        wanted = [
            [[round(Fraction(m * i + c, e)) for i, (m, c, e) in zip(divmod(q, 5), cells[1:], strict=True)] for q in row]
            for row in indices.tolist()
        ]
        assert offsets.tolist() == wanted
        for tensor in (indices, indices.int(), indices.t().contiguous().t()):
            assert torch.equal(cell_offsets_ref(tensor, cells), offsets)
            assert torch.equal(cell_offsets_cpu(tensor, cells), offsets)


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("stored", "read"),
    [
        (torch.uint8, torch.float32),
        (torch.int16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.uint8, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize("way", ["index", "index, scratch", "slices", "loops"])
def test_reading_few_patches(way, stored, read, channels_last, padding, monkeypatch):
    """One by one, or bytes by way of the result's own memory or of some of their own; they cross every border."""
    if way == "loops":
        pytest.importorskip("numba")
    monkeypatch.setenv("ATS_BACKEND", "numba" if way == "loops" else "cpu")
    if way.startswith("index"):
        monkeypatch.setattr(patches_few, "_FEW", {"loops": (0, 0), "slices": (0, 0)})
        monkeypatch.setattr(patches_cpu, "_SCRATCH", 2**18 if way.endswith("scratch") else 0)
    image = (randn(2, 3, 12, 15) * 40 + 100).clamp(0, 255).to(stored)
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    offsets = torch.randint(-6, 17, (2, 8, 2), generator=seeded(3))
    offsets[0, :4, 0], offsets[1, :4, 1] = 3, 6  # inside along an axis
    offsets[1, 5] = torch.tensor([2**62, -(2**62)])
    options = {"padding": padding, "dtype": read}
    got = extract_patches(image, offsets, (5, 4), mean=0.5, std=[0.5, 1.0, 2.0], **options)
    wanted = extract_patches_ref(image, offsets, (5, 4), means=[0.5] * 3, stds=[0.5, 1.0, 2.0], **options)
    assert_close(got, wanted)
    assert got.is_contiguous() != channels_last


def test_reading_few_cells_gives_their_offsets():
    image, indices = (randn(1, 1, 30, 20).abs() * 60).to(torch.uint8), torch.tensor([[0, 7, 19, 12]])
    patches, offsets = extract_cells(image, indices, (4, 5), (30, -9, 4), (16, -8, 4), 6)
    assert torch.equal(offsets[0], torch.tensor([[-2, -2], [5, 6], [20, 14], [13, 6]]))
    assert torch.equal(patches, extract_patches(image, offsets, 6))


@pytest.mark.parametrize(("stored", "options"), [(torch.uint8, {"mean": 0.4, "std": 0.2}), (torch.float32, {})])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 16])
def test_loops_make_no_difference_to_a_chain(batch, channels_last, stored, options, monkeypatch):
    """The same cells and pixels, bit for bit, and log a, pooled features and gradients to rounding."""
    pytest.importorskip("numba")
    image = (randn(batch, 3, 60, 70) * 40 + 100).clamp(0, 255).to(stored)
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    maps, features = randn(batch, 12, 14) * 2, randn(batch, 6, 5)
    found = {}
    for way in ("cpu", "numba"):
        monkeypatch.setenv("ATS_BACKEND", way)
        leaves = maps.clone().requires_grad_(), features.clone().requires_grad_()
        sample = ats.sample_patches(image, leaves[0], 6, (9, 8), generator=seeded(5), **options)
        pooled = ats.expectation(leaves[1], sample.log_attention)
        found[way] = sample, [sample.log_attention, pooled, *torch.autograd.grad(pooled.square().sum(), leaves)]
    (ours, values), (loops, others) = found.values()
    for name in ("indices", "offsets", "patches"):
        assert torch.equal(getattr(ours, name), getattr(loops, name))
    for one, other in zip(values, others, strict=True):
        assert_close(one.detach(), other.detach())


def test_rounding_of_large_places():
    """Where float64 has no room for them, places are worked out in whole numbers."""
    cells = CellMap((4, 5), (2**52 + 1, 1, 3), (7, -(2**55), 2))
    indices = torch.arange(20)[None]
    assert torch.equal(cell_offsets_cpu(indices, cells), cell_offsets_ref(indices, cells))
