"""What each way to predict with a trained model is worth, and whether the errors it states hold."""

import dataclasses
import hashlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ats.experiments.evaluation import held_out_data
from ats.experiments.trained import TrainedModel, checkpoint_of, load
from ats.inference import Prediction, anytime, predict
from ats.models import ATSClassifier

_BATCH = 50


@dataclass(frozen=True)
class InferenceOptions:
    """What is measured, on images that the model was not trained on."""

    images: int | None = None
    """How many test images; default: as configured for the run."""
    draws: int = 5
    """Draws of each image, for each way to predict."""
    n_patches: tuple[int, ...] = (10, 16, 25)
    """Fixed numbers of patches: ordered and unordered estimate, and the most probable ones."""
    lead: tuple[float, ...] = (2.0, 3.0)
    """anytime: standard errors that the best class must lead by."""
    tolerance: tuple[float, ...] = (0.5, 0.25, 0.1)
    """anytime: largest standard error of a class logit."""
    budget: int = 100
    """anytime: patches an image at most."""
    confidence: tuple[float, ...] = (0.95, 0.8)
    """Rates of the intervals that are looked at."""
    seed: int = 0
    """Decides the draws."""


@dataclass(frozen=True)
class Model:
    """Which model it was."""

    checkpoint: str
    sha256: str
    experiment: str
    preset: str
    method: str
    seed: int


@dataclass(frozen=True)
class Measurement:
    """What was measured with what: the options of the study's files."""

    inference: InferenceOptions
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Row:
    """One way to predict, with one model."""

    model: int  # from 1, in the order of the checkpoints
    way: str  # full, ordered, unordered, topk, lead or tolerance
    value: float  # patches, or what anytime inference stopped at
    patches: float  # read, the mean over images and draws
    error: float  # the mean over draws
    error_spread: float  # its standard deviation from draw to draw
    other_class: float  # share of images that get another class than from the full model
    coverage: dict[str, float] = field(default_factory=dict)  # by confidence, of the full model's class logits

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check(options: InferenceOptions) -> None:
    """Raise unless the options can be measured."""
    if options.draws < 1:
        raise ValueError(f"draws must be at least 1, got {options.draws}")
    if min(options.n_patches, default=2) < 2:
        raise ValueError(f"n_patches must be at least 2, which have a standard error, got {min(options.n_patches)}")
    for confidence in options.confidence:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), got {confidence}; 0.95 covers 19 times in 20")


def read_model(checkpoint: Path) -> tuple[Model, TrainedModel]:
    """A trained model that draws patches, and what it was trained as."""
    trained = load(checkpoint)
    config = trained.config
    if not isinstance(trained.model, ATSClassifier):
        raise ValueError(
            f"{checkpoint} is a {config.model.method}, which draws no patches; name a run of ats or uniform"
        )
    digest = hashlib.sha256(checkpoint_of(checkpoint).read_bytes()).hexdigest()
    method = config.model.label
    return Model(str(checkpoint), digest, config.experiment, config.preset, method, config.seed), trained


def ways(options: InferenceOptions) -> list[tuple[str, float]]:
    """Every way to predict that is measured, with its number."""
    fixed = [(way, float(n)) for way in ("ordered", "unordered", "topk") for n in options.n_patches]
    return [("full", 0.0), *fixed, *(("lead", x) for x in options.lead), *(("tolerance", x) for x in options.tolerance)]


@torch.no_grad()
def measure(
    number: int,
    trained: TrainedModel,
    options: InferenceOptions,
    folder: Path | None,
    advance: Callable[[float], None] = lambda share: None,
) -> list[Row]:
    """The rows of one model, whose patches are drawn without replacement whatever it was trained with."""
    data, model = held_out_data(trained, options.images, folder), trained.model
    assert isinstance(model, ATSClassifier)
    generator = torch.Generator().manual_seed(options.seed)
    images = len(data.labels("test")) if options.images is None else options.images
    counts = {way: [_Counts() for _ in range(_repeats(way, options))] for way in ways(options)}
    for indices in torch.arange(images, device="cpu").split(_BATCH):
        view, image, label = data.load("test", indices)
        full = _full(model, view, image)
        cells = int(full.patches_used[0])
        if max(options.n_patches, default=0) > cells:  # which would read them all, in a row of another name
            raise ValueError(f"n_patches must be at most the attention's {cells} cells, got {max(options.n_patches)}")
        for way, draws in counts.items():
            for count in draws:
                prediction = full if way[0] == "full" else _predict(model, way, view, image, options, generator)
                count.add(prediction, full.logits, label, options.confidence)
        advance(len(indices) / images)
    return [_row(number, way, draws, images) for way, draws in counts.items()]


def _repeats(way: tuple[str, float], options: InferenceOptions) -> int:
    return 1 if way[0] in ("full", "topk") else options.draws  # nothing is random


def _full(model: ATSClassifier, view: Tensor, image: Tensor) -> Prediction:
    logits = model.classify(model.sampling.full(view, image)).double()
    cells = model.sampling.attention_logits(view, image)[0].numel()
    return _fixed(logits, cells)


def _fixed(logits: Tensor, patches: int) -> Prediction:
    """A prediction without a standard error."""
    return Prediction(
        logits,
        None,
        torch.full((len(logits),), patches, device="cpu"),
        torch.zeros(len(logits), dtype=torch.bool, device="cpu"),
    )


def _predict(
    model: ATSClassifier,
    way: tuple[str, float],
    view: Tensor,
    image: Tensor,
    options: InferenceOptions,
    generator: torch.Generator,
) -> Prediction:
    kind, value = way
    inputs = model.sampling, model.classify, view, image
    if kind == "topk":
        return predict(*inputs, selection="topk", n_patches=int(value))
    if kind in ("ordered", "unordered"):
        drawn = predict(
            *inputs,
            n_patches=int(value),
            replace=False,
            estimator="ordered" if kind == "ordered" else "unordered",
            generator=generator,
        )
        return drawn if kind == "unordered" else dataclasses.replace(drawn, standard_error=None)
    lead, tolerance = (value, None) if kind == "lead" else (None, value)
    return anytime(*inputs, budget=options.budget, lead=lead, tolerance=tolerance, generator=generator)


class _Counts:
    """What is counted in one draw of the test images."""

    def __init__(self) -> None:
        self.wrong = self.other = self.patches = self.logits = 0
        self.covered: dict[str, int] = {}

    def add(self, prediction: Prediction, truth: Tensor, label: Tensor, confidences: Sequence[float]) -> None:
        said = prediction.logits.argmax(-1)
        self.wrong += int((said != label).sum())
        self.other += int((said != truth.argmax(-1)).sum())
        self.patches += int(prediction.patches_used.sum())
        self.logits += truth.numel()
        if prediction.standard_error is None:
            return
        for confidence in confidences:
            low, high = prediction.interval(confidence)
            inside = int(((low <= truth) & (truth <= high)).sum())
            self.covered[f"{confidence:g}"] = self.covered.get(f"{confidence:g}", 0) + inside


def _row(number: int, way: tuple[str, float], draws: Sequence[_Counts], images: int) -> Row:
    errors = [draw.wrong / images for draw in draws]
    logits = sum(draw.logits for draw in draws)
    return Row(
        number,
        *way,
        patches=sum(draw.patches for draw in draws) / (images * len(draws)),
        error=statistics.fmean(errors),
        error_spread=statistics.stdev(errors) if len(errors) > 1 else 0.0,
        other_class=sum(draw.other for draw in draws) / (images * len(draws)),
        coverage={name: sum(draw.covered[name] for draw in draws) / logits for name in draws[0].covered},
    )
