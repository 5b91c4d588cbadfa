"""What a trained model is worth on images it has not seen."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ats.experiments.config import from_dict
from ats.experiments.data import MegapixelMNISTData
from ats.experiments.task import ClassificationTask


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
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        values = content["hyper_parameters"]["config"]
    except Exception as error:
        raise ValueError(f"{checkpoint} is not a checkpoint that `ats train` wrote ({error!r})") from error
    try:
        task = ClassificationTask(from_dict(values))
        task.load_state_dict(content["state_dict"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} was written by another version of ats: {error}") from error
    return task.eval()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Error and loss on test images.

    `error` and `loss` are those of one draw of patches an image, averaged over `repeats` draws, and `error_spread`
    is the standard deviation of the error from draw to draw. `averaged_error` and `averaged_loss` are those of the
    class probabilities averaged over the draws.
    """

    method: str
    n_patches: int
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
    method: Literal["sample", "topk"] = "sample",
    n_patches: int | None = None,
    repeats: int = 1,
    images: int | None = None,
    mnist: Path | None = None,
    batch_size: int = 50,
    seed: int = 0,
) -> Evaluation:
    """Evaluate on the test images of the task's configuration, on the task's device.

    Args:
        task: as `load_task` returns it.
        method: "sample", or "topk": the most probable cells.
        n_patches: patches an image; what it was trained with where None.
        repeats: draws an image; 1 is all that "topk" needs.
        images: how many of the test images; all where None.
        mnist: folder of MNIST's files, where it is not the one that the run was trained with.
        batch_size: images at a time.
        seed: of the draws.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if method == "topk" and repeats > 1:
        raise ValueError(f"method='topk' draws nothing at random: repeats={repeats} would give the same every time")
    data = task.config.data
    data = dataclasses.replace(data, test_images=data.test_images if images is None else images)
    data = dataclasses.replace(data, mnist=data.mnist if mnist is None else mnist)
    test = MegapixelMNISTData(dataclasses.replace(task.config, data=data))
    test.prepare_data()
    sampler = task.model.sampling.sampler
    before = sampler.n_patches, sampler.method, sampler.replace
    sampler.n_patches = sampler.n_patches if n_patches is None else n_patches
    sampler.method = method
    if method == "topk":  # distinct cells, whatever it was trained with
        sampler.replace = False
    try:
        logits, labels = _logits(task, test, repeats, batch_size, seed)
        used = sampler.n_patches
    finally:
        sampler.n_patches, sampler.method, sampler.replace = before
    wrong = (logits.argmax(-1) != labels).double().mean(1)  # (R,)
    log_average = logits.log_softmax(-1).logsumexp(0) - torch.tensor(float(repeats)).log()  # (M, classes)
    return Evaluation(
        method=method,
        n_patches=used,
        images=len(labels),
        repeats=repeats,
        error=float(wrong.mean()),
        error_spread=float(wrong.std(correction=1)) if repeats > 1 else 0.0,
        loss=float(F.cross_entropy(logits.flatten(0, 1), labels.repeat(repeats))),
        averaged_error=float((log_average.argmax(-1) != labels).double().mean()),
        averaged_loss=float(F.nll_loss(log_average, labels)),
    )


def _logits(
    task: ClassificationTask, data: MegapixelMNISTData, repeats: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Class logits (R, M, classes) in float64 of R draws for each of the M test images, and labels (M,)."""
    generator = torch.Generator(task.device).manual_seed(seed)
    logits, labels = [], []
    batches = torch.arange(len(data.split("test"))).split(batch_size)
    for indices in track(batches, description="evaluating", console=Console(stderr=True), transient=True):
        view, image, label = data.load("test", indices.to(task.device))
        draws = [task.model(view, image, generator=generator)[0].double() for _ in range(repeats)]
        logits.append(torch.stack(draws))
        labels.append(label)
    return torch.cat(logits, dim=1), torch.cat(labels)
