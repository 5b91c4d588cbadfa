"""Draw cells of an attention map, some of which may be masked, for images that may have fewer cells than draws."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import ats_kernels
from ats.batches import GridSizes, Maps, check_grid_sizes, is_sequence, pad_logits, pad_maps
from ats.samples import CellSample, Selection
from ats_kernels.backend import may_look
from ats_kernels.checks import check_choice, check_count, check_flag, check_floating, check_tensor, compute_dtype
from ats_kernels.pixels import NonFiniteError
from ats_kernels.plausible import check_no_attention
from ats_kernels.sampling.draws import METHODS, any_failed
from ats_kernels.sampling.op import draw


def sample_cells(
    logits: Maps,
    n: int,
    *,
    replace: bool = False,
    selection: Selection = "sample",
    mask: Maps | None = None,
    allow_fewer: bool | None = None,
    grid_sizes: Sequence[tuple[int, int]] | None = None,
    generator: torch.Generator | None = None,
    validate: bool | None = None,
) -> CellSample:
    """Draw cells where the attention is, without reading anything.

    Args:
        logits: (B, gh, gw) or (B, 1, gh, gw), unnormalised log attention; −inf masks a cell. Of images whose grids
            differ, a list of maps (gh, gw).
        n: cells an image.
        replace: draw with replacement.
        selection: "sample", or "topk": the most probable cells, no randomness.
        mask: bool, True where a cell may be drawn; (gh, gw) for all images, the logits' shape, or a list of (gh, gw).
        allow_fewer: draw all live cells of an image that has fewer than n, and mark the rest of its n draws as surplus
            (index −1, weight 0): what is pooled is exact for that image. False: an error. None: True with a `mask`,
            and where grids differ.
        grid_sizes: of logits that are one tensor though grids differ, as a forward pass gives them, −inf below and to
            the right: cells (gh, gw) of each image's own, e.g. `grid_sizes` of the sample.
        generator: random numbers on the logits' device. Seed data-parallel ranks differently. Within activation
            checkpointing leave it out: only torch's own generators are wound back for the second pass.
        validate: look at the logits' values, which makes the host wait for a GPU. None: on the CPU only.

    Returns:
        `CellSample`. Without validation, an image whose attention cannot be drawn from comes back with index −1 and
        NaN log_attention, which makes everything pooled with it NaN.

    Raises:
        TypeError: logits that are not floating point, a mask that is not bool, a `generator` that is none.
        ValueError: wrong shapes, more draws than live cells (without `allow_fewer`), NaN or +inf logits, an image with
            every cell masked, an unknown selection.
    """
    logits, own = pad_logits(logits)
    check_logits(logits)
    own = check_grid_sizes(own if grid_sizes is None else grid_sizes, logits)
    n = check_count("n", n)
    return draw_cells(
        logits,
        own,
        n,
        replace=replace,
        selection=selection,
        mask=mask,
        allow_fewer=allow_fewer,
        generator=generator,
        validate=validate,
    )


def draw_cells(
    logits: Tensor,
    own: GridSizes,
    n: int,
    *,
    replace: bool,
    selection: Selection,
    mask: Maps | None,
    allow_fewer: bool | None,
    generator: torch.Generator | None,
    validate: bool | None,
) -> CellSample:
    """`sample_cells` from logits that are checked, with each image's own grid where they differ."""
    check_choice("selection", selection, METHODS)
    check_flag("replace", replace)
    for name, flag in (("allow_fewer", allow_fewer), ("validate", validate)):
        if flag is not None:
            check_flag(name, flag)
    check_goes_together(selection, replace=replace)
    logits = mask_logits(logits, mask, own)
    flat = logits.flatten(1)  # (B, K)
    cells = flat.shape[1]
    fewer = (mask is not None or own is not None if allow_fewer is None else allow_fewer) and not replace
    if n > cells and not (replace or fewer):
        raise ValueError(f"cannot draw n={n} cells from K={cells}; {_advice(selection)}")
    looks = may_look(logits)
    extended = _with_spare_cells(flat, n, looks=looks) if fewer else flat
    drawn = draw(extended, n, replace=replace, method=selection, generator=generator)
    if looks if validate is None else validate:
        if any_failed(drawn.indices, looks=looks):
            _raise_for_few(flat.detach(), n, selection, fewest=1 if fewer or replace else n)
            ats_kernels.sample(extended, n, replace=replace, method=selection, validate=True)  # says what else is wrong
        check_no_attention(flat, drawn.logsumexp)
    indices, log_attention = drawn.indices, drawn.log_attention
    padded = extended is not flat
    if padded:
        spare = indices >= cells
        indices, log_attention = indices.masked_fill(spare, -1), log_attention.masked_fill(spare, -torch.inf)
    return CellSample(
        indices=indices,
        log_attention=log_attention,
        logsumexp=drawn.logsumexp,
        entropy=drawn.entropy,
        replace=replace,
        selection=selection,
        grid_size=(logits.shape[-2], logits.shape[-1]),
        padded=padded,
        grid_sizes=own,
    )


def mask_logits(logits: Tensor, mask: Maps | None, grid_sizes: GridSizes = None) -> Tensor:
    """The logits with −inf where `mask` is False. It is bool, (gh, gw) for all images or of the logits' shape.

    It may be a list of (gh, gw), of each image's own grid.
    """
    if mask is None:
        return logits
    if is_sequence(mask) and mask and isinstance(mask[0], Tensor):
        mask = _stack_masks(mask, logits, grid_sizes)
    check_tensor("mask", mask)
    assert isinstance(mask, Tensor)
    _check_mask("mask", mask, logits)
    grid, batch = logits.shape[-2:], logits.shape[0]
    fits = mask.shape[-2:] == grid and (
        mask.ndim == 2 or (mask.shape[0] in (1, batch) and (mask.ndim == 3 or (mask.ndim == 4 and mask.shape[1] == 1)))
    )
    if not fits:
        raise ValueError(
            f"mask must be (gh, gw) or (B, gh, gw), with one entry a cell of the logits {tuple(logits.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    if may_look(logits):  # what is masked no longer adds up to 1
        flat = logits.detach().flatten(1)
        check_no_attention(flat, flat.logsumexp(-1))
    if mask.ndim > 2:  # (B or 1, gh, gw), then with a channel where the logits have one
        mask = mask.view(mask.shape[0], *([1] if logits.ndim == 4 else []), *grid)
    return logits.masked_fill(~mask, -torch.inf)


def _check_mask(name: str, mask: Tensor, logits: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must be bool, True where a cell may be drawn, got {mask.dtype}; compare it, e.g. {name} > 0.5"
        )
    if mask.device != logits.device:
        raise ValueError(f"{name} is on {mask.device} but logits are on {logits.device}; move the mask there")


def _stack_masks(masks: Sequence[Tensor], logits: Tensor, grid_sizes: GridSizes) -> Tensor:
    """Masks (gh, gw) of each image's own grid as one (B, gh, gw)."""
    grid = (logits.shape[-2], logits.shape[-1])
    if len(masks) != len(logits):
        raise ValueError(f"there are {len(masks)} masks but {len(logits)} images; give one mask an image")
    for number, (mask, own) in enumerate(zip(masks, grid_sizes or [grid] * len(masks), strict=True)):
        check_tensor(f"mask[{number}]", mask)
        _check_mask(f"mask[{number}]", mask, logits)
        if mask.shape != own:
            raise ValueError(
                f"mask[{number}] must be {own}, one entry a cell of that image, got {tuple(mask.shape)}; "
                "ats.mask_cells(mask, grid_size, image) makes it"
            )
    return pad_maps(masks, grid, False)


def live_cells(logits: Tensor) -> Tensor:
    """How many cells (B,) int64 of logits (B, gh, gw) or (B, 1, gh, gw) can be drawn: all that are not −inf."""
    check_logits(logits)
    return (~logits.detach().flatten(1).isneginf()).sum(-1)


def relative_entropy(entropy: Tensor, cells: int | Sequence[int] | Tensor) -> Tensor:
    """The attention's entropy (B,) in nats over the largest that K cells allow, log K: 0 on one cell, 1 when uniform.

    Entropy of images of different sizes compares only so. Differentiable: an entropy bonus for batches of them is its
    mean.

    Args:
        entropy: (B,), e.g. `entropy` of a sample.
        cells: K, for all or one an image, (B,); of masked and of padded logits, `live_cells(logits)`.
    """
    if (isinstance(cells, Tensor) and cells.ndim) or is_sequence(cells):
        most = torch.as_tensor(cells, device=entropy.device).to(entropy.dtype).log()
        if most.shape != entropy.shape:
            raise ValueError(f"cells must be K, or one an image {tuple(entropy.shape)}, got {tuple(most.shape)}")
        return torch.where(most > 0, entropy / most.clamp(min=torch.finfo(most.dtype).tiny), 1.0)
    if check_count("cells", cells) == 1:
        return torch.ones_like(entropy)
    most = torch.tensor(float(cells), dtype=torch.float64, device="cpu")  # type: ignore[arg-type]  # a number
    return entropy / most.log().to(entropy)


def mean_entropy(sample: CellSample) -> Tensor:
    """The mean entropy of a batch in nats, differentiable: what an entropy bonus is made of (paper, eq. 21).

    Where grids differ, H of K_b own cells counts as H · log K / log K_b, with K the cells of the largest own grid:
    every image can reach the same, and none is spread out more for being large.
    """
    if sample.grid_sizes is None:
        return sample.entropy.mean()
    cells = [height * width for height, width in sample.grid_sizes]
    return relative_entropy(sample.entropy, cells).mean() * math.log(max(cells))


def check_drawable(logits: Tensor) -> None:
    """Raise, where the host may look, if logits (B, gh, gw) are attention already or a row of them has no softmax."""
    if not may_look(logits):
        return
    flat = logits.detach().flatten(1)
    logsumexp = flat.logsumexp(-1)
    if not logsumexp.isfinite().all():
        _raise_for_few(flat, 1, "topk", fewest=1)
        ats_kernels.sample(flat, 1, method="topk", validate=True)  # says what else is wrong
    check_no_attention(flat, logsumexp)


def _with_spare_cells(flat: Tensor, n: int, *, looks: bool) -> Tensor:
    """Logits (B, K + n − 1) whose last cells come after all others, as many as an image needs for n draws.

    Their mass is e^−300 of that of the least cell or below, which changes no number of the other cells. Where the host
    may look at values and no image needs them, it is `flat` itself that comes back.
    """
    values = flat.detach().to(compute_dtype(flat.dtype))
    dead = values.isneginf()
    live = dead.logical_not().sum(-1, keepdim=True)  # (B, 1)
    if looks and bool((live >= n).all()):
        return flat
    lowest = torch.finfo(values.dtype).min
    at_lowest = values == lowest
    if not looks or bool(at_lowest.any()):  # there is no finite number below, so that these go up by the least there is
        step = torch.nextafter(values.new_tensor(lowest), values.new_tensor(0.0)) - lowest
        flat = flat + torch.where(at_lowest, step, 0.0)
    least = values.masked_fill(dead, torch.inf).amin(-1, keepdim=True)
    last = (least - 300 - least.abs()).clamp(min=lowest)
    last = torch.where(live > 0, last, -torch.inf)  # without a live cell nothing can be drawn
    needed = torch.arange(n - 1, device=flat.device) < n - live  # (B, n − 1)
    return torch.cat([flat, torch.where(needed, last, -torch.inf)], dim=-1)


def _raise_for_few(flat: Tensor, n: int, selection: str, *, fewest: int) -> None:
    """Raise where an image has fewer than `fewest` live cells, and nothing else is wrong with the logits."""
    if flat.isnan().any() or flat.isposinf().any():
        return
    live, row = (int(value) for value in (~flat.isneginf()).sum(-1).min(0))
    if live == 0:
        raise NonFiniteError(
            f"logits of row {row} are all −inf: every cell is masked, nothing can be drawn; leave that image out, or "
            "let one of its cells be drawn"
        )
    if live < fewest:
        raise ValueError(
            f"cannot draw n={n} cells from row {row}: only {live} of its {flat.shape[1]} cells are not masked; "
            f"{_advice(selection)}"
        )


def _advice(selection: str) -> str:
    ways = ["draw fewer", "use replace=True", "pass allow_fewer=True to read all there are"]
    return f"{ways[0]}, or {ways[2]}" if selection == "topk" else f"{ways[0]}, {ways[1]}, or {ways[2]}"


def check_logits(logits: Tensor) -> None:
    """Raise unless `logits` are floating point, (B, gh, gw) or (B, 1, gh, gw)."""
    check_floating("logits", logits)
    if logits.ndim not in (3, 4) or (logits.ndim == 4 and logits.shape[1] != 1):
        mend = {
            1: "; the cells of one image need logits.reshape(1, gh, gw)",
            2: "; a single map needs logits[None], cells in a list logits.unflatten(1, (gh, gw))",
            4: "; of several channels take one, e.g. logits[:, 0]",
        }.get(logits.ndim, "")
        raise ValueError(f"logits must be (B, gh, gw) or (B, 1, gh, gw), got {tuple(logits.shape)}{mend}")
    if logits.numel() == 0:
        raise ValueError(f"logits must have at least one image and one cell, got {tuple(logits.shape)}")


def check_goes_together(selection: str, *, replace: bool) -> None:
    """Raise where the most probable cells are to be taken with replacement."""
    if selection == "topk" and replace:
        raise ValueError(
            "selection='topk' takes distinct cells and cannot be combined with replace=True; drop one of them"
        )
