"""What a trained model is worth on images it has not seen."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from ats.experiments.checkpoints import read_checkpoint
from ats.experiments.console import plain_console
from ats.experiments.experiment import ExperimentData
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.registry import experiment_data, from_dict
from ats.inference import anytime
from ats.models import ATSClassifier


def load_task(checkpoint: Path) -> ClassificationTask:
    """A trained task from a checkpoint that `train` wrote, or a run's folder, ready to evaluate.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this project.
    """
    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}; `ats train` writes RUN/checkpoints/last.ckpt")
    content = read_checkpoint(checkpoint)
    try:
        values = content["hyper_parameters"]["config"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint that `ats train` wrote: it has no configuration") from error
    try:
        task = ClassificationTask(from_dict(values))
        task.load_state_dict(content["state_dict"])
        task.on_load_checkpoint(content)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} was written by another version of ats, or is damaged: {error}") from error
    return task.eval()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Error and loss on test images.

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
    task: ClassificationTask,
    *,
    method: Literal["sample", "topk", "anytime"] = "sample",
    n_patches: int | None = None,
    budget: int = 100,
    tolerance: float | None = None,
    lead: float | None = None,
    repeats: int = 1,
    images: int | None = None,
    folder: Path | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate on the test images of the task's configuration, on the task's device.

    Args:
        task: as `load_task` returns it.
        method: "sample"; "topk": the most probable cells; or "anytime": as many draws as each image needs.
        n_patches: patches an image; what it was trained with where None. Not with "anytime".
        budget, tolerance, lead: with "anytime", as in `ats.anytime`.
        repeats: draws an image; 1 is all that "topk" needs.
        images: how many of the test images; all where None.
        folder: of the data, where it is not the one that the run was trained with.
        batch_size: images at a time; by default 50, or 1 for models that read whole images.
        seed: of the draws.

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
    data = held_out_data(task, images, folder)
    if isinstance(task.model, ATSClassifier):
        if method == "anytime":
            classify = _Anytime(task.model, {"budget": budget, "tolerance": tolerance, "lead": lead})
            logits, labels = _logits(task, data, images, repeats, batch_size or 50, seed, classify)
            used = float(torch.cat(classify.used).double().mean())
            return _evaluation(logits, labels, data.source, method, used)
        with _sampling(task.model, method, n_patches) as count:
            logits, labels = _logits(task, data, images, repeats, batch_size or 50, seed)
        return _evaluation(logits, labels, data.source, method, count)
    name = task.config.model.method
    if (method, n_patches, repeats) != ("sample", None, 1):
        raise ValueError(f"{name} draws no patches: method, n_patches and repeats do not apply to it")
    logits, labels = _logits(task, data, images, repeats, batch_size or 1, seed)
    return _evaluation(logits, labels, data.source, name, 0)


def held_out_data(task: ClassificationTask, images: int | None, folder: Path | None) -> ExperimentData:
    """The data that a task is tested on; `images` and `folder` as in `evaluate`."""
    config = task.config.data
    if folder is not None:
        config = dataclasses.replace(config, folder=folder)
    if images is not None:
        config = config.with_test_images(images)
    data = experiment_data(dataclasses.replace(task.config, data=config))
    data.prepare_data()
    available = len(data.labels("test"))
    if images is not None and not 1 <= images <= available:
        raise ValueError(f"images must be between 1 and {available}, the test images that there are, got {images}")
    return data


class _Anytime:
    """Classify as `ats.anytime` does, and keep account of the patches used."""

    def __init__(self, model: ATSClassifier, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.used: list[Tensor] = []

    def __call__(self, view: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
        prediction = anytime(self.model.sampling, self.model.classify, view, image, generator=generator, **self.options)
        self.used.append(prediction.patches_used)
        return prediction.logits


@contextmanager
def _sampling(model: ATSClassifier, method: str, n_patches: int | None) -> Iterator[int]:
    """Set how patches are chosen for a while; gives the number of patches."""
    sampler = model.sampling.sampler
    before = sampler.n_patches, sampler.method, sampler.replace
    sampler.n_patches = sampler.n_patches if n_patches is None else n_patches
    sampler.method = method
    if method == "topk":  # distinct cells, whatever it was trained with
        sampler.replace = False
    try:
        yield sampler.n_patches
    finally:
        sampler.n_patches, sampler.method, sampler.replace = before


def _evaluation(logits: Tensor, labels: Tensor, source: str, method: str, n_patches: float) -> Evaluation:
    """From class logits (R, M, classes) of R draws, and labels (M,)."""
    repeats = len(logits)
    wrong = (logits.argmax(-1) != labels).double().mean(1)  # (R,)
    log_average = logits.log_softmax(-1).logsumexp(0) - torch.tensor(float(repeats), device="cpu").log()  # (M, classes)
    return Evaluation(
        data=source,
        method=method,
        n_patches=n_patches,
        images=len(labels),
        repeats=repeats,
        error=float(wrong.mean()),
        error_spread=float(wrong.std(correction=1)) if repeats > 1 else 0.0,
        loss=float(F.cross_entropy(logits.flatten(0, 1), labels.repeat(repeats))),
        averaged_error=float((log_average.argmax(-1) != labels).double().mean()),
        averaged_loss=float(F.nll_loss(log_average, labels)),
    )


def _logits(
    task: ClassificationTask,
    data: ExperimentData,
    images: int | None,
    repeats: int,
    batch_size: int,
    seed: int,
    classify: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Class logits (R, M, classes) in float64 of R draws for each of the M test images, and labels (M,)."""
    classify = classify or (lambda view, image, generator: task.model(view, image, generator=generator)[0])
    generator = torch.Generator(task.device).manual_seed(seed)
    logits, labels = [], []
    batches = torch.arange(images or len(data.labels("test")), device="cpu").split(batch_size)
    console = plain_console(stderr=True)
    # Where there is no terminal, all that is left of a bar is empty lines.
    for indices in track(batches, "evaluating", console=console, transient=True, disable=not console.is_terminal):
        view, image, label = data.load("test", indices.to(task.device))
        draws = [classify(view, image, generator).double() for _ in range(repeats)]
        logits.append(torch.stack(draws))
        labels.append(label)
    return torch.cat(logits, dim=1), torch.cat(labels)
