"""A whole step in CUDA graphs, under torch.compile and without a host sync.

Where a CPU can run the same, it does.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ats
import ats_kernels
from tests.whole_step import (
    DEVICES,
    PATCH,
    Model,
    N,
    assert_right,
    loss_and_gradients,
    make_image,
    make_logits,
    step,
    unordered_inputs,
    unordered_step,
)
from tools.launches import WAITS


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_right(device: str) -> None:
    torch.manual_seed(0)
    image, logits = make_image(device), make_logits(device)
    assert_right(step(image, logits), image, logits)


@pytest.mark.interpreter
def test_a_step_by_the_kernels_is_right(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATS_BACKEND", "triton")
    image, logits = make_image(device.type), make_logits(device.type)
    torch.manual_seed(0)
    assert_right(step(image, logits), image, logits)


class HostReads(TorchDispatchMode):
    """Collects what makes the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            self.found.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.interpreter
def test_nothing_would_wait_for_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATS_BACKEND", "triton")
    image, logits = make_image(device.type), make_logits(device.type)
    features, log_attention = unordered_inputs(device.type)
    with HostReads() as reads:
        step(image, logits, validate=False)
        ats.area_downsample(image, 20, mean=0.5, std=0.25)
        unordered_step(features, log_attention)
        many = torch.zeros(1, 6, 12, 12, device=device)
        offsets = torch.zeros(1, 2, 2, dtype=torch.int64, device=device)
        ats_kernels.extract_patches(many, offsets, 5, mean=list(range(6)), std=list(range(1, 7)))
        ats.patch_positions(offsets, (5, 5), (12, 12))
    assert reads.found == []


@pytest.mark.gpu
def test_the_unordered_estimator_in_a_cuda_graph() -> None:
    """Its weights are PyTorch's operators: captured, replayed on new values, and what the CPU makes of them."""
    arguments = unordered_inputs("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        unordered_step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = unordered_step(*arguments)
    with torch.no_grad():
        arguments[0].mul_(2)
        arguments[1].sub_(0.5)
    graph.replay()
    on_cpu = [argument.detach().cpu().requires_grad_() for argument in arguments]
    for got, want in zip(results, unordered_step(*on_cpu), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["on the GPU", "in pinned memory"])
@pytest.mark.parametrize("own_generator", [False, True])
def test_replays_of_a_cuda_graph_draw_anew(where: str, own_generator: bool) -> None:
    image = make_image("cuda") if where == "on the GPU" else make_image("cpu").pin_memory()
    logits = make_logits("cuda")
    generator = torch.Generator("cuda").manual_seed(5) if own_generator else None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(image, logits, generator)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = step(image, logits, generator)

    def replay() -> Tensor:
        graph.replay()
        assert_right(result, image, logits)
        return result["indices"].clone()

    draws = [replay() for _ in range(8)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 8
    reseed = torch.cuda.manual_seed if generator is None else generator.manual_seed
    reseed(7)
    first = [replay() for _ in range(3)]
    reseed(7)
    assert all(torch.equal(draw, replay()) for draw in first)
    with torch.no_grad():  # new values in the captured tensors are seen
        logits.copy_(logits.flip(-1))
    replay()


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["on the GPU", "in pinned memory"])
def test_nothing_waits_for_the_gpu(where: str) -> None:
    image = make_image("cuda") if where == "on the GPU" else make_image("cpu").pin_memory()
    logits = make_logits("cuda")
    step(image, logits)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(image, logits)
        ats.area_downsample(image.to("cuda", non_blocking=True), 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_right(result, image, logits)


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_compiles_without_a_graph_break(device: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model, image = Model().to(device), make_image(device)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch._inductor.config.patch(fallback_random=True):  # eager random numbers, to compare with
        found = loss_and_gradients(compiled, image, model.parameters())
    expected = loss_and_gradients(model, image, model.parameters())
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_step_draws_anew(device: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    image, logits = make_image(device), make_logits(device)

    @torch.compile(fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    def draw(image: Tensor, logits: Tensor) -> Tensor:
        return ats.sample_patches(image, logits, N, PATCH).indices

    draws = [draw(image, logits) for _ in range(6)]
    assert len({tuple(indices.flatten().tolist()) for indices in draws}) == 6


@pytest.mark.interpreter
def test_a_second_image_size_compiles_without_a_graph_break(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes become symbols to the compiler then, of which launchers know no numbers."""
    monkeypatch.setenv("ATS_BACKEND", "triton")
    torch.compiler.reset()

    def read(image: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        view = ats.area_downsample(image, (5, 4), mean=0.1, std=0.3)
        sample = ats.sample_patches(image, logits, N, PATCH, mean=0.1, std=0.3, validate=False)
        features = sample.patches.mean((-2, -1))
        pooled = ats.expectation(features, sample.log_attention, estimator="unordered", control_variate=True)
        return view, sample.patches, sample.log_attention, pooled, sample.offsets

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    for height, width, cells in ((21, 17, (6, 5)), (24, 17, (6, 5)), (26, 20, (5, 7))):
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        logits = torch.randn(1, *cells, generator=torch.Generator().manual_seed(2)).to(device)
        results = []
        for run in (compiled, read):
            torch.manual_seed(5)
            *learned, offsets = run(image, logits)
            (grad,) = torch.autograd.grad(sum(value.sum() for value in learned), image)
            results.append((*learned, offsets, grad))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
