"""The kernel that draws from large maps, and many draws: survivors of a threshold, ranked by whoever is done last."""

import pytest
import torch

from ats_kernels import philox, sample
from tests.helpers import assert_close

pytestmark = pytest.mark.interpreter
pytest.importorskip("triton")
pytest.importorskip("triton.language")

INF = float("inf")


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Small maps take the large ones' way, with few programs; what is not written comes out as NaN or −77."""
    from ats_kernels.sampling import triton as launchers

    empty = torch.empty

    def filled(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", filled)
    monkeypatch.setattr(launchers, "_SMALL_BLOCKS", 0)
    monkeypatch.setattr(launchers, "_PROGRAMS", 5)
    monkeypatch.setattr(launchers, "_ALL_PROGRAMS", 5)
    return launchers


@pytest.fixture
def overflows(device, monkeypatch):
    """One entry for each row whose survivors had no room; None where kernels are compiled and do not say."""
    from ats_kernels.sampling import kernels_large

    if device.type != "cpu":
        return None
    rows = []
    again = kernels_large._survivors_in_float64

    def counted(*arguments):
        rows.append(1)
        return again(*arguments)

    monkeypatch.setattr(kernels_large, "_survivors_in_float64", counted)
    return rows


def draw_by(backend, logits, n, monkeypatch, seed=7, **options):
    monkeypatch.setenv("ATS_BACKEND", backend)
    generator = torch.Generator(logits.device).manual_seed(seed)
    return sample(logits, n, generator=generator, validate=False, **options)


def assert_as_the_reference(logits, n, monkeypatch, **options):
    draw = draw_by("triton", logits, n, monkeypatch, **options)
    expected = draw_by("reference", logits, n, monkeypatch, **options)
    assert torch.equal(draw.indices, expected.indices)
    for got, want in zip(draw[1:], expected[1:], strict=True):
        assert_close(got, want.float())


def rows_of(kind, device, cells=700):
    logits = torch.randn(2, cells, generator=torch.Generator().manual_seed(len(kind)))
    if kind == "flat":
        logits.zero_()
    elif kind == "peaked":
        logits *= 30
    elif kind == "one cell":
        logits -= 1e4
        logits[:, 300] = 0.0
    elif kind == "masked":
        logits[:, ::3] = -INF
        logits[0, 128:] = -INF
    elif kind == "half":
        logits = logits.half()
    return logits.to(device)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in ("flat", "normal", "peaked", "one cell", "masked", "half")]
    + [(kind, {"replace": True}) for kind in ("normal", "one cell", "masked")]
    + [(kind, {"method": "topk"}) for kind in ("peaked", "masked")],
)
def test_draws_are_the_references(kind, options, device, overflows, monkeypatch):
    assert_as_the_reference(rows_of(kind, device, 400), 9, monkeypatch, **options)
    assert not overflows


@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_many_draws(options, device, monkeypatch):
    """More than there are blocks; and more survivors than are ranked without a second threshold."""
    assert_as_the_reference(rows_of("normal", device, 700)[:1], 70, monkeypatch, **options)


def test_blocks_of_128_beyond_what_a_small_map_has(device, large, monkeypatch):
    monkeypatch.setattr(large, "_SMALL_BLOCKS", 2048)
    logits = torch.randn(1, 2**18 + 1000, generator=torch.Generator().manual_seed(0)).mul(4)
    assert_as_the_reference(logits.to(device), 7, monkeypatch)


@pytest.mark.parametrize("cells", [20, 200])
def test_fewer_cells_with_mass_than_draws(cells, device, monkeypatch):
    """With replacement they do; without, the row is poisoned, and one that has just enough is not."""
    logits = torch.full((2, cells), -INF, device=device)
    logits[:, ::9] = torch.linspace(-1, 1, logits[:, ::9].shape[1], device=device)
    live = int((logits[0] > -INF).sum())
    assert_as_the_reference(logits, live + 9, monkeypatch, replace=True)
    if live < cells // 2:
        assert_as_the_reference(logits, live, monkeypatch)
        assert_as_the_reference(logits, live + 1, monkeypatch)


@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_rows_that_cannot_be_drawn_from_are_poisoned(options, device, monkeypatch):
    logits = rows_of("normal", device, 90)[:1].repeat(5, 1)
    good = draw_by("triton", logits, 5, monkeypatch, **options)
    logits[1, 70], logits[2, 0], logits[3] = float("nan"), INF, -INF
    draw = draw_by("triton", logits, 5, monkeypatch, **options)
    bad = torch.tensor([False, True, True, True, False], device=device)
    assert torch.equal(draw.indices, torch.where(bad[:, None], -1, good.indices))
    for got, want in zip(draw[1:], good[1:], strict=True):
        poisoned = torch.where(bad if want.ndim == 1 else bad[:, None], torch.nan, want)
        torch.testing.assert_close(got, poisoned, rtol=0, atol=0, equal_nan=True)


def test_logits_that_float32_tells_nothing_of_overflow(device, large, overflows, monkeypatch):
    """Far from 0 the bound is wider than the times: all cells survive, and float64 finds the blocks."""
    monkeypatch.setattr(large, "_SPARE_ROOM", 1)
    assert_as_the_reference(rows_of("normal", device) + 3e8, 3, monkeypatch)
    assert overflows is None or len(overflows) == 2
    lowest = torch.full((1, 700), torch.finfo(torch.float32).min, device=device)
    assert_as_the_reference(lowest, 3, monkeypatch)
    assert overflows is None or len(overflows) == 3


def test_ties_of_many_groups_overflow(device, large, overflows, monkeypatch):
    """Groups of two blocks: in all of the first N and more cells tie, of which those of the lowest index are drawn."""
    monkeypatch.setattr(large, "_SPARE_ROOM", 1)
    monkeypatch.setattr(large, "_groups_together", lambda distinct: 16)
    logits = torch.zeros(1, 64 * 32, device=device)
    draw = draw_by("triton", logits, 9, monkeypatch, method="topk")
    assert draw.indices.tolist() == [list(range(9))]
    assert overflows is None or len(overflows) == 1
    assert_as_the_reference(torch.randn_like(logits), 9, monkeypatch)  # by groups
    assert_as_the_reference(torch.randn_like(logits), 17, monkeypatch)  # of which there are not so many
    monkeypatch.setattr(large, "group_size", lambda *_: 1)
    assert_as_the_reference(torch.randn_like(logits), 9, monkeypatch)  # two groups taken together


@pytest.mark.parametrize(("programs", "backwards"), [(1, True), (3, True), (11, False)])
def test_whoever_is_done_last_finishes(programs, backwards, device, large, monkeypatch):
    """Also the program that sums the row up, which is the first to start."""
    monkeypatch.setattr(large, "_PROGRAMS", programs)
    monkeypatch.setattr(large, "_ALL_PROGRAMS", programs)
    if backwards:
        if device.type != "cpu":
            pytest.skip("a GPU has an order of its own")
        from triton.runtime.interpreter import interpreter_builder

        forwards = interpreter_builder.set_grid_idx
        monkeypatch.setattr(
            interpreter_builder,
            "set_grid_idx",
            lambda x, y, z: forwards(interpreter_builder.grid_dim[0] - 1 - x, y, z),
        )
    assert_as_the_reference(rows_of("normal", device), 6, monkeypatch)


@pytest.mark.parametrize("offset", [0.0, -1e3, 1e6])
def test_the_bounds_of_a_blocks_time_hold_what_float64_computes(offset, device, monkeypatch):
    import triton
    from triton import language as tl

    from ats_kernels.sampling import kernels

    monkeypatch.setitem(globals(), "ring_bounds", kernels.ring_bounds)

    @triton.jit
    def bounds_kernel(seed_ptr, peak_ptr, total_ptr, out_ptr, BLOCKS: tl.constexpr):  # noqa: N803
        block = tl.arange(0, BLOCKS)
        peak, total = tl.load(peak_ptr + block), tl.load(total_ptr + block)
        early, late = ring_bounds(tl.load(seed_ptr), block, 0, peak, total)  # noqa: F821
        tl.store(out_ptr + 2 * block, early)
        tl.store(out_ptr + 2 * block + 1, late)

    blocks, cells = 1024, 512
    scale = torch.linspace(0, 10, blocks)[:, None]
    z = torch.randn(blocks, cells, generator=torch.Generator().manual_seed(0)) * scale + offset
    peak = z.max(-1).values
    total = (z - peak[:, None]).exp().sum(-1)
    seed = torch.tensor(987654321987654321)
    bounds = torch.empty(blocks, 2, device=device)
    bounds_kernel[(1,)](seed.to(device), peak.to(device), total.to(device), bounds, BLOCKS=blocks)
    bounds = bounds.cpu().double()
    bits = philox.random_bits(seed, torch.arange(blocks), torch.zeros((), dtype=torch.int64), philox.BLOCKS)
    times = philox.log_exponential(bits) - z.double().logsumexp(-1)
    assert ((bounds[:, 0] < times) & (times < bounds[:, 1])).all()
    width = (bounds[:, 1] - bounds[:, 0]).median()
    assert width < 2e-4 + 2e-6 * abs(offset)  # and they say something


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_many_rows_at_once(options, device, monkeypatch):
    """On a GPU, where a row's programs run beside each other: the same draws each time, and the CPU's."""
    from ats_kernels.sampling.cpu import sample_cpu
    from ats_kernels.sampling.triton import sample_triton

    monkeypatch.undo()
    logits = torch.randn(16, 2**20, generator=torch.Generator().manual_seed(1)).mul(3).to(device)
    seed = None if options.get("method") == "topk" else torch.tensor(1234567890123456789, device=device)
    arguments = (100, options.get("replace", False), options.get("method", "sample"))
    draws = [sample_triton(logits, *arguments, seed)[0] for _ in range(20)]
    assert all(torch.equal(draw.indices, draws[0].indices) for draw in draws)
    expected, _ = sample_cpu(logits.cpu(), *arguments, None if seed is None else seed.cpu())
    assert torch.equal(draws[0].indices.cpu(), expected.indices)
