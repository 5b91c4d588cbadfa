"""All that attention sampling adds to two networks, together: draw, gather and expectation, forward and backward."""

import pytest
import torch
from torch import Tensor

import ats
from bench.bench_ops import COPIES, noise
from bench.report import Report

SECTION = "ops"
EXPERIMENTS = {  # image, view grid, N, patch, D
    "Megapixel MNIST": ((1, 1500, 1500), (180, 180), 10, 50, 32),
    "colon cancer": ((3, 500, 500), (100, 100), 10, 27, 512),
    "speed limits": ((3, 960, 1280), (35, 47), 5, 100, 32),
}


@pytest.mark.parametrize("batch", [16, 1])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def bench_whole(report: Report, experiment: str, batch: int) -> None:
    """Draw, gather and expectation, forward and backward; random features stand in for a network's."""
    shape, grid, n, patch, size = EXPERIMENTS[experiment]
    image = noise((batch, *shape), torch.uint8, report.device)
    logits = [torch.randn(batch, *grid, device=report.device, requires_grad=True) for _ in range(COPIES)]
    features = torch.randn(batch, n, size, device=report.device, requires_grad=True)

    def step(i: int) -> list[Tensor]:
        sample = ats.sample_patches(image, logits[i % COPIES], n, patch)
        pooled = ats.expectation(features, sample.log_attention)
        loss = pooled.square().sum() - 0.01 * sample.entropy.mean()
        return [sample.patches, *torch.autograd.grad(loss, [logits[i % COPIES], features])]

    def eager(i: int) -> list[Tensor]:
        """The same in plain PyTorch, patches cut in a loop."""
        z = logits[i % COPIES].flatten(1)
        log_attention = z.log_softmax(-1)
        attention = log_attention.exp()
        cells = torch.multinomial(attention.detach(), n)  # (B, N)
        log_drawn = log_attention.gather(1, cells)
        drawn = log_drawn.detach().exp()
        weights = (1 - (drawn.cumsum(-1) - drawn) + torch.arange(n - 1, -1, -1, device=z.device) * drawn) / n
        rows = (cells // grid[1] * (shape[1] - patch) // grid[0]).unsqueeze(-1) + torch.arange(patch, device=z.device)
        columns = (cells % grid[1] * (shape[2] - patch) // grid[1]).unsqueeze(-1) + torch.arange(patch, device=z.device)
        which = torch.arange(batch, device=z.device).view(-1, 1, 1, 1)
        patches = image[which, :, rows.unsqueeze(-1), columns.unsqueeze(-2)].movedim(-1, 2) / 255
        terms = features + features.detach() * (log_drawn - log_drawn.detach()).unsqueeze(-1)
        pooled = torch.einsum("bn,bnd->bd", weights, terms)
        entropy = -(attention * log_attention).sum(-1)
        loss = pooled.square().sum() - 0.01 * entropy.mean()
        return [patches, *torch.autograd.grad(loss, [logits[i % COPIES], features])]

    group = report.compare(
        f"Draw, gather and expectation, forward and backward: {experiment}, B = {batch}",
        {"ats": step, "plain PyTorch": eager},
        copies=COPIES,
        seconds=1.0,
    )
    if not report.on_gpu:
        group.at_most(1 if batch == 16 else 3, group.time("ats") * (1 / batch), "a sample", "ms")
