"""The kernels of `expectation` against the reference, forward and backward."""

import pytest
import torch

from ats_kernels import estimator_weights, estimator_weights_ref, expectation, expectation_ref
from ats_kernels.pooling.weights import estimator_weights_lean
from tests.helpers import assert_close, seeded

pytestmark = pytest.mark.interpreter

WAYS = [(True, "ordered"), (False, "ordered"), (False, "unordered")]  # (replace, estimator)

triton_kernels = pytest.importorskip("ats_kernels.pooling.triton")


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    """Kernels even on CPU tensors, and NaN wherever one of them writes nothing."""
    monkeypatch.setenv("ATS_BACKEND", "triton")
    empty = torch.empty
    monkeypatch.setattr(triton_kernels.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def problem(batch, n, trailing, dtype, device, *, sharpness=1.0, log_dtype=torch.float32):
    """Features (B, N, …) and log a (B, N) of N distinct cells of 2N, in float64 rounded to the dtypes."""
    features = torch.randn(batch, n, *trailing, dtype=torch.float64, generator=seeded())
    logits = sharpness * torch.randn(batch, 2 * n, dtype=torch.float64, generator=seeded(1))
    log_attention = logits.log_softmax(-1)[:, :n]
    return features.to(device, dtype), log_attention.to(device, log_dtype)


def run(features, log_attention, grad_out, replace, estimator="ordered"):
    """Φ̂ and the gradients to both arguments."""
    leaves = features.detach().requires_grad_(), log_attention.detach().requires_grad_()
    pooled = expectation(*leaves, replace=replace, estimator=estimator)
    return pooled.detach(), *torch.autograd.grad(pooled, leaves, grad_out)


def expected(features, log_attention, grad_out, replace, estimator="ordered"):
    """The same from the formulas, in float64."""
    weights = estimator_weights_ref(log_attention, replace=replace, estimator=estimator)
    wide, grad = features.double(), grad_out.double().unsqueeze(1)
    pooled = expectation_ref(wide, weights)
    shaped = weights.view(*weights.shape, *[1] * (features.ndim - 2))
    inner = (wide * grad).flatten(2).sum(-1) if features.ndim > 2 else wide * grad
    return pooled, shaped * grad, weights * inner


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
@pytest.mark.parametrize(
    ("batch", "n", "trailing", "dtype", "log_dtype"),
    [
        (2, 5, (4,), torch.float32, torch.float32),
        (1, 1, (1,), torch.float32, torch.float32),
        (3, 10, (64,), torch.float16, torch.float32),
        (2, 7, (3, 5, 2), torch.bfloat16, torch.bfloat16),
        (2, 9, (130,), torch.float64, torch.float64),
        (1, 33, (1100,), torch.float32, torch.float64),
        (2, 40, (), torch.float32, torch.float32),
        (1, 300, (3,), torch.float32, torch.float32),
    ],
)
def test_against_the_formulas(batch, n, trailing, dtype, log_dtype, replace, estimator, device):
    """Odd numbers of draws and features, one and many tiles of both, each dtype."""
    features, log_attention = problem(batch, n, trailing, dtype, device, log_dtype=log_dtype)
    grad_out = torch.randn(batch, *trailing, dtype=torch.float64, generator=seeded(2)).to(device, dtype)
    got = run(features, log_attention, grad_out, replace, estimator)
    for value, want in zip(got, expected(features, log_attention, grad_out, replace, estimator), strict=True):
        assert_close(value, want)
    assert [x.dtype for x in got] == [dtype, dtype, log_dtype]


def test_any_strides(device):
    """Transposed features, a strided slice, columns of log a, and gradients expanded from one number."""
    features, log_attention = problem(4, 6, (5,), torch.float32, device)
    layouts = [
        features.transpose(0, 2).contiguous().transpose(0, 2),
        features.repeat_interleave(2, 1)[:, ::2],
        features.repeat_interleave(3, 2)[..., ::3],
        features[:, :1].expand(-1, 6, -1),
    ]
    columns = log_attention.t().contiguous().t()
    grads = [torch.ones((), device=device).expand(4, 5), torch.arange(20.0, device=device).view(5, 4).t()]
    for layout in layouts:
        for grad_out in grads:
            got = run(layout, columns, grad_out, False)
            for value, want in zip(got, expected(layout, log_attention, grad_out, False), strict=True):
                assert_close(value, want)


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 40.0, 300.0])
def test_weights_of_peaked_attention(sharpness, device):
    """The mass left after a peak is far below float32's and float64's resolution of 1."""
    n = 24
    logits = sharpness * torch.randn(5, n, dtype=torch.float64, generator=seeded())
    log_attention = logits.log_softmax(-1).sort(descending=True).values.float().to(device)  # all cells, the peak first
    _, weights = triton_kernels.expectation_triton(log_attention.unsqueeze(-1), log_attention, replace=False)
    reference = estimator_weights_ref(log_attention)
    torch.testing.assert_close(weights.double(), reference, rtol=1e-6, atol=1e-40)
    assert (weights >= 0).all()
    assert (weights.double().sum(-1) - 1).abs().max() < 1e-6
    assert_close(estimator_weights(log_attention), reference)


def test_weights_to_double_precision(device):
    log_attention = torch.tensor([[-1e-18, -42.0, -43.0], [-1e-9, -21.0, -25.0], [-0.7, -0.7, -9.0]]).double()
    features = torch.zeros(3, 3, 1, dtype=torch.float64, device=device)
    _, weights = triton_kernels.expectation_triton(features, log_attention.to(device), replace=False)
    reference = estimator_weights_ref(log_attention)
    for got in (weights.cpu(), estimator_weights_lean(log_attention, torch.float64)):
        torch.testing.assert_close(got, reference, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
def test_control_variate(replace, estimator, device, monkeypatch):
    """Takes its inner products from the kernel, and is otherwise the reference's."""
    features, log_attention = (x.requires_grad_() for x in problem(3, 7, (5,), torch.float32, device))
    grad_out = torch.randn(3, 5, generator=seeded(2)).to(device)
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("ATS_BACKEND", backend)
        pooled = expectation(features, log_attention, replace=replace, estimator=estimator, control_variate=True)
        results.append((pooled, *torch.autograd.grad(pooled, (features, log_attention), grad_out)))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize(("replace", "estimator"), WAYS)
def test_poisoned_rows_stay_poisoned(replace, estimator, device):
    """What `sample` returns for a row that cannot be drawn from is NaN and must stay so; its neighbours must not."""
    features, log_attention = problem(3, 5, (4,), torch.float32, device)
    log_attention[1] = float("nan")
    pooled, *gradients = run(features, log_attention, torch.ones(3, 4, device=device), replace, estimator)
    for value in (pooled, *gradients):
        assert value[1].isnan().all()
        assert value[::2].isfinite().all()


@pytest.mark.parametrize("learns", [0, 1])
def test_only_one_argument_requires_a_gradient(learns, device):
    arguments = list(problem(2, 4, (3,), torch.float32, device))
    grad_out = torch.randn(2, 3, generator=seeded(5)).to(device)
    want = expected(*arguments, grad_out, False)[1 + learns]
    arguments[learns].requires_grad_()
    (got,) = torch.autograd.grad(expectation(*arguments), arguments[learns], grad_out)
    assert_close(got, want)


def test_no_rows_and_no_features(device):
    for batch, trailing in ((0, (4,)), (2, (0,)), (2, (3, 0))):
        features = torch.zeros(batch, 3, *trailing, device=device, requires_grad=True)
        log_attention = torch.full((batch, 3), -2.0, device=device, requires_grad=True)
        pooled = expectation(features, log_attention)
        assert pooled.shape == (batch, *trailing)
        pooled.sum().backward()
        assert features.grad.shape == features.shape
        assert (log_attention.grad == 0).all()
