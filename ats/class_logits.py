"""The class logits of single patches: a head that is linear may come before the pooling."""

from collections.abc import Callable

import torch
from torch import Tensor

from ats_kernels.pixels import NonFiniteError

Head = Callable[[Tensor], Tensor]


def class_logits(head: Head, features: Tensor) -> Tensor:
    """Features (G, M, …) -> class logits (G, M, C) in float64."""
    scores = head(features.flatten(0, 1))
    patches = features.shape[0] * features.shape[1]
    if scores.ndim != 2 or len(scores) != patches:
        raise ValueError(f"head must give class logits (M, C), got {tuple(scores.shape)} for M = {patches}")
    scores = scores.double().unflatten(0, tuple(features.shape[:2]))  # (G, M, C)
    _check_linear(head, features, scores)
    return scores


def _check_linear(head: Head, features: Tensor, scores: Tensor) -> None:
    """Raise where the head of the mean is not the mean of the heads, or that of −8 times it what a line makes of it."""
    if not scores.isfinite().all():
        raise NonFiniteError(
            f"head gives NaN or infinite class logits for {int((~scores.isfinite()).any(-1).sum())} of "
            f"{scores.shape[0] * scores.shape[1]} patches; look for a diverged feature network"
        )
    mean = features.mean(1)
    together, far, none = (head(scale * mean).double() for scale in (1, -8, 0))
    precision = 1e-3 if features.dtype in (torch.float32, torch.float64) else 5e-2
    pairs = (together, scores.mean(1)), (far, 9 * none - 8 * together)
    if not all(
        torch.allclose(got, want, rtol=precision, atol=precision * float(want.abs().max())) for got, want in pairs
    ):
        raise ValueError(
            "head is not linear, so the estimate and its error do not pass through it; give the linear layer alone, "
            "and apply what follows to the logits"
        )
