"""What a trained model is worth on images it has not seen."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ats.experiments.console import plain_console
from ats.experiments.experiment import Batch, ExperimentData
from ats.experiments.objectives import Objective
from ats.experiments.registry import experiment_data
from ats.experiments.trained import Method, TrainedModel, predict_with
from ats.models import SamplingClassifier


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Error and loss on test images, as the objective has them: of classes the share that is wrong and cross-entropy.

    `error` and `loss` are those of one draw of patches an image, averaged over `repeats` draws, and `error_spread`
    is the standard deviation of the error from draw to draw. `averaged_error` and `averaged_loss` are those of the
    class probabilities averaged over the draws. Deep MIL and CNNs draw nothing: for them `method` is their name,
    and `n_patches` 0. With "anytime" `n_patches` is the mean over images and draws. `data` says what the images are.
    """

    data: str
    method: str
    n_patches: float
    images: int
    repeats: int
    error: float
    error_spread: float
    loss: float
    averaged_error: float
    averaged_loss: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def evaluate(
    trained: TrainedModel,
    *,
    method: Method = "sample",
    n_patches: int | tuple[int, ...] | None = None,
    budget: int = 100,
    tolerance: float | None = None,
    lead: float | None = None,
    repeats: int = 1,
    images: int | None = None,
    folder: Path | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    data: ExperimentData | None = None,
) -> Evaluation:
    """Evaluate on the test images of a run's configuration, on the model's device. The model is left as it is.

    Args:
        trained: as `ats.load` returns it.
        method: "sample"; "topk": the most probable cells; or "anytime": as many draws as each image needs.
        n_patches: patches an image, of a nested model a number a level; what it was trained with where None. Not with
            "anytime".
        budget, tolerance, lead: with "anytime", as in `ats.anytime`.
        repeats: draws an image; 1 is all that "topk" needs.
        images: how many of the test images; all where None.
        folder: of the data, where it is not the one that the run was trained with.
        batch_size: images at a time; by default 50, or 1 for models that read whole images.
        seed: of the draws.
        data: as `held_out_data` returns it for the same images and folder, where it is there already.

    Raises:
        ValueError: options that the model has no use for, or out of range.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if method == "topk" and repeats > 1:
        raise ValueError(f"method='topk' draws nothing at random: repeats={repeats} would give the same every time")
    if method == "anytime" and n_patches is not None:
        raise ValueError(f"method='anytime' reads what an image needs: give it a budget, not n_patches={n_patches}")
    if method != "anytime" and (tolerance, lead) != (None, None):
        raise ValueError(f"a tolerance or a lead is for method='anytime', got method={method!r}")
    draws = isinstance(trained.model, SamplingClassifier)
    name = method if draws else trained.config.model.method
    if not draws and (method, n_patches, repeats) != ("sample", None, 1):
        raise ValueError(f"{name} draws no patches: method, n_patches and repeats do not apply to it")
    data = held_out_data(trained, images, folder) if data is None else data
    options: dict[str, Any] = {"n_patches": n_patches}
    if method == "anytime":
        options = {"budget": budget, "tolerance": tolerance, "lead": lead}
    generator = torch.Generator(trained.device).manual_seed(seed)
    logits, labels, used = [], [], []
    for view, image, label, mask in _batches(data, images, batch_size or (50 if draws else 1), trained.device):
        predictions = [
            predict_with(trained.model, view, image, mask=mask, method=method, generator=generator, **options)
            for _ in range(repeats)
        ]
        logits.append(torch.stack([prediction.logits for prediction in predictions]))
        used.append(torch.stack([prediction.patches_used for prediction in predictions]))
        labels.append(label)
    patches = torch.cat(used, dim=1)  # (R, M)
    same = method != "anytime" and bool((patches == patches[0, 0]).all())  # else: as many as each image needs, or has
    number = int(patches[0, 0]) if same else float(patches.double().mean())
    truth = torch.cat(labels)
    return _evaluation(torch.cat(logits, dim=1), truth, trained.config.data.objective, data.source, name, number)


def held_out_data(trained: TrainedModel, images: int | None, folder: Path | None) -> ExperimentData:
    """The data that a model is tested on; `images` and `folder` as in `evaluate`."""
    config = trained.config.data
    if folder is not None:
        config = dataclasses.replace(config, folder=folder)
    if images is not None:
        config = config.with_test_images(images)
    data = experiment_data(dataclasses.replace(trained.config, data=config))
    data.prepare_data()
    available = len(data.labels("test"))
    if images is not None and not 1 <= images <= available:
        raise ValueError(f"images must be between 1 and {available}, the test images that there are, got {images}")
    return data


def _evaluation(
    logits: Tensor, labels: Tensor, objective: Objective, source: str, method: str, n_patches: float
) -> Evaluation:
    """From outputs (R, M, C) of R draws, and what is true (M, …)."""
    repeats = len(logits)
    wrong = torch.stack([objective.errors(draw, labels).double().mean() for draw in logits])  # (R,)
    losses = torch.stack([objective.losses(draw, labels).mean() for draw in logits])
    average = objective.averaged(logits)  # (M, C)
    return Evaluation(
        data=source,
        method=method,
        n_patches=n_patches,
        images=len(labels),
        repeats=repeats,
        error=float(wrong.mean()),
        error_spread=float(wrong.std(correction=1)) if repeats > 1 else 0.0,
        loss=float(losses.mean()),
        averaged_error=float(objective.errors(average, labels).double().mean()),
        averaged_loss=float(objective.losses(average, labels).mean()),
    )


def _batches(data: ExperimentData, images: int | None, size: int, device: torch.device) -> Iterator[Batch]:
    """The first test images, with a bar that shows how far it is."""
    batches = torch.arange(images or len(data.labels("test")), device="cpu").split(size)
    console = plain_console(stderr=True)
    # Where there is no terminal, all that is left of a bar is empty lines.
    for indices in track(batches, "evaluating", console=console, transient=True, disable=not console.is_terminal):
        on_device = indices.to(device)
        yield Batch(*data.load("test", on_device), data.masks("test", on_device))
