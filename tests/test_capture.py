"""A whole step in CUDA graphs, under torch.compile, under autocast, in deterministic mode and without a host sync.

A step draws, gathers, pools and goes back into the logits and the features. Where a CPU can run the same, it does.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ats
import ats_kernels
from tools.launches import WAITS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
B, N, PATCH, GRID = 3, 4, 9, (12, 10)


def make_image(device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (B, 3, 61, 47), dtype=torch.uint8, generator=generator).to(device)


def make_logits(device: str) -> Tensor:
    return torch.randn(B, *GRID, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()


def step(
    image: Tensor, logits: Tensor, generator: torch.Generator | None = None, validate: bool | None = None
) -> dict[str, Tensor]:
    """Features are each patch's mean colours: what reaches the logits can then be worked out again from the indices."""
    sample = ats.sample_patches(image, logits, N, PATCH, generator=generator, validate=validate)
    features = sample.patches.mean((-2, -1))  # (B, N, C)
    pooled = ats.expectation(features, sample.log_attention)
    loss = pooled.square().sum() - 0.1 * sample.entropy.mean()
    (grad,) = torch.autograd.grad(loss, logits)
    return {"indices": sample.indices, "patches": sample.patches, "loss": loss.detach(), "grad": grad}


def assert_right(result: dict[str, Tensor], image: Tensor, logits: Tensor) -> None:
    """The loss and the gradient are those of the cells that were drawn, by plain PyTorch in float64."""
    z = logits.detach().double().cpu().flatten(1).requires_grad_()
    indices = result["indices"].cpu()
    assert all(row.unique().numel() == N for row in indices)
    assert ((indices >= 0) & (indices < z.shape[1])).all()
    patches, _ = ats.functional.extract_cells(image.cpu(), indices, GRID, (PATCH, PATCH))
    torch.testing.assert_close(result["patches"].cpu(), patches, rtol=1e-5, atol=1e-6)
    log_attention = z.log_softmax(-1)
    log_drawn = log_attention.gather(1, indices)
    drawn = log_drawn.detach().exp()
    weights = (1 - (drawn.cumsum(-1) - drawn) + torch.arange(N - 1, -1, -1) * drawn) / N
    features = patches.double().mean((-2, -1))
    terms = features * (1 + log_drawn - log_drawn.detach()).unsqueeze(-1)
    entropy = -(log_attention.exp() * log_attention).sum(-1)
    loss = torch.einsum("bn,bnc->bc", weights, terms).square().sum() - 0.1 * entropy.mean()
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(result["loss"].cpu().double(), loss.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["grad"].cpu().double().flatten(1), grad, rtol=1e-4, atol=1e-5)


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


def unordered_inputs(device: str) -> tuple[Tensor, Tensor]:
    """Features (2, 5, 3) and log a (2, 5), which both learn."""
    torch.manual_seed(3)
    log_attention = torch.randn(2, 9).log_softmax(-1)[:, :5].to(device)
    return torch.rand(2, 5, 3).to(device).requires_grad_(), log_attention.requires_grad_()


def unordered_step(features: Tensor, log_attention: Tensor) -> tuple[Tensor, ...]:
    """Φ̂ by the unordered estimator with its control variate, and both gradients."""
    pooled = ats.expectation(features, log_attention, estimator="unordered", control_variate=True)
    return pooled, *torch.autograd.grad(pooled.square().sum(), (features, log_attention))


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


# CUDA graphs


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


# torch.compile


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        attention = nn.Conv2d(3, 1, 3, padding=1)
        feature = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.sampling = ats.nn.AttentionSampling(attention, feature, N, PATCH)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        view = ats.area_downsample(image, GRID)
        pooled, _, sample = self.sampling(view, image)
        return F.cross_entropy(self.head(pooled), labels) - 0.1 * sample.entropy.mean()


def loss_and_gradients(model: nn.Module, image: Tensor, parameters: Iterator[nn.Parameter]) -> list[Tensor]:
    torch.manual_seed(3)
    loss = model(image, torch.arange(B, device=image.device))
    return [loss.detach(), *torch.autograd.grad(loss, list(parameters))]


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


# Autocast, deterministic mode


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, image = Model().to(device), make_image(device)
    with torch.autocast(device, dtype):
        low = loss_and_gradients(model, image, model.parameters())
    assert all(torch.isfinite(value).all() for value in low)
    assert [value.dtype for value in low[1:]] == [parameter.dtype for parameter in model.parameters()]
    # Logits that are rounded may draw other cells: compare where every cell is drawn, and order matters little.
    model.sampling.sampler.n_patches = GRID[0] * GRID[1]
    full = loss_and_gradients(model, image, model.parameters())
    with torch.autocast(device, dtype):
        low = loss_and_gradients(model, image, model.parameters())
    torch.testing.assert_close(low[0].float(), full[0], rtol=2e-2, atol=2e-2)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_mode_is_honoured(device: str) -> None:
    image, logits = make_image(device), make_logits(device)
    results = []
    for _ in range(3):
        torch.manual_seed(4)
        results.append(step(image, logits))
    for result in results[1:]:
        assert all(torch.equal(value, results[0][name]) for name, value in result.items())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_mode_is_honoured_or_refused_by_the_images_gradient(device: str) -> None:
    image = make_image(device).float().requires_grad_()
    offsets = torch.full((B, 40, 2), 5, device=device)  # all patches of an image overlap

    def gradient() -> Tensor:
        patches = ats_kernels.extract_patches(image, offsets, PATCH)
        scale = torch.linspace(0.1, 3.7, patches.numel(), device=device).view_as(patches)
        return torch.autograd.grad((patches * scale).sum(), image)[0]

    refusal, gradients = "", []
    try:
        gradients = [gradient() for _ in range(3)]
    except RuntimeError as error:
        refusal = str(error)
    assert not refusal or "deterministic" in refusal
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# What PyTorch refuses on a GPU in deterministic mode, of what these ops could be made of (its own documentation).
REFUSED = {
    "cumsum", "cumsum_", "put_", "histc", "kthvalue", "median", "_adaptive_avg_pool2d_backward", "bincount",
    "scatter_reduce", "scatter_reduce_", "upsample_bilinear2d_backward", "reflection_pad2d_backward",
}  # fmt: skip


class Refusals(TorchDispatchMode):
    """Collects what a GPU would be refused; a running sum of integers is allowed. Tensors say that they lie on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in REFUSED and args[0].is_floating_point():
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("estimator", ["ordered", "unordered"])
def test_deterministic_mode_refuses_nothing_of_the_estimators(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel runs, on devices other than the CPU, weights and control variates are PyTorch's operators."""
    monkeypatch.setenv("ATS_BACKEND", "reference")
    monkeypatch.setattr("ats_kernels.sums.is_free", lambda values: False)
    features, log_attention = unordered_inputs("cpu")
    with Refusals() as refusals:
        pooled = ats.expectation(features, log_attention, estimator=estimator, control_variate=True)
        pooled.sum().backward()
        ats_kernels.sample(torch.randn(2, 300), 8, replace=True, validate=False)
        estimated = ats.estimate(features, log_attention, estimator=estimator)
    assert refusals.found == []
    monkeypatch.undo()
    expected = ats.estimate(features, log_attention, estimator=estimator)
    torch.testing.assert_close(estimated.value, expected.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(estimated.variance, expected.variance, rtol=1e-12, atol=1e-12)
