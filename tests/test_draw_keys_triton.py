"""The kernel that draws decides in float32, and in float64 where that cannot tell: always as the reference does."""

import pytest
import torch

from ats_kernels import sample

pytestmark = pytest.mark.interpreter
pytest.importorskip("triton")
pytest.importorskip("triton.language")

INF = float("inf")


def draw_by(backend, logits, n, seed, monkeypatch, **options):
    monkeypatch.setenv("ATS_BACKEND", backend)
    return sample(logits, n, generator=torch.Generator(logits.device).manual_seed(seed), validate=False, **options)


@pytest.fixture
def calls(device, monkeypatch):
    """How often float64 was asked, by name; None where the kernel is compiled and does not say."""
    from ats_kernels.sampling import kernels_draw

    if device.type != "cpu":
        return None
    counts = {"draw_in_float64": 0, "log_attention_in_float64": 0}

    def counting(name):
        function = getattr(kernels_draw, name)

        def counted(*arguments):
            counts[name] += 1
            return function(*arguments)

        return counted

    for name in counts:
        monkeypatch.setattr(kernels_draw, name, counting(name))
    return counts


def rows_of(kind):
    """Logits (4, 150), over three blocks."""
    logits = torch.randn(4, 150, generator=torch.Generator().manual_seed(len(kind)))
    if kind == "flat":
        logits.zero_()
    elif kind == "peaked":
        logits *= 30
    elif kind == "masked":
        logits[:, ::2] = -INF
        logits[0, 64:128] = -INF
    elif kind == "low":
        logits[:, ::3] = torch.finfo(torch.float32).min
    elif kind == "half":
        logits = logits.half()
    return logits


@pytest.mark.parametrize("options", [{}, {"replace": True}], ids=["without", "with"])
@pytest.mark.parametrize("kind", ["flat", "normal", "peaked", "masked", "low", "half"])
def test_draws_are_the_references_for_many_seeds(kind, options, device, calls, monkeypatch):
    logits = rows_of(kind).to(device)
    for seed in range(4):
        draw = draw_by("triton", logits, 6, seed, monkeypatch, **options)
        expected = draw_by("reference", logits.float(), 6, seed, monkeypatch, **options)
        assert torch.equal(draw.indices, expected.indices)
    assert calls is None or sum(calls.values()) <= 4  # of 16 rows; hardly ever, but it may


def test_float64_alone_draws_the_same(device, calls, monkeypatch):
    """Where float32 is told that it errs by anything, all rows are left to float64."""
    from triton import language as tl

    from ats_kernels.sampling import kernels_draw

    if calls is None:
        pytest.skip("a compiled kernel keeps its constants")
    monkeypatch.setattr(kernels_draw, "E", tl.constexpr(1.0))
    monkeypatch.setattr(kernels_draw, "NEAR", tl.constexpr(1.0))
    logits = rows_of("normal").to(device)
    draw = draw_by("triton", logits, 6, 3, monkeypatch, replace=True)
    assert calls == {"draw_in_float64": 4, "log_attention_in_float64": 8}
    assert torch.equal(draw.indices, draw_by("reference", logits, 6, 3, monkeypatch, replace=True).indices)


@pytest.mark.parametrize("options", [{}, {"replace": True}], ids=["without", "with"])
@pytest.mark.parametrize("cells", [2, 150])
@pytest.mark.parametrize("seed", [1, 2])
def test_near_ties_are_left_to_float64(seed, cells, options, device, calls, monkeypatch):
    """On either side of where the draw changes with a logit, two ring times, or a random number and where a cell ends,
    are as near as float32's logits can bring them."""
    logits = torch.randn(1, cells, generator=torch.Generator().manual_seed(cells)).to(device)
    n = min(4, cells)

    def drawn(backend, value):
        logits[0, -1] = value
        return draw_by(backend, logits, n, seed, monkeypatch, **options).indices

    low, high = -9.0, 9.0
    at_low = drawn("reference", low)
    assert not torch.equal(at_low, drawn("reference", high))
    for _ in range(40):
        middle = float(torch.tensor((low + high) / 2))
        if torch.equal(drawn("reference", middle), at_low):
            low = middle
        else:
            high = middle
    assert high - low < 1e-6
    for value in (low, high):
        assert torch.equal(drawn("triton", value), drawn("reference", value))
    assert calls is None or sum(calls.values()) >= 2


@pytest.mark.parametrize("cells", [20, 150])
def test_fewer_cells_with_mass_than_draws(cells, device, monkeypatch):
    """With replacement they do: none that is masked comes, and no row needs float64 for it."""
    logits = torch.full((3, cells), -INF, device=device)
    logits[:, ::9] = torch.linspace(-1, 1, logits[:, ::9].shape[1], device=device)
    draw = draw_by("triton", logits, 30, 5, monkeypatch, replace=True)
    assert torch.equal(draw.indices, draw_by("reference", logits, 30, 5, monkeypatch, replace=True).indices)


def test_the_interval_of_a_time_holds_what_float64_computes(device, monkeypatch):
    """The bound on float32's error, for the times of whole blocks against the reference's formula."""
    import triton
    from triton import language as tl

    from ats_kernels import philox
    from ats_kernels.sampling import kernels_draw
    from ats_kernels.sampling.draws import ring_times

    cell_keys, earliest, latest = kernels_draw._cell_keys, kernels_draw._soonest, kernels_draw._latest

    @triton.jit
    def bounds_kernel(logits_ptr, seed_ptr, out_ptr, top, BLOCK: tl.constexpr):  # noqa: N803
        block = tl.program_id(0) + tl.arange(0, 1)
        cell = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        key = cell_keys(tl.load(logits_ptr + cell), top, tl.load(seed_ptr), block, cell, 0)
        tl.store(out_ptr + 2 * cell, earliest(key))
        tl.store(out_ptr + 2 * cell + 1, latest(key))

    for name, function in (("cell_keys", cell_keys), ("earliest", earliest), ("latest", latest)):
        monkeypatch.setitem(globals(), name, function)
    cells, block = 64 * 40, 64
    logits = torch.randn(cells, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 30, cells)
    seed = torch.tensor(987654321987654321)
    bounds = torch.empty(cells, 2, device=device)
    bounds_kernel[(cells // block,)](logits.to(device), seed.to(device), bounds, float(logits.max()), BLOCK=block)
    bounds = bounds.cpu().double()

    index, row = torch.arange(cells), torch.zeros((), dtype=torch.int64)
    of_blocks = philox.log_exponential(philox.random_bits(seed, index[: cells // block], row, philox.BLOCKS))
    of_cells = philox.log_exponential(philox.random_bits(seed, index, row, philox.CELLS))
    log_mass = (logits.double() - logits.max()).view(1, -1, block)
    times = ring_times(log_mass, of_blocks[None], of_cells.view(1, -1, block)).flatten()
    assert ((bounds[:, 0] < times) & (times < bounds[:, 1])).all()
    assert (bounds[:, 1] - bounds[:, 0]).median() < 1e-2  # and they say something
