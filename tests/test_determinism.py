"""A whole step in PyTorch's deterministic mode, and under autocast."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ats
import ats_kernels
from tests.whole_step import (
    DEVICES,
    GRID,
    PATCH,
    B,
    Model,
    loss_and_gradients,
    make_image,
    make_logits,
    step,
    unordered_inputs,
)


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
