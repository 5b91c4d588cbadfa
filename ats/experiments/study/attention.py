"""How well a trained model's attention ranks what is to be found, and what perfect features would make of its draws."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from ats.diagnostics import relative_entropy
from ats.experiments.build import Classifier
from ats.experiments.experiment import ExperimentData
from ats.experiments.localisation import attention_map, shows
from ats.experiments.study.attention_oracle import draw_cells, draw_nested, oracle_errors
from ats.experiments.trained import TrainedModel
from ats.models import ATSClassifier, CNNClassifier, NestedClassifier
from ats.models.classifier import SamplingClassifier, SoftBound

SATURATED = 0.9
"""Of the bound: logits beyond it hardly move any more."""


@dataclass(frozen=True)
class AttentionOptions:
    """What is measured, and how well."""

    images: int | None = None
    """How many test images; default: as configured for the run."""
    n_patches: int | None = None
    """Patches a draw, and cells that are the best; default: what the model was trained with."""
    draws: int = 16
    """Draws of each image, from which perfect features read."""
    batches: int = 12
    """Batches of training images whose gradients are compared; 0: leave the gradient out."""
    copies: int = 2
    """Draws of each of these batches, a forward and a backward pass each."""
    seed: int = 0
    """Decides the draws and the batches."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name, least in (("images", 1), ("n_patches", 1), ("draws", 1), ("batches", 0), ("copies", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.batches == 1:
            raise ValueError("batches must be 0, to leave the gradient out, or at least 2: one batch has no spread")


@dataclass(frozen=True)
class AttentionFigures:
    """What was found; None where it is not defined for the run, and then `unknown` says why.

    Figures of maps are means over the `images_with_targets`, those of draws over all `images`.

    Attributes:
        n_patches: N, patches a draw.
        auc: the chance that a cell on target has more attention than one that is not; ties count half.
        auc_of_targets: the same of targets against what may be taken for one, by the best cell of each.
        mass, uniform_mass: attention on target; the same if it were spread evenly.
        best_on_target: of the N cells with most attention, how many are on target.
        targets: in an image.
        targets_among_best: of the N findings with most attention, how many are targets.
        targets_drawn: how many different ones a draw shows.
        drawn_on_target: share of drawn patches that show one.
        oracle_error: of perfect features behind this attention.
        error: of the model.
        signal_to_noise, signal_by_chance: of the attention's gradient, and what pure noise would give.
        noise_of_draws: share of the gradient's variance that is the draws', not the batches'.
        bound: of the logits, smooth.
        saturated, derivative: share of cells beyond 0.9 of the bound; mean derivative of the bound.
        saturated_on_target, derivative_on_target: the same of cells on target.
        entropy, relative_entropy: of the attention, nats; and over the largest that there is.
        unknown: why figures are None, by the name of the first.
    """

    images: int
    images_with_targets: int
    n_patches: int
    auc: float | None = None
    auc_of_targets: float | None = None
    mass: float | None = None
    uniform_mass: float | None = None
    best_on_target: float | None = None
    targets: float | None = None
    targets_among_best: float | None = None
    targets_drawn: float | None = None
    drawn_on_target: float | None = None
    oracle_error: float | None = None
    error: float | None = None
    signal_to_noise: float | None = None
    signal_by_chance: float | None = None
    noise_of_draws: float | None = None
    bound: float | None = None
    saturated: float | None = None
    derivative: float | None = None
    saturated_on_target: float | None = None
    derivative_on_target: float | None = None
    entropy: float | None = None
    relative_entropy: float | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_knows(trained: TrainedModel, data: ExperimentData) -> None:
    """Raise unless there is attention, and ground truth to compare it with."""
    if isinstance(trained.model, CNNClassifier):
        raise ValueError(f"{trained.config.model.label} has no attention; name a run of ats, uniform or Deep MIL")
    if type(data).findings is ExperimentData.findings:
        raise ValueError(
            f"where attention should be is not known of {trained.config.experiment}: its data say of no image where "
            "the evidence for its label is. This study is for data that do (megapixel-mnist, gigapixel-mnist, "
            "colon-cancer, speed-limits); of any run, `ats train --diagnostics.every 50` logs figures that need no "
            "ground truth"
        )


def set_patches(model: Classifier, n_patches: int | None, configured: int) -> int:
    """How many patches are drawn, or counted as the best; of a model that draws on one view it is set."""
    if isinstance(model, NestedClassifier):
        if n_patches is not None:
            raise ValueError("--n-patches is for attention on one view; this model draws as its levels say")
        return model.sampling.n_patches
    n_patches = configured if n_patches is None else n_patches
    if isinstance(model, ATSClassifier):
        model.sampling.n_patches = n_patches
    return n_patches


@torch.no_grad()
def map_figures(
    trained: TrainedModel,
    data: ExperimentData,
    options: AttentionOptions,
    n_patches: int,
    advance: Callable[[], None] = lambda: None,
) -> AttentionFigures:
    """All figures but the model's own error and the gradient's, image by image.

    Raises:
        ValueError: none of the images has a target.
    """
    model, device = trained.model, trained.device
    generator = torch.Generator(device).manual_seed(options.seed)
    images = len(data.labels("test")) if options.images is None else options.images
    maps: list[dict[str, float]] = []
    drawn: list[dict[str, float]] = []
    bound = _Bound(model)
    for index in range(images):
        at = torch.tensor([index], device=device)
        (view, image, label), mask = data.load("test", at), data.masks("test", at)
        findings = data.findings(index)
        with bound:
            attention, offsets, patch_size = attention_map(model, view, image, mask)
        weights = attention[0].double()
        inside = shows(offsets, patch_size, [finding.region for finding in findings])  # (K, F)
        target = torch.tensor([finding.region.target for finding in findings], dtype=torch.bool, device=device)
        if bool(target.any()):
            maps.append(rank(weights, inside, target, n_patches) | bound.figures(inside[:, target].any(-1)))
        if isinstance(model, SamplingClassifier):
            if isinstance(model, NestedClassifier):
                seen, share = draw_nested(model, view, image, mask, findings, options.draws, generator)
            else:
                assert isinstance(model, ATSClassifier)
                seen, share = draw_cells(model, attention[0], inside, options.draws, generator, mask is not None)
            errors = oracle_errors(
                seen,
                share,
                [finding.says for finding in findings],
                int(label[0]),
                trained.config.data.n_classes,
                data.class_of_nothing,
            )
            drawn.append({"oracle_error": float(errors.mean())})
            if bool(target.any()):
                on = seen[..., target]  # (R, N, T)
                drawn[-1] |= {"targets_drawn": float(on.any(1).double().sum(-1).mean())}
                drawn[-1] |= {"drawn_on_target": float(on.any(-1).double().mean())}
        advance()
    if not maps:
        raise ValueError(f"none of the {images} test images of {data.source} has a target; look at more with --images")
    unknown = {}
    if bound.limit is None:
        unknown["bound"] = "the attention's logits have no smooth bound (ats.models.classifier.SoftBound)"
    if not drawn:
        unknown["oracle_error"] = f"{trained.config.model.label} reads every patch: nothing is drawn"
    means = {name: value for row in (maps, drawn) for name, value in _means(row).items()}
    return AttentionFigures(
        images=images,
        images_with_targets=len(maps),
        n_patches=n_patches,
        bound=bound.limit,
        unknown=unknown,
        **means,
    )


def rank(weights: Tensor, inside: Tensor, target: Tensor, n: int) -> dict[str, float]:
    """How one image's attention ranks its cells and its findings.

    Args:
        weights: attention (K,) of the cells, float64; 0 where it may not look.
        inside: (K, F) bool, which cell's patch shows the centre of which finding.
        target: (F,) bool, which findings are targets.
        n: how many are the best.
    """
    on, live = inside[:, target].any(-1), weights > 0
    # A cell that shows a target and something else counts for the target alone.
    counted = inside & (target | ~on.unsqueeze(-1))
    scores = torch.where(counted, weights.unsqueeze(-1), 0.0).amax(0)  # (F,)
    ranked = counted.any(0) | target  # a target that no cell shows is the last; anything else is left out
    entropy = torch.special.entr(weights).sum()
    return {
        "auc": auc(weights[live], on[live]),
        "auc_of_targets": auc(scores[ranked], target[ranked]),
        "mass": float(weights[on].sum()),
        "uniform_mass": float(on[live].double().mean()),
        "best_on_target": among_best(weights[live], on[live], n),
        "targets": float(target.sum()),
        "targets_among_best": among_best(scores[ranked], target[ranked], n) if not bool(target.all()) else math.nan,
        "entropy": float(entropy),
        "relative_entropy": float(relative_entropy(entropy[None], int(live.sum()))[0]),
    }


def auc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive has a higher score than a negative, ties count half; NaN unless there are both.

    Args:
        scores: (K,) of at least 0.
        positive: (K,) bool.
    """
    if bool(positive.all()) or not bool(positive.any()):
        return math.nan
    relative = scores / scores.amax().clamp(min=1e-300)  # in [0, 1], where torchmetrics takes scores as they are
    return float(binary_auroc(relative, positive.long()))


def among_best(scores: Tensor, positive: Tensor, n: int) -> float:
    """How many of the n highest scores (K,) are positive (K,), on average over the order of equal ones."""
    n = min(n, len(scores))
    least = scores.topk(n).values[-1]
    above, level = scores > least, scores == least
    share = (n - int(above.sum())) / int(level.sum())
    return float((positive & above).sum() + share * (positive & level).sum())


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """By name the mean over the rows that know it."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
        found[name] = math.fsum(values) / len(values) if values else None
    return found


class _Bound:
    """Keeps what an attention network's smooth bound gave while it is entered."""

    def __init__(self, model: Classifier) -> None:
        network: nn.Module | None = None
        if isinstance(model, ATSClassifier):
            network = model.sampling.attention
        elif isinstance(model, NestedClassifier):
            network = model.sampling.zoom(0).attention
        layers = [] if network is None else [layer for layer in network.modules() if isinstance(layer, SoftBound)]
        self._layer = layers[-1] if layers else None
        self._logits: Tensor | None = None

    @property
    def limit(self) -> float | None:
        """Of the logits; None: there is no bound."""
        return None if self._layer is None else float(self._layer.limit)

    def __enter__(self) -> None:
        self._handle = None if self._layer is None else self._layer.register_forward_hook(self._keep)

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._logits = output

    def figures(self, on: Tensor) -> dict[str, float]:
        """Of one image, whose cells on target are `on` (K,)."""
        if self._logits is None or self.limit is None:
            return {}
        of_limit = self._logits.double().flatten() / self.limit  # tanh of what came in
        beyond, slope = (of_limit.abs() > SATURATED).double(), 1 - of_limit.square()
        values = {"saturated": float(beyond.mean()), "derivative": float(slope.mean())}
        if len(of_limit) == len(on) and bool(on.any()):
            values["saturated_on_target"] = float(beyond[on].mean())
            values["derivative_on_target"] = float(slope[on].mean())
        return values
