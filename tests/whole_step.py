"""A whole step: it draws, gathers, pools and goes back into the logits and the features; used by several test files."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ats

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


def unordered_inputs(device: str) -> tuple[Tensor, Tensor]:
    """Features (2, 5, 3) and log a (2, 5), which both learn."""
    torch.manual_seed(3)
    log_attention = torch.randn(2, 9).log_softmax(-1)[:, :5].to(device)
    return torch.rand(2, 5, 3).to(device).requires_grad_(), log_attention.requires_grad_()


def unordered_step(features: Tensor, log_attention: Tensor) -> tuple[Tensor, ...]:
    """Φ̂ by the unordered estimator with its control variate, and both gradients."""
    pooled = ats.expectation(features, log_attention, estimator="unordered", control_variate=True)
    return pooled, *torch.autograd.grad(pooled.square().sum(), (features, log_attention))


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
