"""Numbers that tell how attention sampling fares in training. Plain functions of tensors; none is differentiable.

`ats.experiments.callbacks` logs them and warns where they look wrong; docs/diagnostics.md says how to read them.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ats import functional
from ats.batches import check_grid_sizes
from ats.nested_sample import NestedSample
from ats.samples import BoxSample, Estimator
from ats_kernels.backend import may_look
from ats_kernels.checks import check_count, check_floating, check_log_probabilities, check_pair, check_tensor
from ats_kernels.plausible import check_no_attention

_FEW_CELLS = 2.0  # attention on fewer, in effect, has collapsed
_AT_CHANCE = 0.98  # of the loss at chance: a model has learned nothing until it is below
_DISTINCT = 1 / 3  # of their area; drawn patches that cover less of it overlap
_EVERYWHERE = 0.8  # of the cells in effect: attention is as good as uniform
_SOMEWHERE = 0.25  # of the cells in effect: attention chooses
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
    "overlap": (
        "the patches drawn from an image overlap: together they cover {distinct:.0%} of their area, so that {patches} "
        "of them read little more than a few would. Use a coarser grid of cells (more pooling in the attention "
        "network, or a smaller view), smaller patches, or fewer of them"
    ),
    "one class": (
        "attention explains one class only: on images of class {sharp} it lies on {few:.0%} of the cells in effect, on "
        "those of class {flat} on {many:.0%}, as good as everywhere. What such an image is given away by is then that "
        "nothing was found, and its map shows nothing. That is right if the class means the absence of the others; "
        "if not, use a smaller entropy weight, balance the classes, or give each class logits of its own"
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


def relative_entropy(entropy: Tensor, cells: int | Sequence[int] | Tensor) -> Tensor:
    """The attention's entropy in nats against the largest that K cells allow, log K: 0 on one cell, 1 when uniform.

    Args:
        entropy: (B,).
        cells: K, for all images or one each, (B,): `ats.functional.live_cells(logits)` where cells are masked or grids
            differ. Only so does entropy compare between images of different sizes.
    """
    return functional.relative_entropy(entropy.detach(), cells)


def border_mass(logits: Tensor, *, grid_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """The share of the attention on the outermost cells of the grid: logits (B, gh, gw) or (B, 1, gh, gw) -> (B,).

    Of logits that were padded to a common grid, `grid_sizes` are the images' own, as their sample has them.
    """
    attention = _attention(logits)
    own = check_grid_sizes(grid_sizes, logits)
    if own is None:
        return 1 - attention[:, 1:-1, 1:-1].flatten(1).sum(-1)
    inner = [one[1 : height - 1, 1 : width - 1].sum() for one, (height, width) in zip(attention, own, strict=True)]
    return 1 - torch.stack(inner)


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


def distinct_area(sample: BoxSample) -> Tensor:
    """The share of their summed area that drawn patches cover together: 1 where none overlap, 1/N where all coincide.

    A cell that was drawn again, with replacement, counts once.

    Args:
        sample: of B images, as `ats.sample_patches` gives it.

    Returns:
        (B,) float64 in (0, 1].
    """
    order = sample.indices.sort(dim=-1, stable=True)
    counted = torch.ones_like(sample.indices, dtype=torch.bool)
    counted[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    counted &= order.values >= 0  # no surplus, which is read once more and is no patch of its own
    offsets = sample.offsets.gather(1, order.indices.unsqueeze(-1).expand(-1, -1, 2))  # (B, N, 2)
    inside, lengths = [], []
    for axis in (0, 1):
        first = offsets[..., axis]
        edges = torch.cat([first, first + sample.patch_size[axis]], dim=1).sort(-1).values  # (B, 2N)
        begin = edges[:, None, :-1]
        inside.append((first.unsqueeze(-1) <= begin) & (begin < first.unsqueeze(-1) + sample.patch_size[axis]))
        lengths.append(edges.diff(dim=-1).double())  # (B, 2N − 1)
    rows, columns = (one.double() for one in inside)  # (B, N, 2N − 1)
    covered = ((rows * counted.unsqueeze(-1)).transpose(1, 2) @ columns > 0).double()
    union = (lengths[0].unsqueeze(1) @ covered @ lengths[1].unsqueeze(-1)).flatten()
    return union / (counted.sum(-1) * sample.patch_size[0] * sample.patch_size[1])


def by_level(sample: NestedSample, *, estimator: Estimator = "ordered") -> list[dict[str, Tensor]]:
    """What the draws of each level tell, the outermost first: numbers (B,), of inner levels the mean over regions.

    - effective_draws: `effective_sample_size` of the weights of a level's draws.
    - covered_mass: attention on the cells drawn, of that within the region.
    - relative_entropy: of a region's attention, against that of all cells of its grid.
    - distinct_area: of the boxes, as `distinct_area` has it.

    Args:
        sample: as a nested model gives it.
        estimator: what the weights are of.
    """
    found = []
    live = torch.ones(len(sample), 1, dtype=torch.bool, device=sample.entropy.device)  # (B, M) regions that count
    for level in sample.levels:
        cells = level.grid_size[0] * level.grid_size[1]
        if level.grid_sizes is not None:
            grids = torch.tensor(level.grid_sizes, device=level.indices.device)
            own: int | Tensor = grids.prod(-1)
        else:
            own = cells
        values = {
            "effective_draws": effective_sample_size(level.weights(estimator)),
            "covered_mass": covered_mass(level.log_attention, level.indices),
            "relative_entropy": relative_entropy(level.entropy, own),
            "distinct_area": distinct_area(level),
        }
        share = live.double() / live.sum(1, keepdim=True)
        found.append({name: (share * value.double().view(live.shape)).sum(1) for name, value in values.items()})
        live = (live.reshape(-1, 1) & ~level.surplus).view(len(sample), -1)
    return found


def class_spread(logits: Tensor, labels: Tensor) -> dict[int, float]:
    """For each class the share of the live cells that attention lies on in effect, exp(entropy) / cells: 1 is uniform.

    Args:
        logits: (B, gh, gw) or (B, 1, gh, gw).
        labels: (B,) int64, the images' classes.
    """
    check_tensor("labels", labels)
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be the classes (B,) of {logits.shape[0]} images, got {tuple(labels.shape)} of {labels.dtype}"
        )
    attention = _attention(logits).flatten(1)
    live = (~logits.detach().flatten(1).isneginf()).sum(-1)
    share = torch.special.entr(attention).sum(-1).exp() / live
    return {int(name): float(share[labels == name].mean()) for name in labels.unique()}


def warning_signs(
    logits: Tensor,
    *,
    loss: float | None = None,
    chance: float | None = None,
    sample: BoxSample | NestedSample | None = None,
    labels: Tensor | None = None,
) -> dict[str, str]:
    """What looks wrong with the attention on a batch: of `CAUSES` those found, and what to do.

    One batch proves little: warn of what lasts, a plateau for some hundred steps.

    Args:
        logits: (B, gh, gw) or (B, 1, gh, gw).
        loss: of the batch in nats, or a mean over the last steps, without the entropy bonus.
        chance: the loss of giving each class its share of the training images, log(classes) if these are equal.
            Without both, a plateau is not told, nor collapse from what the task may need.
        sample: what was drawn from these logits; without it, overlap is not told. Of images whose grids differ it knows
            their own. Of a nested model, whose first level's logits these are, inner levels are told of as well.
        labels: (B,) classes; without them, attention that explains one class only is not told.
    """
    if chance is not None and not chance > 0:
        raise ValueError(f"chance is a loss in nats, e.g. math.log(classes), and must be positive, got {chance}")
    inner: Sequence[BoxSample] = ()
    if isinstance(sample, NestedSample):
        inner, sample = sample.levels[1:], sample.levels[0]
    attention = _attention(logits)
    grids = (
        [(attention.shape[-2], attention.shape[-1])] if sample is None or not sample.grid_sizes else sample.grid_sizes
    )
    share = sum(border_share(grid) for grid in grids) / len(grids)
    mass = float(border_mass(logits, grid_sizes=None if sample is None else sample.grid_sizes).mean())
    cells = float(torch.special.entr(attention).sum((1, 2)).mean().exp())
    loss, chance = (float("nan") if value is None else value for value in (loss, chance))
    drawn = inner[-1] if inner else sample
    distinct = 1.0 if drawn is None else float(distinct_area(drawn).mean())
    for level in inner:  # where a level looks at one cell of each region, that is all that is seen of it
        of_region = float(level.entropy.detach().double().mean().exp())
        cells = min(cells, of_region) if level.grid_size[0] * level.grid_size[1] > 2 * _FEW_CELLS else cells
    spread = {} if labels is None else class_spread(logits, labels)
    flat, sharp = (pick(spread, key=spread.__getitem__, default=-1) for pick in (max, min))
    many, few = spread.get(flat, 0.0), spread.get(sharp, 0.0)
    found = {
        "collapse": cells < _FEW_CELLS and not loss < _LEARNED * chance,  # as it is where one of them is not known
        "edge": share < 1 and mass > (1 + share) / 2,  # half way from its share to all
        "overlap": distinct < _DISTINCT,
        "one class": many > _EVERYWHERE and few < _SOMEWHERE,
        "plateau": loss > _AT_CHANCE * chance,
    }
    details = {"cells": cells, "mass": mass, "share": share, "loss": loss, "chance": chance, "distinct": distinct}
    details |= {"patches": 0 if drawn is None else drawn.indices.shape[1]}
    details |= {"flat": flat, "sharp": sharp, "many": many, "few": few}
    return {cause: CAUSES[cause].format(**details) for cause, there in found.items() if there}


def _attention(logits: Tensor) -> Tensor:
    check_floating("logits", logits)
    if logits.ndim not in (3, 4) or (logits.ndim == 4 and logits.shape[1] != 1):
        raise ValueError(f"logits must be (B, gh, gw) or (B, 1, gh, gw), got {tuple(logits.shape)}")
    grid, flat = logits.shape[-2:], logits.detach().flatten(1)
    if may_look(flat) and flat.numel():
        check_no_attention(flat, flat.logsumexp(-1))
    return logits.detach().flatten(1).double().softmax(-1).view(-1, *grid)  # (B, gh, gw)
