"""Pictures of the attention as training goes on, for loggers that take pictures."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from ats.batches import size_of
from ats.experiments.backbones import networks_of
from ats.experiments.callbacks import evaluating
from ats.experiments.experiment import ExperimentData
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.localisation import attention_map
from ats.models import ATSClassifier, MILClassifier, NestedClassifier
from ats.nn import AttentionSampling

MOST = 20
"""Pictures of an image in a training, at most."""
SIDE = 256
"""Pixels of a picture's longer side, about."""


class AttentionPictures(Callback):
    """Every few epochs, log where the model looks: a few images as it sees them, beside their attention.

    The images are of validation, or where there are none, of training, unchanged; they stay the same. Nothing is drawn,
    and no random number used. Only rank 0 looks. A model without attention, or uniform sampling, has no pictures.

    Args:
        every: epochs between pictures; more where that would be more than `MOST` in the whole training.
        images: how many.
    """

    def __init__(self, every: int, images: int = 4) -> None:
        self.every, self.images = every, images
        self._failed: set[int] = set()  # loggers, by their place in the trainer's list

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ClassificationTask)
        if not trainer.is_global_zero or not self._is_due(trainer) or not has_attention(pl_module):
            return
        loggers = [number for number, each in enumerate(trainer.loggers) if takes_pictures(each)]
        if not set(loggers) - self._failed:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with evaluating(pl_module), trainer.precision_plugin.forward_context():
            pictures = attention_pictures(pl_module, data, self.images)
        for number in set(loggers) - self._failed:
            try:
                log_pictures(trainer.loggers[number], pictures, trainer.global_step)
            except Exception as error:  # a service that is not there is no reason to lose a training
                self._failed.add(number)
                name = type(trainer.loggers[number]).__name__
                warnings.warn(f"{name} took no pictures of the attention, and gets no more: {error}", stacklevel=2)

    def _is_due(self, trainer: L.Trainer) -> bool:
        steps = max(1, int(trainer.num_training_batches))
        epochs = math.ceil(trainer.estimated_stepping_batches / steps)
        every = max(self.every, math.ceil(epochs / MOST))
        return (trainer.current_epoch + 1) % every == 0


def has_attention(task: ClassificationTask) -> bool:
    """Whether there is attention to make pictures of."""
    model = task.model
    if isinstance(model, ATSClassifier):
        return isinstance(model.sampling, AttentionSampling) and task.config.model.method == "ats"
    return isinstance(model, MILClassifier) or (
        isinstance(model, NestedClassifier) and task.config.model.method == "ats"
    )


@torch.no_grad()
def attention_pictures(task: ClassificationTask, data: ExperimentData, count: int) -> dict[str, Tensor]:
    """Pictures (3, h, w) uint8 of `count` images spread over a split, by name.

    Args:
        task: in evaluation mode.
        data: the images'.
        count: how many, or as many as there are.
    """
    split = "validation" if len(data.labels("validation")) else "train"
    images = len(data.labels(split))
    pictures = {}
    for index in sorted({number * images // count for number in range(count)}):
        at = torch.tensor([index], device=task.device)
        view, image, _ = data.load(split, at)
        view = view if isinstance(view, Tensor) else torch.stack(view)
        weights, offsets, patch_size = attention_map(task.model, view, image, data.masks(split, at))
        shown = seen(view[0], *networks_of(task.config).for_view)
        scale = [small / full for small, full in zip(shown.shape[-2:], size_of(image[0]), strict=True)]
        pictures[f"{split}-{index}"] = beside(shown, cells_over(shown, weights[0], offsets, patch_size, scale))
    return pictures


def seen(view: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """A view (C, h, w) as colours (3, h', w') in [0, 1], about `SIDE` pixels a side, before it was normalised."""
    if view.dtype == torch.uint8:
        view = view.float() / 255
    elif mean is not None and std is not None:
        view = view * view.new_tensor(std).view(-1, 1, 1) + view.new_tensor(mean).view(-1, 1, 1)
    view = view[:3].float() if view.shape[0] >= 3 else view[:1].float().expand(3, -1, -1)
    low, high = float(view.amin()), float(view.amax())
    if low < -0.01 or high > 1.01:  # no bytes: between the least and the most there is
        view = (view - low) / max(high - low, 1e-12)
    longer = max(view.shape[-2:])
    if longer > SIDE:
        size = [max(1, round(side * SIDE / longer)) for side in view.shape[-2:]]
        view = torch.nn.functional.interpolate(view[None], size, mode="area")[0]
    else:
        times = SIDE // longer
        view = view.repeat_interleave(times, -2).repeat_interleave(times, -1)
    return view.clamp(0, 1).cpu()


def cells_over(
    shown: Tensor, weights: Tensor, offsets: Tensor, patch_size: tuple[int, int], scale: Sequence[float]
) -> Tensor:
    """The attention (h, w) of each pixel's cell, relative to the largest.

    Args:
        shown: (3, h, w), an image's picture.
        weights: (K,) of the cells.
        offsets: (K, 2) top-left pixels of their patches, in the image.
        patch_size: pixels of these.
        scale: of the picture to the image, along both axes.
    """
    columns = int((offsets[:, 0] == offsets[0, 0]).sum())
    grid = weights.float().cpu().view(-1, columns)
    index = []
    for axis, cells in enumerate(grid.shape):
        first, last = float(offsets[0, axis]), float(offsets[-1, axis])
        step = (last - first) / (cells - 1) if cells > 1 else float(patch_size[axis])
        begin = first + patch_size[axis] / 2 - step / 2
        middles = (torch.arange(shown.shape[axis + 1], device="cpu") + 0.5) / scale[axis]
        index.append(((middles - begin) / step).floor().long().clamp(0, cells - 1))
    return grid[index[0].unsqueeze(1), index[1]] / grid.amax().clamp(min=1e-30)


def beside(shown: Tensor, attention: Tensor) -> Tensor:
    """A picture (3, h, w) in [0, 1], and on its right its attention (h, w) over it in grey: (3, h, 2·w + 4) uint8."""
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps["viridis"](attention.numpy())[..., :3]).float().movedim(-1, 0)
    over = 0.35 * shown.mean(0, keepdim=True) + 0.65 * colours
    gap = torch.ones(3, shown.shape[1], 4, device="cpu")
    return (torch.cat([shown, gap, over], -1) * 255).round().to(torch.uint8)


def takes_pictures(logger: Logger) -> bool:
    """Whether a logger of Lightning's takes pictures: TensorBoard, wandb, mlflow and comet do."""
    return _way(logger) is not None


def log_pictures(logger: Logger, pictures: dict[str, Tensor], step: int) -> None:
    """Give pictures (3, h, w) uint8 to a logger that takes them, as attention/NAME."""
    way, experiment = _way(logger), getattr(logger, "experiment", None)
    assert experiment is not None
    for name, picture in pictures.items():
        tag, pixels = f"attention/{name}", picture.movedim(0, -1).numpy()
        if way == "log_image":
            logger.log_image(tag, [pixels], step)  # type: ignore[attr-defined]
        elif way == "add_image":
            experiment.add_image(tag, picture, step)
        elif way == "mlflow":
            experiment.log_image(getattr(logger, "run_id", None), pixels, f"{tag}/{step:07d}.png")
        elif way == "comet":
            experiment.log_image(pixels, name=tag, step=step)


def _way(logger: Logger) -> str | None:
    if hasattr(logger, "log_image"):  # wandb's, and other people's
        return "log_image"
    named = {"TensorBoardLogger": "add_image", "MLFlowLogger": "mlflow", "CometLogger": "comet"}
    return next((way for kind in type(logger).__mro__ for name, way in named.items() if kind.__name__ == name), None)
