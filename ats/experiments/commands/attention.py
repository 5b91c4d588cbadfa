"""`ats attention`: where a trained model looks in an image of yours."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from ats.datasets.image_files import read_image
from ats.experiments.build import make_view
from ats.experiments.evaluation import load_task
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.localisation import attention_map
from ats.experiments.plotting.overlay import Attention, draw_overlay
from ats.models import ATSClassifier


@dataclass(frozen=True)
class AttentionOptions:
    """A picture of where a trained model looks in an image, which may have any size."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, or its checkpoints/last.ckpt, as `ats train` wrote it."""
    image: tyro.conf.Positional[Path]
    """An image file."""
    output: Path = Path("attention.png")
    """Where the picture goes. A file that is there is not overwritten."""
    n_patches: int | None = None
    """Patches to draw; default: what the model was trained with. Deep MIL reads them all, and draws none."""
    seed: int = 0
    """Of the draw."""


@torch.no_grad()
def draw_image(options: AttentionOptions) -> str:
    """Draw the picture, and return what the model makes of the image.

    Raises:
        ValueError: a model without attention, an image that is too small for it.
        FileExistsError: there is a file where the picture would go.
    """
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there already; name another file with --output")
    task = load_task(options.checkpoint)
    image = _read(options.image, task)
    view = make_view(task.config, image)
    weights, offsets, patch_size = attention_map(task.model, view, image)
    if isinstance(task.model, ATSClassifier):
        sampler = task.model.sampling.sampler
        sampler.n_patches = sampler.n_patches if options.n_patches is None else options.n_patches
        if sampler.n_patches > weights.shape[1] and not sampler.replace:
            raise ValueError(
                f"the attention on {options.image}, {image.shape[2]}×{image.shape[3]} pixels, has {weights.shape[1]} "
                f"cells, too few for {sampler.n_patches} patches; choose fewer with --n-patches, or a larger image"
            )
    logits, sample = task.model(view, image, generator=torch.Generator().manual_seed(options.seed))
    drawn = [] if sample is None else [(int(top), int(left)) for top, left in sample.offsets[0].tolist()]
    said, probability = int(logits.argmax()), float(logits.softmax(-1).max())
    answer = f'class "{task.classes[said]}" with probability {probability:.2f}'
    title = f"{options.image.name}, {image.shape[2]}×{image.shape[3]}: {answer}"
    draw_overlay(image[0], Attention(weights[0], offsets, patch_size), options.output, title=title, drawn=drawn)
    return f"{answer}; where it looked: {options.output}"


def _read(path: Path, task: ClassificationTask) -> Tensor:
    """The image (1, C, H, W) uint8, with as many channels as the model takes."""
    image = read_image(path)
    if task.config.data.channels == 1:
        image = image.float().mean(0, keepdim=True).round().to(torch.uint8)
    return image.unsqueeze(0)
