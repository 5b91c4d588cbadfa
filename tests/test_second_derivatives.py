"""Gradients of gradients: supported by every op, right by finite differences and, of an estimate, without bias."""

import sys

import pytest
import torch

from ats_kernels import area_downsample, expectation, extract_patches, sample
from tests.enumeration import attention_logits, enumerate_draws
from tests.helpers import assert_close, randn

INF = float("inf")
OFFSETS = torch.tensor([[[-1, 2], [3, 3], [20, 0]], [[0, 0], [0, 0], [5, -2]]])


def drawn(logits, **options):
    generator = torch.Generator(logits.device).manual_seed(1)
    return sample(logits, 3, generator=generator, **options)[1:]


@pytest.mark.parametrize("options", [{}, {"replace": True}, {"method": "topk"}], ids=["without", "with", "topk"])
def test_of_a_draw(options):
    """Of log a, logsumexp and entropy together, with masked cells among the logits."""
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, :3] = True
    assert torch.autograd.gradgradcheck(
        lambda logits: drawn(logits.masked_fill(mask, -INF), **options), randn(2, 7).requires_grad_()
    )


@pytest.mark.parametrize("padding", ["zeros", "edge"])
@pytest.mark.parametrize("backend", ["", "reference"])
def test_of_patches(backend, padding, monkeypatch):
    monkeypatch.setenv("ATS_BACKEND", backend)
    image = randn(2, 2, 6, 7).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: extract_patches(x, OFFSETS, (3, 2), padding=padding, mean=[0.1, 0.2], std=[0.5, 2.0]), image
    )


def test_of_a_view():
    image = randn(1, 2, 6, 7).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: area_downsample(x, (2, 3), mean=[0.1, 0.2], std=[0.5, 2.0]), image)


def test_of_an_estimate_in_the_features():
    """Features enter linearly: what is left of the second derivative mixes them with the gradient that arrives."""
    log_attention = randn(2, 3).log_softmax(-1)
    features = randn(2, 3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda f: expectation(f, log_attention), features)


def hessian_of_estimate(logits, draws, probabilities, **options):
    """E[∂²Φ̂] over all draws, Φ̂ of features that depend on the parameters as the logits do."""
    parameters = torch.zeros_like(logits).requires_grad_()
    rows = logits + parameters  # (K,)
    features = torch.sin(torch.arange(1.0, len(logits) + 1, dtype=torch.float64) + 2 * parameters)  # (K,)
    log_attention = rows.log_softmax(-1)[draws]  # (M, n)
    estimate = (expectation(features[draws], log_attention, **options) * probabilities).sum()
    return hessian(estimate, parameters)


def hessian(value, parameters):
    (first,) = torch.autograd.grad(value, parameters, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, parameters, retain_graph=True)[0] for entry in first])


@pytest.mark.parametrize("kind", ["flat", "peaked", "random"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"replace": True},
        {"estimator": "unordered"},
        {"control_variate": True},
        {"replace": True, "control_variate": True},
        {"estimator": "unordered", "control_variate": True},
    ],
    ids=str,
)
def test_of_an_estimate_are_unbiased(options, kind):
    """Their expectation over every ordered draw is the second derivative of Σ_i a_i f_i."""
    logits = attention_logits(kind, 4)
    draws, probabilities = enumerate_draws(logits.softmax(-1), 2, replace=options.get("replace", False))
    parameters = torch.zeros_like(logits).requires_grad_()
    features = torch.sin(torch.arange(1.0, 5, dtype=torch.float64) + 2 * parameters)
    expected = hessian(((logits + parameters).softmax(-1) * features).sum(), parameters)
    assert expected.abs().max() > 0.1
    assert_close(hessian_of_estimate(logits, draws, probabilities, **options), expected)


OPS = {
    "log_attention": lambda x: drawn(x.flatten(1))[0],
    "logsumexp": lambda x: drawn(x.flatten(1))[1],
    "entropy": lambda x: drawn(x.flatten(1))[2],
    "expectation": lambda x: expectation(x.flatten(2), x[:, :, 0, 0].log_softmax(-1)),
    "patches": lambda x: extract_patches(x, OFFSETS, (3, 2)),
    "view": lambda x: area_downsample(x, (2, 3)),
}


@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_a_penalty_on_the_gradient_is_felt(op, backend, way, monkeypatch):
    """loss + λ‖∂loss/∂x‖² through each op: the penalty's own derivative is there, whichever way it is asked for."""
    monkeypatch.setenv("ATS_BACKEND", backend)

    def penalty_of(x):
        loss = OPS[op](x.exp()).square().sum()
        if way == "grad":
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        else:
            loss.backward(create_graph=True)
            gradient = x.grad
            x.grad = None
        return gradient.square().sum()

    x = randn(2, 3, 6, 7).requires_grad_()
    (slope,) = torch.autograd.grad(penalty_of(x), x)
    if op == "expectation":  # whose gradient is not the derivative of its value: see the enumeration above
        assert slope.abs().max() > 0
        return
    direction, step = randn(2, 3, 6, 7, seed=1), 1e-5
    ends = [penalty_of((x + side * step * direction).detach().requires_grad_()) for side in (1, -1)]
    numerical = (ends[0] - ends[1]).item() / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(numerical, rel=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("op", ["entropy", "expectation", "patches", "view"])
def test_through_the_kernels(op, device, monkeypatch):
    """Their forward and first backward launch kernels, and what follows is the reference's."""
    pytest.importorskip("triton")
    slopes = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ATS_BACKEND", backend)
        monkeypatch.setattr(sys.modules[__name__], "OFFSETS", OFFSETS.to(device))
        x = randn(2, 3, 6, 7, dtype=torch.float32).to(device).requires_grad_()
        torch.manual_seed(0)
        (gradient,) = torch.autograd.grad(OPS[op](x.exp()).square().sum(), x, create_graph=True)
        slopes.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    assert slopes[1].abs().max() > 0
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4 * float(slopes[1].abs().max()))


def test_first_gradients_are_the_same_with_and_without_a_graph():
    log_attention, features = randn(2, 4).log_softmax(-1).requires_grad_(), randn(2, 4, 3).requires_grad_()
    once, again = (
        torch.autograd.grad(
            expectation(features, log_attention).square().sum(),
            (features, log_attention),
            create_graph=create,
        )
        for create in (False, True)
    )
    for got, want in zip(again, once, strict=True):
        assert_close(got, want)
        assert got.requires_grad
        assert not want.requires_grad
