"""Images of anybody's, opened as a trained model takes them."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ats.experiments.trained import TrainedModel
from ats.sources import ImageSource, open_image

DECODED = 1 << 26
"""Pixels up to which an image is read whole, in place of its view and patches alone."""


def open_for(
    trained: TrainedModel, path: str | os.PathLike[str], mpp: float | None = None
) -> tuple[ImageSource, Tensor | list[ImageSource]]:
    """An image file as it is, and as a batch of one for a trained model: a tensor, or itself where it is large.

    Grey becomes three equal channels and colours their mean, as the model needs it.

    Raises:
        ValueError: a file that cannot be read, or of other channels or another depth than the model knows.
        FileNotFoundError: it is not there.
    """
    source, wanted, data = open_image(path, mpp=mpp), trained.config.data.channels, trained.config.data
    if source.dtype != torch.uint8 and not getattr(data, "mean", ()):
        raise ValueError(f"{path} holds {source.dtype}, and the model was trained on bytes; convert the image")
    if source.channels != wanted and (source.channels, wanted) not in ((1, 3), (3, 1)):
        raise ValueError(f"{path} has {source.channels} channels, and the model was trained on {wanted}")
    full = source.levels[0]
    if source.channels == wanted and full.height * full.width > DECODED:
        return source, [source]
    image = source.read(0, 0, 0, full.height, full.width)
    if source.channels == 1 < wanted:
        image = image.expand(3, -1, -1)
    elif source.channels == 3 > wanted:
        image = image.float().mean(0, keepdim=True).round().to(torch.uint8)
    return source, image.unsqueeze(0).contiguous()


def answer(trained: TrainedModel, outputs: Tensor) -> str:
    """What outputs (C,) say, in words: a class, labels separated by ";", or a number."""
    task = getattr(trained.config.data, "task", "classes")
    if task == "value":
        return f"{float(outputs[0]):.6g}"
    if task == "labels":
        return ";".join(name for name, logit in zip(trained.classes, outputs.tolist(), strict=True) if logit > 0)
    return trained.classes[int(outputs.argmax())]


def probabilities(trained: TrainedModel, outputs: Tensor) -> Sequence[float]:
    """One for each class or label (C,); none for a value."""
    task = getattr(trained.config.data, "task", "classes")
    if task == "value":
        return []
    return (outputs.sigmoid() if task == "labels" else outputs.softmax(-1)).tolist()
