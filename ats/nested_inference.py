"""`ats.predict` and `ats.anytime` of nested models."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ats._modules import check_evaluating
from ats.batches import Images, Maps, Views
from ats.class_logits import Head, class_logits
from ats.draw_plan import DrawPlan
from ats.nested import Drawing, NestedAttentionSampling, Timed
from ats.nested_levels import Look
from ats.nested_sample import NestedSample
from ats.nested_variance import LevelEstimate, estimate_levels, estimate_parts, join_regions
from ats.pooling import pool
from ats.prediction import Prediction
from ats.samples import BoxSample, CellSample, Estimator, Selection
from ats_kernels.checks import check_count
from ats_kernels.pooling.op import check_estimator


def predict_nested(
    sampling: NestedAttentionSampling,
    head: Head,
    view: Views | None,
    image: Images,
    *,
    selection: Selection,
    mask: Maps | None,
    n_patches: int | Sequence[int] | None,
    replace: bool | None,
    estimator: Estimator | None,
    repeats: int,
    generator: torch.Generator | None,
) -> Prediction:
    """`ats.predict` of a nested model, whose arguments these are."""
    check_evaluating(sampling=sampling, head=head)
    replace = (sampling.replace if replace is None else replace) and selection == "sample"
    if estimator is None:
        estimator = "ordered" if replace else "unordered"
    check_estimator(estimator, replace=replace)
    how = Drawing(_draws(sampling, n_patches), replace, selection, True)
    look = sampling.look(view, image, mask)
    has_error = selection == "sample" and min(how.n) > 1
    values, variances, draws = [], [], []
    for _ in range(repeats):
        features, levels = sampling.draw(image, look, how=how, generator=generator)
        scores = class_logits(head, features)  # (R, n, C)
        draws.append(NestedSample(levels=levels, entropy=sampling.tree_entropy(levels)).boxes())
        if has_error:
            value, variance = estimate_levels(scores, levels, estimator=estimator)
            variances.append(variance)
        else:
            value = _pool_levels(scores, levels, estimator)
        values.append(value)
    counts = torch.stack([drawn.levels[0].counts for drawn in draws]).sum(0)
    return Prediction(
        logits=torch.stack(values).mean(0),
        standard_error=torch.stack(variances).sum(0).sqrt() / repeats if has_error else None,
        patches_used=torch.stack([drawn.counts for drawn in draws]).sum(0),
        stopped=torch.zeros(len(counts), dtype=torch.bool, device=counts.device),
        samples=tuple(NestedSample.cat([drawn[number] for drawn in draws]) for number in range(len(counts))),
        estimator=estimator,
        degrees=counts - 1,
    )


@torch.no_grad()
def plan_draws(
    sampling: NestedAttentionSampling,
    head: Head,
    view: Views | None,
    image: Images,
    *,
    mask: Maps | None = None,
    n_patches: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> DrawPlan:
    """How many regions and patches to draw, from a pilot draw of some images: `ats.DrawPlan.draws` says.

    Args:
        sampling, head, view, image, mask, generator: as in `ats.predict`.
        n_patches: draws of each level, at least 2; the model's own where None. The more, the surer the plan.
        seconds: what reading a cell of each level takes; measured where None.
    """
    if not isinstance(sampling, NestedAttentionSampling):
        raise TypeError(f"sampling must be an ats.nn.NestedAttentionSampling, got {type(sampling).__name__}")
    check_evaluating(sampling=sampling, head=head)
    n = _draws(sampling, n_patches)
    if len(n) < 2 or min(n) < 2:
        raise ValueError(f"a plan needs two levels or more and at least 2 draws of each, got {n}")
    plan, how = DrawPlan(seconds=seconds, keep=1.0), Drawing(n, False, "sample", True)
    features, levels = sampling.draw(
        image, sampling.look(view, image, mask), how=how, generator=generator, timed=plan.timed
    )
    scores = _centred(class_logits(head, features), torch.empty(0, device="cpu"))
    plan.add(estimate_parts(scores, levels).parts, n[1:], levels[0].counts)
    return plan


def _draws(sampling: NestedAttentionSampling, n_patches: int | Sequence[int] | None) -> tuple[int, ...]:
    if n_patches is None:
        return sampling.drawing().n
    depth = len(sampling.levels)
    n = tuple(n_patches) if isinstance(n_patches, Sequence) else (n_patches,)
    if len(n) != depth:
        raise ValueError(f"n_patches of a nested model is one number a level, of which there are {depth}, got {n}")
    return tuple(check_count("n_patches", one) for one in n)


def _pool_levels(features: Tensor, levels: Sequence[CellSample], estimator: Estimator) -> Tensor:
    for depth in reversed(range(len(levels))):
        features = pool(features, levels[depth], estimator=estimator)
        if depth:
            features = features.unflatten(0, tuple(levels[depth - 1].indices.shape))
    return features


class _Chunk:
    """Some more regions of those images (G,) that are still read on: scores (G·c, …, C) and the draws in them."""

    def __init__(self, images: Tensor, count: int, scores: Tensor, levels: tuple[BoxSample, ...]) -> None:
        self.images, self.count, self.scores, self.levels = images, count, scores, levels

    def estimate(self, going: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> LevelEstimate:
        """Estimates (going, c, C) of the regions, of scores changed image by image."""
        rows = torch.searchsorted(self.images, going)
        regions = torch.arange(self.count, device=rows.device)
        some = (rows.unsqueeze(1) * self.count + regions).flatten()  # of the first inner level's rows
        value, variance, parts = estimate_parts(self._changed(change), self.levels)
        shape = len(going), self.count
        return LevelEstimate(
            value[some].unflatten(0, shape), variance[some].unflatten(0, shape), parts[:, some].unflatten(1, shape)
        )

    def _changed(self, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        per_image = self.scores.unflatten(0, (len(self.images), -1))  # (G, rows, n, C)
        return change(per_image, self.images).flatten(0, 1)

    def of(self, image: int) -> tuple[BoxSample, ...]:
        """The draws in this image's regions."""
        row = int(torch.searchsorted(self.images, image))
        picked = []
        for level in self.levels:
            rows = len(level) // len(self.images)
            picked.append(level[row * rows : (row + 1) * rows])
        return tuple(picked)


def anytime_nested(
    sampling: NestedAttentionSampling,
    head: Head,
    view: Views | None,
    image: Images,
    *,
    budget: int,
    mask: Maps | None,
    tolerance: float | None,
    lead: float | None,
    min_patches: int,
    chunk_size: int,
    plan: DrawPlan | None,
    generator: torch.Generator | None,
) -> Prediction:
    """`ats.anytime` of a nested model, whose arguments these are: more regions are read, each with all its patches."""
    check_evaluating(sampling=sampling, head=head)
    n = sampling.drawing().n
    if len(n) < 2 or min(n[1:]) < 2:
        raise ValueError(
            f"anytime needs a nested model of two levels or more that draws at least 2 in each region, got n={n}; set "
            "the levels' n, or wrap the networks of one level in ats.nn.AttentionSampling"
        )
    affordable, *inner = (budget // math.prod(n[1:]), *n[1:]) if plan is None else plan.draws(n, budget)
    each = math.prod(inner)  # patches a region
    look = sampling.look(view, image, mask)
    most = min(affordable, max(2, look.logits[0].numel()))
    if most < 2:
        raise ValueError(
            f"a budget of {budget} patches is less than two regions of {each}, which say nothing of the error"
        )
    how = Drawing((most, *inner), False, "sample", True)
    outer = sampling.draw_cells(0, look, how, generator)
    boxes, size = sampling.boxes(0, look, outer.readable())
    drawn = BoxSample(**vars(outer), offsets=boxes, patch_size=size)
    first = min(max(-(-min_patches // each), 4), most)
    looks = [*range(first, most, max(1, chunk_size // each)), most]
    live = outer.counts
    timed: Timed = (lambda level, cells: nullcontext()) if plan is None else plan.timed
    going, chunks = torch.arange(len(live), device=live.device), list[_Chunk]()
    result: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []
    for before, upto in zip([0, *looks], looks, strict=False):
        chunks.append(_read(sampling, head, image, look, how, boxes[going, before:upto], going, size, timed, generator))
        so_far = _first_draws(drawn, upto)
        value, variance, _ = _estimate(chunks, so_far, going, lambda scores, _: scores)
        error = variance.sqrt()
        sure = torch.zeros_like(going, dtype=torch.bool)
        if tolerance is not None:
            sure |= (error <= tolerance).all(-1)
        if lead is not None:
            sure |= _decided(chunks, so_far, going, value, lead)
        used = live[going].clamp(max=upto)
        if not result:
            result = [torch.empty_like(value), torch.empty_like(error), torch.empty_like(going), torch.empty_like(sure)]
        done = sure | (used == live[going])
        for kept, new in zip(result, (value, error, used, sure), strict=True):
            kept[going[done]] = new[done]
        if plan is not None and done.any():
            seen.append((_estimate(chunks, so_far, going[done], _centred).parts, used[done]))
        going = going[~done]
        if not len(going):
            break
    if plan is not None:
        for parts, counts in seen:  # last: it is for the images to come
            plan.add(parts, inner, counts)
    value, error, used, stopped = result
    samples = tuple(_whole(sampling, drawn, chunks, number, count) for number, count in enumerate(used.tolist()))
    patches = torch.stack([sample.counts[0] for sample in samples])
    return Prediction(value, error, patches, stopped, samples, degrees=used - 1)


def _read(
    sampling: NestedAttentionSampling,
    head: Head,
    image: Images,
    look: Look,
    how: Drawing,
    regions: Tensor,  # (G, c, 2)
    going: Tensor,
    size: tuple[int, int],
    timed: Timed,
    generator: torch.Generator | None,
) -> _Chunk:
    some: Images = image if len(going) == len(image) else [image[number] for number in going.tolist()]
    ground = None if look.ground is None else look.ground.some(going)
    with timed(0, regions.shape[0] * regions.shape[1]):
        inner = sampling.look_into(1, some, regions, size, ground)
    features, levels = sampling.draw(some, inner, depth=1, how=how, generator=generator, timed=timed)
    kept = tuple(NestedSample(levels=levels, entropy=look.logits.new_zeros(1)).boxes().levels)
    return _Chunk(going, regions.shape[1], class_logits(head, features), kept)


def _centred(scores: Tensor, images: Tensor) -> Tensor:
    """Class logits without what all classes have in common, which decides nothing."""
    return scores - scores.mean(-1, keepdim=True) if scores.shape[-1] > 1 else scores


def _first_draws(outer: BoxSample, upto: int) -> BoxSample:
    """The first draws of every image, a draw of their own."""
    names = {name: getattr(outer, name) for name in vars(outer)}
    cut = {name: names[name][:, :upto] for name in ("indices", "log_attention", "offsets")}
    return BoxSample(**(names | cut))


def _estimate(
    chunks: list[_Chunk], outer: BoxSample, going: Tensor, change: Callable[[Tensor, Tensor], Tensor]
) -> LevelEstimate:
    """The estimate (G, C) of those images that are read on, and its variance."""
    value, variance, parts = zip(*(chunk.estimate(going, change) for chunk in chunks), strict=True)
    mine = BoxSample.cat([outer[number] for number in going.tolist()])
    inner = LevelEstimate(
        torch.cat(value, dim=1).flatten(0, 1),
        torch.cat(variance, dim=1).flatten(0, 1),
        torch.cat(parts, 2).flatten(1, 2),
    )
    return join_regions(inner, mine, estimator="unordered")


def _decided(chunks: list[_Chunk], outer: BoxSample, going: Tensor, value: Tensor, lead: float) -> Tensor:
    """Whether the best class (G,) leads every other by `lead` standard errors of their difference."""
    best = torch.zeros_like(value, dtype=torch.bool)
    if value.shape[-1] == 1:  # one logit, decided by its sign
        signs = value.sign()

        def ahead(scores: Tensor, images: Tensor) -> Tensor:
            return scores * signs[torch.searchsorted(going, images).clamp(max=len(going) - 1)][:, None, None]
    else:
        top = value.argmax(-1)
        best.scatter_(-1, top.unsqueeze(-1), True)

        def ahead(scores: Tensor, images: Tensor) -> Tensor:
            mine = top[torch.searchsorted(going, images).clamp(max=len(going) - 1)]  # whatever, of images that stopped
            index = mine.view(-1, 1, 1, 1).expand(*scores.shape[:-1], 1)
            return scores.gather(-1, index) - scores

    difference, variance, _ = _estimate(chunks, outer, going, ahead)
    return ((difference > lead * variance.sqrt()) | best).all(-1)


def _whole(
    sampling: NestedAttentionSampling, outer: BoxSample, chunks: list[_Chunk], number: int, count: int
) -> NestedSample:
    """All that was read of one image, of its first `count` regions."""
    mine = [chunk.of(number) for chunk in chunks if bool((chunk.images == number).any())]
    inner = [BoxSample.cat(parts) for parts in zip(*mine, strict=True)]
    # Chunks may have read on into draws that were left over, as regions once more; the first `count` are what counts.
    total = sum(chunk.count for chunk in chunks if bool((chunk.images == number).any()))
    inner = [level[: len(level) * count // total] for level in inner]
    levels = (_first_draws(outer[number], count), *inner)
    return NestedSample(levels=levels, entropy=sampling.tree_entropy(levels))
