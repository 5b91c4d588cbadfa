"""`ats attention`: where a trained model looks in an image of yours."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from ats.datasets.image_files import read_image
from ats.experiments.localisation import attention_map
from ats.experiments.plotting.overlay import Attention, draw_overlay
from ats.experiments.trained import TrainedModel, load
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
    """Decides the draw."""


@torch.no_grad()
def draw_image(options: AttentionOptions) -> str:
    """Draw the picture, and return what the model makes of the image.

    Raises:
        ValueError: a model without attention, an image that is too small for it.
        FileExistsError: there is a file where the picture would go.
    """
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there already; name another file with --output")
    trained = load(options.checkpoint)
    image = _read(options.image, trained)
    view = trained.view(image)
    weights, offsets, patch_size = attention_map(trained.model, view, image)
    count = None
    if isinstance(trained.model, ATSClassifier):
        sampling = trained.model.sampling
        count = sampling.n_patches if options.n_patches is None else options.n_patches
        if count > weights.shape[1] and not sampling.replace:
            raise ValueError(
                f"the attention on {options.image}, {image.shape[2]}×{image.shape[3]} pixels, has {weights.shape[1]} "
                f"cells, too few for {count} patches; choose fewer with --n-patches, or a larger image"
            )
    generator = torch.Generator().manual_seed(options.seed)
    prediction = trained.predict(image, n_patches=count, generator=generator)
    drawn = [(int(patch["top"]), int(patch["left"])) for patch in prediction.table()]
    chosen, probability = int(prediction.logits.argmax()), float(prediction.logits.softmax(-1).max())
    answer = f'class "{trained.classes[chosen]}" with probability {probability:.2f}'
    title = f"{options.image.name}, {image.shape[2]}×{image.shape[3]}: {answer}"
    draw_overlay(image[0], Attention(weights[0], offsets, patch_size), options.output, title=title, drawn=drawn)
    return f"{answer}; where it looked: {options.output}"


def _read(path: Path, trained: TrainedModel) -> Tensor:
    """The image (1, C, H, W) uint8, with as many channels as the model takes."""
    image = read_image(path)
    if trained.config.data.channels == 1:
        image = image.float().mean(0, keepdim=True).round().to(torch.uint8)
    return image.unsqueeze(0)
