"""CPU images work whatever torch.set_default_device says; "meta", where no number survives, stands in for another."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import ats
import ats_kernels
from ats import diagnostics
from ats_kernels.pooling.variance import estimate
from tests.helpers import seeded

FACTORIES = frozenset(
    [
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "tensor",
        "zeros",
    ]
)
PACKAGES = sorted(path for package in (ats, ats_kernels) for path in Path(package.__path__[0]).rglob("*.py"))


def without_device(path):
    """Calls that make a tensor wherever the default device is, but for a module's parameters, which belong there."""
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    owned = {
        id(inner) for call in calls if call.func.attr in ("Parameter", "register_buffer") for inner in ast.walk(call)
    }
    for call in calls:
        is_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
        named = any(keyword.arg in ("device", None) for keyword in call.keywords)
        if is_torch and call.func.attr in FACTORIES and not named and id(call) not in owned:
            yield f"{path}:{call.lineno}: torch.{call.func.attr}"


def test_every_tensor_says_where_it_lies():
    assert len(PACKAGES) > 80
    assert [found for path in PACKAGES for found in without_device(path)] == []


def run_ops():
    """Everything that the core offers, on CPU tensors: a list of tensors."""
    generator = seeded()
    image = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8, generator=generator, device="cpu")
    floats = (image / 255).requires_grad_()
    out = []
    for size in (12, 90):
        logits = torch.randn(2, size, size, generator=generator, device="cpu").requires_grad_()
        for options in ({}, {"replace": True}, {"method": "topk"}):
            draw = ats_kernels.sample(logits.flatten(1), 4, generator=generator, **options)
            (draw.log_attention.sum() + draw.entropy.sum()).backward()
            out += [*draw, logits.grad]
            logits.grad = None
    for x in (image, floats):
        for padding in ("zeros", "edge"):
            for patch in (8, 60):
                cut = ats.sample_patches(
                    x, logits, 4, patch, padding=padding, mean=[0.1, 0.2, 0.3], std=0.5, generator=generator
                )
                out += [cut.patches, cut.offsets, ats.patch_positions(cut.offsets, (patch, patch), (40, 50))]
        out.append(ats.area_downsample(x, (7, 9), mean=0.5, std=[0.2, 0.3, 0.4]))
    (out[-1].sum() + cut.patches.sum()).backward()
    out.append(floats.grad)
    features = torch.randn(2, 4, 3, generator=generator, device="cpu").requires_grad_()
    for estimator in ("ordered", "unordered"):
        for control in (False, True):
            pooled = ats.expectation(features, cut.log_attention, estimator=estimator, control_variate=control)
            pooled.square().sum().backward(retain_graph=True)
            out += [pooled, features.grad.clone()]
        out += estimate(features, cut.log_attention, estimator=estimator)
    out += [diagnostics.relative_entropy(cut.entropy, 100), diagnostics.border_mass(logits)]
    out.append(diagnostics.covered_mass(cut.log_attention, cut.indices))
    return out


class Feature(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, device="cpu")

    def forward(self, patches, positions):
        return self.conv(patches).amax((2, 3)) + positions.sum(-1, keepdim=True)


def run_model(state):
    attention = nn.Conv2d(3, 1, 3, device="cpu")
    model = ats.nn.AttentionSampling(attention, Feature(), 4, 8, receptive_field="auto", positions=True, mean=[0.5] * 3)
    head = nn.Linear(4, 2, device="cpu")
    nn.ModuleList([model, head]).load_state_dict(state) if state else None
    state = nn.ModuleList([model, head]).state_dict()
    image = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8, generator=seeded(), device="cpu")
    view = ats.area_downsample(image, (20, 25))
    pooled, logits, sample = model(view, image, generator=seeded())
    pooled.sum().backward()
    model.eval()
    out = [pooled, logits, sample.patches, model.full(view, image, chunk_size=100), attention.weight.grad]
    for prediction in (
        ats.predict(model, head, view, image, generator=seeded()),
        ats.anytime(model, head, view, image, budget=40, tolerance=0.0, generator=seeded()),
    ):
        out += [prediction.logits, prediction.standard_error, *prediction.interval()]
    return out, state


@pytest.mark.parametrize("backend", ["", "reference"])
def test_ops(backend, monkeypatch):
    monkeypatch.setenv("ATS_BACKEND", backend)
    expected = run_ops()
    with torch.device("meta"):
        got = run_ops()
    for index, (value, want) in enumerate(zip(got, expected, strict=True)):
        assert value.device.type == "cpu", index
        assert torch.equal(value, want), index


def test_model():
    torch.manual_seed(0)
    expected, state = run_model(None)
    torch.set_default_device("meta")
    try:
        got, _ = run_model(state)
    finally:
        torch.set_default_device(None)
    for index, (value, want) in enumerate(zip(got, expected, strict=True)):
        assert value.device.type == "cpu", index
        assert torch.equal(value, want), index
