"""Predict with a trained model, and say how sure the prediction is.

The classifier is linear in the pooled features, so it may come before the pooling: the class logits of single patches
are pooled in their place, and `ats_kernels.pooling.variance` tells the standard error. Drawn without replacement, they
are pooled by the unordered estimator whatever the model was trained with: both estimate the same model without bias, it
with less variance.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ats_kernels
from ats.nn import AttentionSampling
from ats_kernels.checks import check_choice, check_count
from ats_kernels.pooling.op import check_estimator
from ats_kernels.pooling.variance import estimate
from ats_kernels.sampling.draws import METHODS

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prediction:
    """Class logits of B images, and what is known of their error.

    Attributes:
        logits: (B, C) float64, unbiased for the logits of the full model, which reads every cell (not with "topk").
        standard_error: (B, C) of the logits over draws, estimated; 0 where every cell was read. None where draws say
            nothing of the error: with "topk", or a single patch.
        patches_used: (B,) int64, patches read.
        stopped: (B,) bool, whether an image met a criterion before its budget was spent.
    """

    logits: Tensor
    standard_error: Tensor | None
    patches_used: Tensor
    stopped: Tensor

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper ends (B, C) of intervals that hold the full model's logits, each at this rate over draws.

        Student's t with patches_used − 1 degrees of freedom, which makes up for the estimated standard error as far as
        that can be: docs/inference.md gives the rates that were measured.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {confidence}; 0.95 covers 19 times in 20")
        if self.standard_error is None:
            raise ValueError("this prediction has no standard error: draw at least 2 patches by method='sample'")
        used = self.patches_used.tolist()
        quantiles = [student_quantile(confidence, patches - 1) for patches in used]
        half = self.standard_error.new_tensor(quantiles).unsqueeze(-1) * self.standard_error
        return self.logits - half, self.logits + half


@torch.no_grad()
def predict(
    sampling: AttentionSampling,
    head: Head,
    view: Tensor,
    image: Tensor,
    *,
    method: str = "sample",
    n_patches: int | None = None,
    replace: bool | None = None,
    estimator: str | None = None,
    repeats: int = 1,
    generator: torch.Generator | None = None,
) -> Prediction:
    """Class logits from a fixed number of patches an image.

    Args:
        sampling: the attention and feature networks, in evaluation mode. Networks of a loop of your own are wrapped by
            ``ats.nn.AttentionSampling(attention, feature, n_patches, patch_size)``.
        head: pooled features (M, …) -> class logits (M, C), linear (with a bias, where it has one).
        view: (B, C, h, w).
        image: (B, C, H, W).
        method: "sample", or "topk": the most probable cells, weighted by their attention, no randomness.
        n_patches: patches a draw; what `sampling` has where None.
        replace, estimator: of a draw, in place of `sampling`'s own replace, and of the unordered estimator without
            replacement; `sampling` is left as it is. The most probable cells have no use for them.
        repeats: independent draws to average. One draw of as many patches without replacement says more: it reads
            none twice.
        generator: of the draws, on the logits' device.

    Raises:
        ValueError: unknown options, a network in training mode, a head that is not linear, and what
            `ats.sample_patches` raises.
    """
    check_choice("method", method, METHODS)
    repeats = check_count("repeats", repeats)
    if method == "topk" and repeats > 1:
        raise ValueError(f"method='topk' draws nothing at random: repeats={repeats} would give the same every time")
    _check_evaluating(sampling)
    count = sampling.sampler.n_patches if n_patches is None else check_count("n_patches", n_patches)
    replace = (sampling.sampler.replace if replace is None else replace) and method == "sample"
    if estimator is None:
        estimator = "ordered" if replace else "unordered"
    check_estimator(estimator, replace=replace)
    logits = sampling.attention_logits(view, image)
    values, variances = [], []
    for _ in range(repeats):
        draw = ats_kernels.sample(logits.flatten(1), count, replace=replace, method=method, generator=generator)
        scores = _scores(sampling, head, view, image, draw.indices, logits)  # (B, N, C)
        if method == "topk" or count == 1:
            values.append(torch.einsum("bn,bnc->bc", draw.log_attention.double().softmax(-1), scores))
            continue
        value, variance = estimate(scores, draw.log_attention, replace=replace, estimator=estimator)
        values.append(value)
        variances.append(variance)
    batch = len(logits)
    return Prediction(
        logits=torch.stack(values).mean(0),
        standard_error=torch.stack(variances).sum(0).sqrt() / repeats if variances else None,
        patches_used=torch.full((batch,), repeats * count, device=logits.device),
        stopped=torch.zeros(batch, dtype=torch.bool, device=logits.device),
    )


@torch.no_grad()
def anytime(
    sampling: AttentionSampling,
    head: Head,
    view: Tensor,
    image: Tensor,
    *,
    budget: int,
    tolerance: float | None = None,
    lead: float | None = None,
    min_patches: int = 8,
    chunk_size: int = 2,
    generator: torch.Generator | None = None,
) -> Prediction:
    """Class logits from as many patches as each image needs: read on until sure enough, or the budget is spent.

    Cells are drawn without replacement, whatever the model was trained with, and each patch is read once: the first
    cells of a draw are themselves a draw, so that reading on only adds terms. Images of a batch stop one by one, each
    once it meets one of the criteria given, which are looked at after `min_patches` and then after every chunk.

    Args:
        sampling, head, view, image, generator: as in `predict`.
        budget: patches an image at most; more than there are cells reads them all, and gives the full model.
        tolerance: stop once the standard error of every class logit is at most this.
        lead: stop once the best class leads every other by this many standard errors of their difference: the
            prediction is decided. A single logit has to be that far from 0.
        min_patches: patches to read before a first look, at least 2. A standard error from few patches is often far
            too small: it is from patches that happen to agree.
        chunk_size: patches an image between looks.

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
    for name, limit in (("tolerance", tolerance), ("lead", lead)):
        if limit is not None and not 0 <= limit < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {limit}")
    _check_evaluating(sampling)
    logits = sampling.attention_logits(view, image)
    budget = min(budget, logits.flatten(1).shape[1])
    if budget < 2:
        raise ValueError(f"a budget of {budget} patch says nothing of the error; allow at least 2")
    draw = ats_kernels.sample(logits.flatten(1), budget, generator=generator)

    going = torch.arange(len(logits), device=logits.device)  # images still read on
    scores = torch.empty(0, device="cpu")  # (G, n, C) of their n patches so far
    result: tuple[Tensor, ...] | None = None
    looks = [*range(min(min_patches, budget), budget, chunk_size), budget]
    for before, upto in zip([0, *looks], looks, strict=False):
        more = _scores(sampling, head, view, image, draw.indices[going, before:upto], logits, going)
        scores = torch.cat([scores, more], dim=1) if before else more
        value, variance = estimate(scores, draw.log_attention[going, :upto], estimator="unordered")
        error = variance.sqrt()
        sure = torch.zeros_like(going, dtype=torch.bool)
        if tolerance is not None:
            sure |= (error <= tolerance).all(-1)
        if lead is not None:
            sure |= _decided(value, scores, draw.log_attention[going, :upto], lead)
        if result is None:  # the first look, at every image
            result = torch.empty_like(value), torch.empty_like(error), torch.empty_like(going), torch.empty_like(sure)
        done = sure if upto < budget else torch.ones_like(sure)
        for kept, new in zip(result, (value, error, torch.full_like(going, upto), sure), strict=True):
            kept[going[done]] = new[done]
        going, scores = going[~done], scores[~done]
        if not len(going):
            break
    assert result is not None
    return Prediction(*result)


def _decided(value: Tensor, scores: Tensor, log_attention: Tensor, lead: float) -> Tensor:
    """Whether the best class (B,) leads every other by `lead` standard errors of their difference."""
    if value.shape[-1] == 1:  # one logit, decided by its sign
        best = torch.zeros_like(value, dtype=torch.bool)
        ahead = scores * value.sign().unsqueeze(1)
    else:
        top = value.argmax(-1, keepdim=True)  # (B, 1)
        best = torch.zeros_like(value, dtype=torch.bool).scatter(-1, top, True)
        ahead = scores.gather(2, top.unsqueeze(1).expand(-1, scores.shape[1], -1)) - scores  # (B, N, C)
    difference, variance = estimate(ahead, log_attention, estimator="unordered")
    return ((difference > lead * variance.sqrt()) | best).all(-1)


def _scores(
    sampling: AttentionSampling,
    head: Head,
    view: Tensor,
    image: Tensor,
    indices: Tensor,  # (G, M) cells
    logits: Tensor,
    images: Tensor | None = None,  # (G,) which images they are of; all where None
) -> Tensor:
    """The class logits (G, M, C) of single patches, in float64."""
    grid, view_size = (logits.shape[-2], logits.shape[-1]), (view.shape[-2], view.shape[-1])
    if images is None or len(images) == len(image):
        patches, offsets = sampling.read_cells(image, indices, grid, view_size)
    else:  # slices, for choosing images by their numbers would copy them whole
        read = [
            sampling.read_cells(image[number : number + 1], cells.unsqueeze(0), grid, view_size)
            for number, cells in zip(images.tolist(), indices, strict=True)
        ]
        patches, offsets = (torch.cat(parts) for parts in zip(*read, strict=True))
    features = sampling.patch_features(patches, offsets, (image.shape[2], image.shape[3]))  # (G, M, …)
    scores = head(features.flatten(0, 1))
    if scores.ndim != 2 or len(scores) != indices.numel():
        raise ValueError(f"head must give class logits (M, C), got {tuple(scores.shape)} for M = {indices.numel()}")
    scores = scores.double().unflatten(0, tuple(indices.shape))  # (G, M, C)
    _check_linear(head, features, scores)
    return scores


def _check_linear(head: Head, features: Tensor, scores: Tensor) -> None:
    """Raise where the head of the mean is not the mean of the heads, or that of −8 times it what a line makes of it."""
    if not scores.isfinite().all():
        raise ValueError(
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


def _check_evaluating(sampling: AttentionSampling) -> None:
    if not isinstance(sampling, AttentionSampling):
        raise TypeError(
            f"sampling must be an ats.nn.AttentionSampling, got {type(sampling).__name__}; pass the model's own, e.g. "
            "model.sampling, or wrap its networks in one"
        )
    if sampling.training:
        raise ValueError(
            "the model is in training mode, where batch normalisation and dropout make a patch's features depend on "
            "what else is read; call model.eval() first"
        )


@functools.lru_cache(maxsize=4096)
def student_quantile(confidence: float, degrees: int) -> float:
    """How many standard errors either side of an estimate hold a share `confidence` of Student's t."""
    low, high = 0.0, 1.0  # of the angle θ = atan(t / √ν), in quarter turns
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle * math.pi / 2, degrees) < confidence else (low, middle)
    return math.tan(low * math.pi / 2) * math.sqrt(degrees)


def _student_within(angle: float, degrees: int) -> float:
    """P(|t| ≤ √ν tan θ) for whole ν (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for number in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * number / (number + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
