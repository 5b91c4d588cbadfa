"""Numbers that tell how attention sampling fares in training. Plain functions of tensors; none is differentiable.

`ats.experiments.callbacks` logs them and warns where they look wrong; docs/diagnostics.md says how to read them.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ats_kernels.checks import check_count, check_floating, check_log_probabilities, check_pair, check_tensor

_FEW_CELLS = 2.0  # attention on fewer, in effect, has collapsed
_AT_CHANCE = 0.98  # of the loss at chance: a model has learned nothing until it is below
_LEARNED = 0.5  # of the loss at chance: below, attention on a single cell may be all that the task needs

CAUSES = {
    "collapse": (
        "attention has collapsed: it lies on {cells:.1f} cells in effect while the loss is not low, so nothing else is "
        "seen any more. Raise the entropy weight, bound the logits (ats.models.classifier.SoftBound) or lower the "
        "learning rate"
    ),
    "edge": (
        "{mass:.0%} of the attention lies on the border of the grid, which has {share:.0%} of its cells. Zero padding "
        "in the attention network gives the border away: pad with padding_mode='replicate', or not at all, and look "
        "for frames or empty margins in the images"
    ),
    "plateau": (
        "the loss is that of guessing ({loss:.3f}, chance {chance:.3f}). Start attention where something is to be "
        "seen, draw more patches, try another learning rate or a smaller entropy weight, and check that a model that "
        "is given the right patches learns"
    ),
}


def effective_sample_size(weights: Tensor) -> Tensor:
    """How many equally weighted patches the estimate is worth, 1/Σw²: (B, N) weights that sum to 1 -> (B,)."""
    check_floating("weights", weights)
    if weights.ndim != 2:
        raise ValueError(f"weights must be (B, N), got {tuple(weights.shape)}; a single image's need weights[None]")
    return weights.detach().square().sum(-1).reciprocal()


def covered_mass(log_attention: Tensor, indices: Tensor) -> Tensor:
    """The share of the attention on the drawn cells, each counted once.

    Args:
        log_attention: (B, N) of the drawn cells.
        indices: (B, N) int64, which they are.

    Returns:
        (B,) in [0, 1].
    """
    check_floating("log_attention", log_attention)
    check_tensor("indices", indices)
    if log_attention.ndim != 2 or indices.shape != log_attention.shape or indices.is_floating_point():
        raise ValueError(
            "log_attention must be (B, N) and indices the cells (B, N) that it is of, got "
            f"{tuple(log_attention.shape)} and {tuple(indices.shape)} of {indices.dtype}; pass both of one PatchSample"
        )
    check_log_probabilities("log_attention", log_attention)
    order = indices.sort(dim=-1, stable=True)
    fresh = torch.ones_like(indices, dtype=torch.bool)
    fresh[:, 1:] = order.values[:, 1:] != order.values[:, :-1]  # a cell drawn again counts for nothing
    return (log_attention.detach().exp().gather(-1, order.indices) * fresh).sum(-1)


def relative_entropy(entropy: Tensor, cells: int) -> Tensor:
    """The attention's entropy in nats against the largest that K cells allow, log K: 0 on one cell, 1 when uniform."""
    if check_count("cells", cells) == 1:
        return torch.ones_like(entropy.detach())
    return entropy.detach() / torch.tensor(float(cells), device="cpu").log().to(entropy)


def border_mass(logits: Tensor) -> Tensor:
    """The share of the attention on the outermost cells of the grid: logits (B, gh, gw) or (B, 1, gh, gw) -> (B,)."""
    attention = _attention(logits)
    return 1 - attention[:, 1:-1, 1:-1].flatten(1).sum(-1)


def border_share(grid_size: tuple[int, int]) -> float:
    """The share of a grid's cells that lie on its border: what `border_mass` is of uniform attention."""
    height, width = check_pair("grid_size", grid_size)
    return 1 - max(height - 2, 0) * max(width - 2, 0) / (height * width)


def peak_mass(logits: Tensor) -> Tensor:
    """The share of the attention on its largest cell: logits (B, gh, gw) or (B, 1, gh, gw) -> (B,)."""
    return _attention(logits).flatten(1).amax(-1)


def signal_to_noise(repeated: Tensor) -> Tensor:
    """The squared length of a vector's mean over its variance, from R independent copies of it.

    Of a gradient: below 1 a step follows the luck of the draw more than the loss, and averaging n draws multiplies it
    by n. The mean's own variance is taken off, so that pure noise gives 0 on average, sometimes less.

    Args:
        repeated: (R, …) floating point, R ≥ 2, e.g. `repeated_gradients`.

    Returns:
        A scalar: (‖mean‖² − variance / R) / variance, where the variance is that of all components together.
    """
    check_floating("repeated", repeated)
    if repeated.ndim < 1 or len(repeated) < 2:
        raise ValueError(f"signal and noise need at least 2 copies, got {tuple(repeated.shape)}")
    copies = repeated.detach().flatten(1) if repeated.ndim > 1 else repeated.detach().unsqueeze(-1)  # (R, P)
    variance = copies.var(0).sum()
    return copies.mean(0).square().sum() / variance - 1 / len(copies)


def repeated_error(pooled: Tensor) -> Tensor:
    """The standard error of one draw's estimate over the length of what is estimated, from R draws for the same images.

    `ats.estimate` tells it from a single draw of the library's estimators; this holds for whatever was pooled.

    Args:
        pooled: (R, B, …) floating point, R ≥ 2, features pooled from independent draws.

    Returns:
        (B,).
    """
    check_floating("pooled", pooled)
    if pooled.ndim < 2 or len(pooled) < 2:
        raise ValueError(f"an error needs at least 2 draws, (R, B, …), got {tuple(pooled.shape)}")
    copies = pooled.detach().flatten(2) if pooled.ndim > 2 else pooled.detach().unsqueeze(-1)  # (R, B, D)
    return copies.var(0).sum(-1).sqrt() / copies.mean(0).norm(dim=-1)


def repeated_gradients(loss: Callable[[], Tensor], parameters: Iterable[Tensor], repeats: int) -> Tensor:
    """The gradient of a random loss to some parameters, over and over: (R, P). Their ``.grad`` is left as it is.

    Args:
        loss: () -> a scalar that draws anew whenever it is called.
        parameters: P numbers in all; one that the loss does not depend on counts as 0.
        repeats: R, at least 2.
    """
    if check_count("repeats", repeats) < 2:
        raise ValueError(f"repeats must be at least 2 to tell noise from signal, got {repeats}")
    parameters = list(parameters)
    if not parameters or not all(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            "parameters must be at least one tensor, all of which require gradients; leave out what is frozen, e.g. "
            "[p for p in network.parameters() if p.requires_grad]"
        )
    rows = []
    with torch.enable_grad():
        for _ in range(repeats):
            value = loss()
            if value.numel() != 1:
                raise ValueError(f"loss must give a scalar, got {tuple(value.shape)}; take its mean over the batch")
            gradients = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
            rows.append(torch.cat([gradient.detach().flatten() for gradient in gradients]))
    return torch.stack(rows)


def warning_signs(logits: Tensor, *, loss: float | None = None, chance: float | None = None) -> dict[str, str]:
    """What looks wrong with the attention on a batch: of "collapse", "edge" and "plateau" those found, and what to do.

    One batch proves little: warn of what lasts, a plateau for some hundred steps.

    Args:
        logits: (B, gh, gw) or (B, 1, gh, gw).
        loss: of the batch in nats, or a mean over the last steps, without the entropy bonus.
        chance: the loss of giving each class its share of the training images, log(classes) if these are equal.
            Without both, a plateau is not told, nor collapse from what the task may need.
    """
    if chance is not None and not chance > 0:
        raise ValueError(f"chance is a loss in nats, e.g. math.log(classes), and must be positive, got {chance}")
    attention = _attention(logits)
    grid = (attention.shape[-2], attention.shape[-1])
    share, mass = border_share(grid), float(border_mass(logits).mean())
    cells = float(torch.special.entr(attention).sum((1, 2)).mean().exp())
    loss, chance = (float("nan") if value is None else value for value in (loss, chance))
    found = {
        "collapse": cells < _FEW_CELLS and not loss < _LEARNED * chance,  # as it is where one of them is not known
        "edge": share < 1 and mass > (1 + share) / 2,  # half way from its share to all
        "plateau": loss > _AT_CHANCE * chance,
    }
    details = {"cells": cells, "mass": mass, "share": share, "loss": loss, "chance": chance}
    return {cause: CAUSES[cause].format(**details) for cause, there in found.items() if there}


def _attention(logits: Tensor) -> Tensor:
    check_floating("logits", logits)
    if logits.ndim not in (3, 4) or (logits.ndim == 4 and logits.shape[1] != 1):
        raise ValueError(f"logits must be (B, gh, gw) or (B, 1, gh, gw), got {tuple(logits.shape)}")
    grid = logits.shape[-2:]
    return logits.detach().flatten(1).double().softmax(-1).view(-1, *grid)  # (B, gh, gw)
