"""docs/compatibility.md: transforms, compilers, other devices. Values are those of the plain call."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.func import grad, jacrev, jvp, vmap

import ats
from ats_kernels import area_downsample, expectation, extract_patches, sample
from ats_kernels.pooling.variance import estimate
from tests.helpers import assert_close, randn, seeded

OFFSETS = torch.tensor([[[-1, 2], [3, 3], [20, 0]], [[0, 0], [0, 0], [5, -2]]])
LOG_ATTENTION = randn(2, 3).log_softmax(-1) - 0.5
FUNCTIONS = {
    "log_attention": lambda x: sample(x.flatten(1), 3, generator=seeded()).log_attention,
    "logsumexp": lambda x: sample(x.flatten(1), 3, replace=True, generator=seeded()).logsumexp,
    "entropy": lambda x: sample(x.flatten(1), 3, method="topk").entropy,
    "features": lambda x: expectation(x.flatten(2), LOG_ATTENTION),
    "unordered": lambda x: expectation(x.flatten(2), LOG_ATTENTION, estimator="unordered"),
    "attention": lambda x: expectation(OFFSETS.double(), x[:, :, 0, 0].log_softmax(-1)),
    "patches": lambda x: extract_patches(x, OFFSETS, (3, 2), padding="edge", mean=0.5, std=0.25),
    "view": lambda x: area_downsample(x, (2, 3), mean=0.5, std=0.25),
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)


def scalar(name):
    return lambda x: FUNCTIONS[name](x).square().sum()


@EVERY
def test_gradients_by_torch_func(name):
    x = randn(2, 3, 6, 7)
    leaf = x.clone().requires_grad_()
    scalar(name)(leaf).backward()
    assert_close(grad(scalar(name))(x), leaf.grad)


@EVERY
def test_forward_mode(name):
    """Both ways of asking, against the backward pass."""
    x, direction = randn(2, 3, 6, 7), randn(2, 3, 6, 7, seed=1)
    value, tangent = jvp(scalar(name), (x,), (direction,))
    assert_close(value, scalar(name)(x))
    assert_close(tangent, (grad(scalar(name))(x) * direction).sum())
    with fwAD.dual_level():
        dual = fwAD.unpack_dual(scalar(name)(fwAD.make_dual(x, direction)))
        assert_close(dual.tangent, tangent)


@pytest.mark.parametrize("name", ["entropy", "features", "view"])
def test_jacobians(name):
    x = randn(2, 3, 6, 7)
    assert_close(jacrev(FUNCTIONS[name])(x), torch.autograd.functional.jacobian(FUNCTIONS[name], x))


@pytest.mark.parametrize("name", ["entropy", "features", "unordered", "attention", "patches", "view"])
def test_vmap(name):
    many = randn(4, 2, 3, 6, 7)
    assert_close(vmap(FUNCTIONS[name])(many), torch.stack([FUNCTIONS[name](x) for x in many]))


def test_vmap_of_a_draw():
    """Each entry draws by itself, right values come with the draws, and a vmap that was not told is told how."""
    logits = randn(40, 1, 30)
    indices, log_attention = vmap(lambda z: sample(z, 4)[:2], randomness="different")(logits)
    assert_close(log_attention, logits.log_softmax(-1).gather(-1, indices))
    same = vmap(lambda z: sample(z, 4).indices, randomness="same")(logits[:1].expand(40, -1, -1))
    assert (same == same[0]).all()
    differing = vmap(lambda z: sample(z, 4).indices, randomness="different")(logits[:1].expand(40, -1, -1))
    assert not (differing == differing[0]).all()
    with pytest.raises(ValueError, match=r"vmap\(…, randomness='different'\)"):
        vmap(lambda z: sample(z, 4).indices)(logits)


def test_16_bits_under_vmap():
    image = torch.arange(2 * 3 * 6 * 7).view(1, 2, 3, 6, 7).to(torch.int16)
    got = vmap(lambda x: extract_patches(x, OFFSETS, 3))(image)
    assert torch.equal(got[0], extract_patches(image[0], OFFSETS, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_meta(dtype):
    """Shapes, dtypes and gradients of everything, from tensors without numbers."""

    def run(device):
        image = torch.zeros(2, 3, 40, 30, dtype=dtype, device=device)
        image.requires_grad_(image.is_floating_point())
        logits = randn(2, 8, 6, dtype=torch.float32).to(device).requires_grad_()
        out = []
        for options in ({}, {"replace": True}, {"selection": "topk"}):
            drawn = ats.sample_patches(image, logits, 4, (5, 6), mean=[0.1] * 3, std=0.5, **options)
            out += [drawn.patches, drawn.indices, drawn.offsets, drawn.log_attention, drawn.logsumexp, drawn.entropy]
            out.append(ats.pool(drawn.patches.flatten(2), drawn))
        drawn = ats.sample_patches(image, logits, 4, 5)
        for estimator in ("ordered", "unordered"):
            features = drawn.patches.flatten(2)
            out.append(expectation(features, drawn.log_attention, estimator=estimator, control_variate=True))
            out += estimate(features, drawn.log_attention, estimator=estimator)
        out.append(area_downsample(image, (9, 8), mean=0.5, std=[0.1] * 3))
        sum(value.sum() for value in out if value.requires_grad).backward()
        return [*out, logits.grad, *([image.grad] if image.requires_grad else [])]

    for index, (got, want) in enumerate(zip(run("meta"), run("cpu"), strict=True)):
        assert (got.device.type, got.shape, got.dtype) == ("meta", want.shape, want.dtype), index


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.uint8, None), (torch.int16, True), (torch.float32, True)])
def test_compiled_with_sizes_from_shapes(dtype, dynamic):
    """Patch and view sizes worked out of the image's, in one graph, for one size after the other."""

    def step(image, logits):
        drawn = ats.sample_patches(image, logits, image.shape[1] + 1, image.shape[2] // 4, selection="topk")
        view = ats.area_downsample(image, (image.shape[2] // 3, image.shape[3] // 3), mean=0.5, std=0.25)
        return ats.pool(drawn.patches.flatten(3).mean(-1), drawn).sum() + view.mean() + drawn.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height, width in ((24, 28), (36, 40)):
        image = torch.randint(256, (2, 3, height, width), generator=seeded()).to(dtype)
        image = image / 256 if dtype == torch.float32 else image
        logits = randn(2, height // 4, width // 4, dtype=torch.float32)
        gradients = []
        for call in (step, compiled):
            leaf = logits.clone().requires_grad_()
            value = call(image, leaf)
            value.backward()
            gradients.append((value, leaf.grad))
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Model(nn.Module):
    def __init__(self, selection):
        super().__init__()
        self.selection = selection

    def forward(self, image, logits):
        drawn = ats.sample_patches(image, logits, 4, 5, selection=self.selection)
        return ats.pool(drawn.patches.flatten(2), drawn), ats.area_downsample(image, (5, 5))


def test_export():
    image, logits = torch.rand(2, 3, 20, 20), torch.randn(2, 5, 5)
    program = torch.export.export(Model("topk"), (image, logits)).module()
    for got, want in zip(program(image, logits), Model("topk")(image, logits), strict=True):
        assert_close(got, want)
    drawing = torch.export.export(Model("sample"), (image, logits)).module()
    assert not torch.equal(drawing(image, logits)[0], drawing(image, logits)[0])


def test_trace():
    """What is drawn and read is worked out anew, not kept from the inputs of the trace."""
    image, logits = torch.rand(2, 3, 20, 20), torch.randn(2, 5, 5)
    traced = torch.jit.trace(Model("topk"), (image, logits), check_trace=False)
    image, logits = torch.rand(2, 3, 20, 20), torch.randn(2, 5, 5)
    for got, want in zip(traced(image, logits), Model("topk")(image, logits), strict=True):
        assert_close(got, want)


def test_what_an_exporter_sees_of_topk(monkeypatch):
    """With the reference, PyTorch's own operators only."""
    monkeypatch.setenv("ATS_BACKEND", "reference")
    program = torch.export.export(Model("topk"), (torch.rand(2, 3, 20, 20), torch.randn(2, 5, 5)))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in operators if "ats_kernels" in name}


def test_a_generator_that_is_passed_to_a_compiled_function():
    """With graph breaks it draws as the plain call does; without, seeding the default generator is the way."""

    def drawn(logits, generator):
        return sample(2 * logits, 5, generator=generator, validate=False).indices

    logits, generator = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)), torch.Generator()
    torch._dynamo.reset()
    compiled = torch.compile(drawn, backend="aot_eager")
    plain = [drawn(logits, generator.manual_seed(seed)) for seed in (1, 2)]
    assert [torch.equal(compiled(logits, generator.manual_seed(seed)), plain[seed - 1]) for seed in (1, 2)] == [
        True
    ] * 2

    torch._dynamo.reset()  # what was compiled with breaks would be found again
    whole = torch.compile(drawn, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(logits, generator)
    torch.manual_seed(1)
    expected = drawn(logits, None), drawn(logits, None)
    torch.manual_seed(1)
    assert all(torch.equal(whole(logits, None), indices) for indices in expected)
