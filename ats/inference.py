"""Predict with a trained model, and say how sure the prediction is.

The classifier is linear in the pooled features, so it may come before the pooling: the class logits of single patches
are pooled in their place, and `ats_kernels.pooling.variance` tells the standard error. Drawn without replacement, they
are pooled by the unordered estimator whatever the model was trained with: both estimate the same model without bias, it
with less variance.
"""

import dataclasses

import torch
from torch import Tensor

from ats._modules import check_evaluating
from ats._renamed import renamed_option
from ats.batches import Images, Maps, Views, each_size, is_many, sizes_of
from ats.class_logits import Head, class_logits
from ats.draw_plan import DrawPlan
from ats.functional import estimate_pooled, pool, sample_cells
from ats.nested_inference import anytime_nested, predict_nested
from ats.nn import AttentionSampling, NestedAttentionSampling
from ats.prediction import Prediction
from ats.samples import BoxSample, CellSample, Estimator, Selection
from ats_kernels.checks import check_choice, check_count, check_number
from ats_kernels.pixels import blames_pixels
from ats_kernels.pooling.op import check_estimator
from ats_kernels.sampling.draws import METHODS


@renamed_option("method", "selection")
@blames_pixels
@torch.no_grad()
def predict(
    sampling: AttentionSampling | NestedAttentionSampling,
    head: Head,
    view: Views | None,
    image: Images,
    *,
    selection: Selection = "sample",
    mask: Maps | None = None,
    n_patches: int | tuple[int, ...] | None = None,
    replace: bool | None = None,
    estimator: Estimator | None = None,
    repeats: int = 1,
    generator: torch.Generator | None = None,
) -> Prediction:
    """Class logits from a fixed number of patches an image.

    Args:
        sampling: the attention and feature networks, in evaluation mode. Networks of a loop of your own are wrapped by
            ``ats.nn.AttentionSampling(attention, feature, n_patches, patch_size)``. Or a nested model.
        head: pooled features (M, …) -> class logits (M, C), linear (with a bias, where it has one).
        view: (B, C, h, w), or a sequence of views (C, h, w) of any sizes. A nested model reads it where None.
        image: (B, C, H, W), or a sequence of tensors (C, H, W) and `ats.ImageSource`s of any sizes.
        selection: "sample", or "topk": the most probable cells, weighted by their attention, no randomness.
        mask: bool, True where a cell may be drawn, as in `ats.sample_cells`.
        n_patches: patches a draw; what `sampling` has where None. An image with fewer live cells has all of them read,
            which gives the full model's logits. Of a nested model the draws of each level, e.g. (8, 4).
        replace, estimator: of a draw, in place of `sampling`'s own replace, and of the unordered estimator without
            replacement; `sampling` is left as it is. The most probable cells have no use for them.
        repeats: independent draws to average. One draw of as many patches without replacement says more: it reads
            none twice.
        generator: of the draws, on the logits' device.

    Raises:
        ValueError: unknown options, a network in training mode, a head that is not linear, and what
            `ats.sample_patches` raises.
    """
    check_choice("selection", selection, METHODS)
    repeats = check_count("repeats", repeats)
    if selection == "topk" and repeats > 1:
        raise ValueError(f"selection='topk' draws nothing at random: repeats={repeats} would give the same every time")
    if isinstance(sampling, NestedAttentionSampling):
        return predict_nested(
            sampling,
            head,
            view,
            image,
            selection=selection,
            mask=mask,
            n_patches=n_patches,
            replace=replace,
            estimator=estimator,
            repeats=repeats,
            generator=generator,
        )
    view = _check_flat(sampling, head, view)
    count = sampling.n_patches if n_patches is None else check_count("n_patches", n_patches)
    replace = (sampling.replace if replace is None else replace) and selection == "sample"
    if estimator is None:
        estimator = "ordered" if replace else "unordered"
    check_estimator(estimator, replace=replace)
    logits, grids = sampling.attend(view, image, mask=mask)
    if not replace and count > 1:
        count = min(count, max(2, logits[0].numel()))  # no more can be read
    values, variances, draws = [], [], []
    for _ in range(repeats):
        cells = sample_cells(
            logits,
            count,
            replace=replace,
            selection=selection,
            allow_fewer=True,
            grid_sizes=grids,
            generator=generator,
        )
        drawn = sampling.read_sample(image, cells, sizes_of(view))
        features = sampling.patch_features(drawn.patches, drawn.offsets, sizes_of(image))
        scores = class_logits(head, features)  # (B, N, C)
        draws.append(drawn.boxes())
        if selection == "topk" or count == 1:
            values.append(pool(scores, cells, estimator=estimator))
            continue
        value, variance = estimate_pooled(scores, cells, estimator=estimator)
        values.append(value)
        variances.append(variance)
    return Prediction(
        logits=torch.stack(values).mean(0),
        standard_error=torch.stack(variances).sum(0).sqrt() / repeats if variances else None,
        patches_used=torch.stack([drawn.counts for drawn in draws]).sum(0),
        stopped=torch.zeros(len(logits), dtype=torch.bool, device=logits.device),
        samples=tuple(BoxSample.cat([drawn[image] for drawn in draws]) for image in range(len(logits))),
        estimator=estimator,
    )


@blames_pixels
@torch.no_grad()
def anytime(
    sampling: AttentionSampling | NestedAttentionSampling,
    head: Head,
    view: Views | None,
    image: Images,
    *,
    budget: int,
    mask: Maps | None = None,
    tolerance: float | None = None,
    lead: float | None = None,
    min_patches: int = 8,
    chunk_size: int = 2,
    plan: DrawPlan | None = None,
    generator: torch.Generator | None = None,
) -> Prediction:
    """Class logits from as many patches as each image needs: read on until sure enough, or the budget is spent.

    Cells are drawn without replacement, whatever the model was trained with, and each patch is read once: the first
    cells of a draw are themselves a draw, so that reading on only adds terms. Images of a batch stop one by one, each
    once it meets one of the criteria given, which are looked at after `min_patches` and then after every chunk.

    Args:
        sampling, head, view, image, mask, generator: as in `predict`.
        budget: patches an image at most; one with fewer live cells has them all read, which gives the full model.
        tolerance: stop once the standard error of every class logit is at most this.
        lead: stop once the best class leads every other by this many standard errors of their difference: the
            prediction is decided. A single logit has to be that far from 0.
        min_patches: patches to read before a first look, at least 2. A standard error from few patches is often far
            too small: it is from patches that happen to agree.
        chunk_size: patches an image between looks.
        plan: of a nested model, whether to spend the budget on regions or on patches in them: what images before this
            one showed, and what this one shows is added to it. The budget is then the time that as many patches would
            take by the model's own draws.

    A nested model reads more regions, with as many patches each as its levels' `n` say, or the plan: at least 2; at
    least four regions before a first look, then one or more at a time.

    Raises:
        ValueError: neither criterion, impossible values, and what `predict` raises.
    """
    budget, chunk_size = check_count("budget", budget), check_count("chunk_size", chunk_size)
    if check_count("min_patches", min_patches) < 2:
        raise ValueError("min_patches must be at least 2: one patch says nothing of the error")
    if tolerance is None and lead is None:
        raise ValueError(
            "anytime needs a tolerance or a lead to stop at; for a fixed number of patches call ats.predict"
        )
    tolerance, lead = _limit("tolerance", tolerance), _limit("lead", lead)
    if isinstance(sampling, NestedAttentionSampling):
        return anytime_nested(
            sampling,
            head,
            view,
            image,
            budget=budget,
            mask=mask,
            tolerance=tolerance,
            lead=lead,
            min_patches=min_patches,
            chunk_size=chunk_size,
            plan=plan,
            generator=generator,
        )
    if plan is not None:
        raise TypeError("plan is for an ats.nn.NestedAttentionSampling, whose patches lie in regions; leave it out")
    view = _check_flat(sampling, head, view)
    logits, grids = sampling.attend(view, image, mask=mask)
    if budget < 2:
        raise ValueError(f"a budget of {budget} patch says nothing of the error; allow at least 2")
    budget = min(budget, max(2, logits[0].numel()))  # of a single cell, which is the full model, one is left over
    draw = sample_cells(logits, budget, allow_fewer=True, grid_sizes=grids, generator=generator)
    live = draw.counts  # (B,) patches that an image can have read

    going = torch.arange(len(logits), device=logits.device)  # images still read on
    scores = torch.empty(0, device=logits.device)  # (G, n, C) of their n patches so far
    result: tuple[Tensor, ...] | None = None
    offsets = torch.zeros(len(logits), budget, 2, dtype=torch.int64, device=logits.device)
    looks = [*range(min(min_patches, budget), budget, chunk_size), budget]
    for before, upto in zip([0, *looks], looks, strict=False):
        more, offsets[going, before:upto], patch_size = _scores(
            sampling, head, view, image, _of(draw, going, before, upto), going
        )
        scores = torch.cat([scores, more], dim=1) if before else more
        so_far = _of(draw, going, 0, upto)
        value, variance = estimate_pooled(scores, so_far, estimator="unordered")
        error = variance.sqrt()
        sure = torch.zeros_like(going, dtype=torch.bool)
        if tolerance is not None:
            sure |= (error <= tolerance).all(-1)
        if lead is not None:
            sure |= _decided(value, scores, so_far, lead)
        if result is None:  # the first look, at every image
            result = torch.empty_like(value), torch.empty_like(error), torch.empty_like(going), torch.empty_like(sure)
        used = live[going].clamp(max=upto)
        done = sure | (used == live[going])
        for kept, new in zip(result, (value, error, used, sure), strict=True):
            kept[going[done]] = new[done]
        going, scores = going[~done], scores[~done]
        if not len(going):
            break
    assert result is not None
    value, error, used, stopped = result
    samples = (_first(one, n, where, patch_size) for one, n, where in zip(draw, used.tolist(), offsets, strict=True))
    return Prediction(value, error, used, stopped, tuple(samples))


def _limit(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    number = check_number(name, value)
    if number < 0:
        raise ValueError(f"{name} must be a finite number of at least 0, got {number}")
    return number


def _of(draw: CellSample, images: Tensor, begin: int, end: int) -> CellSample:
    """Draws begin to end of some of the images (G,)."""
    cut = slice(begin, end)
    return dataclasses.replace(
        draw,
        indices=draw.indices[images, cut],
        log_attention=draw.log_attention[images, cut],
        logsumexp=draw.logsumexp[images],
        entropy=draw.entropy[images],
        grid_sizes=None if draw.grid_sizes is None else tuple(draw.grid_sizes[image] for image in images.tolist()),
    )


def _first(cells: CellSample, n: int, offsets: Tensor, patch_size: tuple[int, int]) -> BoxSample:
    """The first n draws of one image, a whole draw of its own: all live cells are weighted by their attention."""
    first = dataclasses.replace(
        cells, indices=cells.indices[:, :n], log_attention=cells.log_attention[:, :n], padded=False
    )
    return BoxSample.at(first, offsets[None, :n], patch_size)


def _decided(value: Tensor, scores: Tensor, cells: CellSample, lead: float) -> Tensor:
    """Whether the best class (B,) leads every other by `lead` standard errors of their difference."""
    if value.shape[-1] == 1:  # one logit, decided by its sign
        best = torch.zeros_like(value, dtype=torch.bool)
        ahead = scores * value.sign().unsqueeze(1)
    else:
        top = value.argmax(-1, keepdim=True)  # (B, 1)
        best = torch.zeros_like(value, dtype=torch.bool).scatter(-1, top, True)
        ahead = scores.gather(2, top.unsqueeze(1).expand(-1, scores.shape[1], -1)) - scores  # (B, N, C)
    difference, variance = estimate_pooled(ahead, cells, estimator="unordered")
    return ((difference > lead * variance.sqrt()) | best).all(-1)


def _scores(
    sampling: AttentionSampling,
    head: Head,
    view: Views,
    image: Images,
    cells: CellSample,  # (G, M)
    images: Tensor,  # (G,) which they are of
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The class logits (G, M, C) of single patches, in float64, their offsets (G, M, 2), and their size.

    Of an image's surplus nothing is read.
    """
    chosen = images.tolist()
    views, sizes = (
        each_size("view_size", sizes_of(view), len(image)),
        each_size("image_size", sizes_of(image), len(image)),
    )
    views, sizes = [views[number] for number in chosen], [sizes[number] for number in chosen]
    surplus = cells.surplus
    if not isinstance(image, Tensor):
        image = [image[number] for number in chosen]
    whole = len(images) == len(image)  # of a tensor some images would be copied whole
    if whole and not (cells.padded and surplus.any()):
        patches, offsets = sampling.read_drawn(
            image, cells.indices, cells, views if is_many(sizes_of(view)) else views[0]
        )
        features = sampling.patch_features(patches, offsets, sizes_of(image))
        return class_logits(head, features), offsets, (patches.shape[-2], patches.shape[-1])
    read = []
    for row, number in enumerate(range(len(chosen)) if whole else chosen):
        wanted = cells.indices[row : row + 1, ~surplus[row]]
        one = sampling.read_drawn(image[number : number + 1], wanted, cells[row], views[row])  # a slice is no copy
        read.append(one)
    patches, found = (torch.cat(parts, dim=1) for parts in zip(*read, strict=True))  # (1, all of them, …)
    own = [size for size, count in zip(sizes, cells.counts.tolist(), strict=True) for _ in range(count)]
    features = sampling.patch_features(patches.transpose(0, 1), found.transpose(0, 1), own)  # (all of them, 1, …)
    flat = class_logits(head, features.transpose(0, 1)).squeeze(0)
    scores, offsets = flat.new_zeros(*surplus.shape, flat.shape[-1]), found.new_zeros(*surplus.shape, 2)
    scores[~surplus], offsets[~surplus] = flat, found.squeeze(0)
    return scores, offsets, (patches.shape[-2], patches.shape[-1])


def _check_flat(sampling: AttentionSampling, head: Head, view: Views | None) -> Views:
    """The view, or raise unless it is there, and all networks behave as in evaluation."""
    if not isinstance(sampling, AttentionSampling):
        raise TypeError(
            f"sampling must be an ats.nn.AttentionSampling, got {type(sampling).__name__}; pass the model's own, e.g. "
            "model.sampling, or wrap its networks in one"
        )
    check_evaluating(sampling=sampling, head=head)
    if view is None:
        raise TypeError("view is None: only an ats.nn.NestedAttentionSampling reads it by itself; see ats.read_view")
    return view
