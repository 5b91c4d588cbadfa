"""The Triton kernels of `sample` against the reference: the same draws one by one, values, gradients, poison."""

import pytest
import torch

from ats_kernels import sample
from tests.helpers import assert_close

pytestmark = pytest.mark.interpreter
pytest.importorskip("triton")

INF = float("inf")


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch):
    """What a kernel forgets to write comes out as NaN, or as an index that no cell has."""
    empty = torch.empty

    def filled(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", filled)


def generator_on(device, seed=7):
    return torch.Generator(device).manual_seed(seed)


def draw_and_gradient(backend, logits, n, monkeypatch, **options):
    """Draw and the gradient of a fixed combination of all that comes out."""
    monkeypatch.setenv("ATS_BACKEND", backend)
    logits = logits.clone().requires_grad_()
    draw = sample(logits, n, generator=generator_on(logits.device), validate=False, **options)
    loss = sum(
        (value * torch.linspace(-1, 2, value.numel(), device=value.device).view_as(value)).sum() for value in draw[1:]
    )
    loss.backward()
    return draw, logits.grad


def make_logits(device, rows, cells, scale=1.0, dtype=torch.float32):
    logits = torch.randn(rows, cells, generator=torch.Generator().manual_seed(cells)) * scale
    return logits.to(device, dtype)


# (rows, cells, n, options): both ways through the kernels (few draws, many), odd sizes, one block and several.
CASES = [
    (2, 700, 5, {}),
    (2, 65, 65, {}),  # every cell, over two blocks
    (1, 700, 40, {}),
    (1, 1, 1, {}),
    (1, 133_000, 7, {}),  # blocks of 128
    (2, 700, 5, {"replace": True}),
    (1, 20, 35, {"replace": True}),
    (2, 700, 6, {"method": "topk"}),
    (2, 700, 40, {"method": "topk"}),
]


@pytest.mark.parametrize(("rows", "cells", "n", "options"), CASES)
def test_same_draws_and_values_as_the_reference(rows, cells, n, options, device, monkeypatch):
    logits = make_logits(device, rows, cells, scale=10.0 if n % 2 else 1.0)
    if cells > 3 * n:
        logits[:, ::3] = -INF
    draw, grad = draw_and_gradient("triton", logits, n, monkeypatch, **options)
    expected, expected_grad = draw_and_gradient("reference", logits, n, monkeypatch, **options)
    assert torch.equal(draw.indices, expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert got.dtype == torch.float32
        assert_close(got, want)
    assert_close(grad, expected_grad)


@pytest.mark.parametrize("options", [{}, {"replace": True}], ids=["without", "with"])
@pytest.mark.parametrize("cells", [6, 700])
def test_logits_near_the_ends_of_their_range(cells, options, device, monkeypatch):
    """A row of the lowest number is uniform, and a difference that float32 cannot hold is no mask."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((2, cells), lowest, device=device)
    logits[1, :2] = -lowest
    draw, grad = draw_and_gradient("triton", logits, 3, monkeypatch, **options)
    expected, expected_grad = draw_and_gradient("reference", logits, 3, monkeypatch, **options)
    assert torch.equal(draw.indices[:, :2], expected.indices[:, :2])  # the third of row 1 has no order to come in
    assert torch.equal(draw.indices[0], expected.indices[0])
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert_close(got, want)
    assert draw.log_attention.isfinite().all()
    assert_close(grad[0], expected_grad[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 29])
def test_half_precision(dtype, n, device, monkeypatch):
    """The same draws as from the same numbers in float32, float32 values, a gradient of the logits' dtype."""
    logits = make_logits(device, 1, 150, 3.0, dtype)
    draw, grad = draw_and_gradient("triton", logits, n, monkeypatch)
    wide, wide_grad = draw_and_gradient("triton", logits.float(), n, monkeypatch)
    for got, want in zip(draw, wide, strict=True):
        assert torch.equal(got, want)
    assert grad.dtype == dtype
    assert_close(grad, wide_grad)


@pytest.mark.parametrize("view", ["rows apart", "one row for all", "transposed"])
@pytest.mark.parametrize("n", [3, 29])
def test_strides(view, n, device, monkeypatch):
    if view == "rows apart":
        logits = make_logits(device, 2, 217)[:, 3:100]
    elif view == "one row for all":
        logits = make_logits(device, 1, 97).expand(2, -1)
    else:
        logits = make_logits(device, 97, 2).t()
    monkeypatch.setenv("ATS_BACKEND", "triton")
    draw = sample(logits, n, generator=generator_on(device))
    expected = sample(logits.contiguous(), n, generator=generator_on(device))
    assert torch.equal(draw.indices, expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert_close(got, want)  # compiled, another layout is another order of a sum


@pytest.mark.parametrize("options", [{}, {"replace": True}], ids=["without", "with"])
def test_expanded_gradients(options, device, monkeypatch):
    """The gradient of a sum comes in as one number with strides of 0."""
    logits = make_logits(device, 2, 150)
    grads = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ATS_BACKEND", backend)
        z = logits.clone().requires_grad_()
        sample(z, 8, generator=generator_on(device), **options).log_attention.sum().backward()
        grads.append(z.grad)
    assert_close(*grads)


@pytest.mark.parametrize("mass", [1e-8, 1e-30])
@pytest.mark.parametrize("n", [4, 40])
def test_tiny_masses_keep_their_precision(mass, n, device, monkeypatch):
    """log a = −99·mass of the largest cell: formed as 1 − a in float32 it would be 0."""
    logits = torch.full((1, 100), mass, dtype=torch.float64).log().float().to(device)
    logits[0, 70] = 0.0
    monkeypatch.setenv("ATS_BACKEND", "triton")
    draw = sample(logits, n, generator=generator_on(device))
    monkeypatch.setenv("ATS_BACKEND", "reference")
    expected = sample(logits.double(), n, generator=generator_on(device))
    assert torch.equal(draw.indices, expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("n", "replace"), [(3, False), (2, True), (29, False)])
def test_rows_that_cannot_be_drawn_from_are_poisoned(n, replace, device, monkeypatch):
    """In place of an error that would make the host wait; the other rows are left alone."""
    good = make_logits(device, 6, 80)
    logits = good.clone()
    logits[1, 70], logits[2, 0], logits[3], logits[4, 2:] = float("nan"), INF, -INF, -INF
    bad = torch.tensor([False, True, True, True, not replace and n > 2, False], device=device)
    draw, grad = draw_and_gradient("triton", logits, n, monkeypatch, replace=replace)
    expected, expected_grad = draw_and_gradient("triton", good, n, monkeypatch, replace=replace)
    assert torch.equal((draw.indices == -1).all(-1), bad)
    assert torch.equal((draw.indices < 0).any(-1), bad)
    for value in (draw.log_attention, draw.logsumexp[:, None], draw.entropy[:, None]):
        assert torch.equal(value.isnan(), bad[:, None].expand_as(value))
    for got, want in zip((*draw, grad), (*expected, expected_grad), strict=True):
        assert torch.equal(got[[0, 5]], want[[0, 5]])


@pytest.mark.parametrize("n", [10, 40])
def test_topk_takes_the_lower_index_among_ties(n, device, monkeypatch):
    logits = (make_logits(device, 2, 300) * 2).round() + 0.0
    logits[:, ::7] = -0.0  # equal to 0.0
    monkeypatch.setenv("ATS_BACKEND", "triton")
    indices = sample(logits, n, method="topk").indices
    assert torch.equal(indices, logits.sort(dim=-1, descending=True, stable=True).indices[:, :n])


def test_more_rows_than_a_grid_has_in_its_other_dimensions(device, monkeypatch):
    if device.type == "cpu":
        pytest.skip("70,000 programs take the interpreter minutes")
    logits = make_logits(device, 70_000, 64)
    draw, grad = draw_and_gradient("triton", logits, 2, monkeypatch)
    expected, expected_grad = draw_and_gradient("reference", logits, 2, monkeypatch)
    assert torch.equal(draw.indices, expected.indices)
    assert_close(grad, expected_grad)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "cells", "n"), [(128, 32_400, 10), (1, 2**24, 256), (1, 2**25, 1024), (2, 1500, 1024)]
)
@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_same_draws_on_every_device(rows, cells, n, options, device, monkeypatch):
    """The CPU path given the GPU's seed draws the same cells: at full size, where float32 sums differ most."""
    from ats_kernels.sampling.cpu import sample_cpu
    from ats_kernels.sampling.triton import sample_triton

    monkeypatch.undo()
    logits = make_logits(device, rows, cells, 2.0)
    seed = None if options.get("method") == "topk" else torch.tensor(1234567890123456789, device=device)
    arguments = (n, options.get("replace", False), options.get("method", "sample"))
    draw, _ = sample_triton(logits, *arguments, seed)
    expected, _ = sample_cpu(logits.cpu(), *arguments, None if seed is None else seed.cpu())
    assert torch.equal(draw.indices.cpu(), expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert_close(got.cpu(), want.float())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [10, 64])
def test_graph_replays_draw_anew(n, device):
    logits = make_logits(device, 4, 5000)
    sample(logits, n)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw = sample(logits, n)
    graph.replay()
    first = draw.indices.clone()
    graph.replay()
    assert not torch.equal(first, draw.indices)
