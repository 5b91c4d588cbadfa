"""The kernels' launches as operators that `torch.compile` does not look into.

Launchers choose tiles by the numbers of a shape, which a compiler that traces sizes as symbols does not have.
"""

import torch
from torch import Tensor

from ats_kernels.backend import device_guard
from ats_kernels.sampling.draws import Draw, Statistics
from ats_kernels.sampling.triton import grad_triton, sample_triton


def sample(logits: Tensor, n: int, replace: bool, method: str, seed: Tensor | None) -> tuple[Draw, Statistics]:
    """`sample_triton`, `method` being what `seed` is None for."""
    indices, log_attention, row_stats = _sample(logits, n, replace, seed)
    peak, log_total, entropy, logsumexp = row_stats.unbind(0)
    return Draw(indices, log_attention, logsumexp, entropy), Statistics(peak, log_total, entropy)


@torch.library.custom_op(
    "ats_kernels::sample",
    mutates_args=(),
    schema="(Tensor logits, SymInt n, bool replace, Tensor? seed) -> (Tensor, Tensor, Tensor)",
)
def _sample(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    with device_guard(logits):
        draw, statistics = sample_triton(logits.detach(), n, replace, "topk" if seed is None else "sample", seed)
    return draw.indices, draw.log_attention, torch.stack((*statistics, draw.logsumexp))


@_sample.register_fake
def _(logits: Tensor, n: int, replace: bool, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    drawn = logits.new_empty((rows, n), dtype=torch.float32)
    return torch.empty_like(drawn, dtype=torch.int64), drawn, drawn.new_empty((4, rows))


def grad(
    logits: Tensor, indices: Tensor, statistics: Statistics, grads: tuple[Tensor | None, ...], replace: bool
) -> Tensor:
    """`grad_triton`."""
    return _grad(logits, indices, *statistics, *grads, replace)


@torch.library.custom_op(
    "ats_kernels::sample_backward",
    mutates_args=(),
    schema="(Tensor logits, Tensor indices, Tensor peak, Tensor log_total, Tensor entropy, Tensor? grad_log_attention, "
    "Tensor? grad_logsumexp, Tensor? grad_entropy, bool replace) -> Tensor",
)
def _grad(
    logits: Tensor,
    indices: Tensor,
    peak: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    grad_log_attention: Tensor | None,
    grad_logsumexp: Tensor | None,
    grad_entropy: Tensor | None,
    replace: bool,
) -> Tensor:
    grads = grad_log_attention, grad_logsumexp, grad_entropy
    with device_guard(logits):
        return grad_triton(logits, indices, Statistics(peak, log_total, entropy), grads, replace)


@_grad.register_fake
def _(logits: Tensor, *rest: object) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
