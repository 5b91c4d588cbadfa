"""Images of anybody's, opened as a trained model takes them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ats.experiments.backbones import networks_of
from ats.experiments.console import say
from ats.experiments.image_kinds import Strange, check_kind, other_unit
from ats.experiments.levels import whole_cells
from ats.experiments.live_cells import live_cells
from ats.experiments.trained import TrainedModel, load
from ats.models import ATSClassifier
from ats.sources import ImageSource, open_image

DECODED = 1 << 26
"""Pixels up to which an image is read whole, in place of its view and patches alone."""


@dataclass(frozen=True)
class LookOptions:
    """How images of anybody's are looked at."""

    mpp: float | None = None
    """Micrometres a pixel of the images, in place of what they say."""
    view_scale: float | None = None
    """Size of the view relative to the image, e.g. for images of another magnification; default: as in training."""
    tissue: bool | None = None
    """Look at tissue alone, by its colour; default: as in training."""
    device: str = "cpu"
    """cpu, cuda, …"""


def load_and_say(checkpoint: Path) -> TrainedModel:
    """A trained model; where its run has not ended, a line says how far it has come."""
    trained = load(checkpoint)
    if trained.unfinished:
        say(f"note: {checkpoint} is not trained to its end: {trained.unfinished}", stderr=True)
    return trained


def load_for(checkpoint: Path, options: LookOptions) -> TrainedModel:
    """A trained model on the device asked for, with the view asked for.

    Raises:
        ValueError: a checkpoint that is none, a device that is not there, a model that has no view.
        FileNotFoundError: there is no checkpoint.
    """
    trained = on_device(load_and_say(checkpoint), options.device)
    if options.view_scale is None:
        return trained
    model = trained.config.model
    if model.method not in ("ats", "uniform"):
        raise ValueError(f"--view-scale is for attention sampling, not {model.method}")
    if model.nested:
        raise ValueError("--view-scale is for attention on one view; this model's levels have their own scales")
    if not 0 < options.view_scale <= 1:
        raise ValueError(f"--view-scale must be in (0, 1], got {options.view_scale}")
    config = replace(trained.config, model=replace(model, view_scale=options.view_scale))
    return replace(trained, config=config)


def on_device(trained: TrainedModel, device: str) -> TrainedModel:
    """Move a model to a device, or raise ValueError where that is none."""
    try:
        return trained.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch's for a device that it does not know or have
        raise ValueError(f"--device {device} cannot be used here: {error}") from error


def mask_for(trained: TrainedModel, source: ImageSource, mask: Path | None, options: LookOptions) -> Tensor | None:
    """Which cells of an image may be drawn, (1, gh, gw) bool on the model's device; None: all.

    Raises:
        ValueError: a mask that does not fit, or a model without attention on a view.
        FileNotFoundError: there is no such mask.
    """
    asked = getattr(trained.config.data, "tissue", False) if options.tissue is None else options.tissue
    if mask is None and not asked:
        return None
    model = trained.model
    placement = model.sampling.sampler.receptive_field if isinstance(model, ATSClassifier) else 0
    cells = live_cells(trained.config, placement, source, mask=mask, tissue=asked)
    if trained.config.model.nested:
        cells = whole_cells(cells, trained.config.model.nested[0], networks_of(trained.config))
    return cells[None].to(trained.device)


def check_for(trained: TrainedModel, path: str | os.PathLike[str], source: ImageSource) -> None:
    """Raise ValueError where an image, of which the header is read, has other bands or numbers than the model knows."""
    data = trained.config.data
    # Of a run that says its mean, but is from before this was kept, it is not known.
    dtype = getattr(data, "dtype", "") or ("" if getattr(data, "mean", ()) else "uint8")
    check_kind(str(path), source, data.channels, dtype, like="the model was trained on", to_grey=True)


def open_for(
    trained: TrainedModel, path: str | os.PathLike[str], mpp: float | None = None
) -> tuple[ImageSource, Tensor | list[ImageSource], Strange | None]:
    """An image file as it is, and as a batch of one for a trained model: a tensor, or itself where it is large.

    A grey picture becomes three equal channels and one in colours their mean, as the model needs it.

    Returns:
        The image, the batch, and what is strange about it, None where nothing is.

    Raises:
        ValueError: a file that cannot be read, or of other bands or numbers than the model knows.
        FileNotFoundError: it is not there.
    """
    source, wanted, data = open_image(path, mpp=mpp), trained.config.data.channels, trained.config.data
    check_for(trained, path, source)
    strange = other_unit(source, getattr(data, "mean", ()), getattr(data, "std", ()))
    full = source.levels[0]
    if source.channels == wanted and full.height * full.width > DECODED:
        return source, [source], strange
    image = source.read(0, 0, 0, full.height, full.width)
    if source.channels == 1 < wanted:
        image, strange = image.expand(3, -1, -1), Strange("grey", "it is grey, and read as three equal channels")
    elif source.channels == 3 > wanted:
        image = image.float().mean(0, keepdim=True).round().to(torch.uint8)
        strange = Strange("colours", "it is in colours, and read as their mean, grey")
    return source, image.unsqueeze(0).contiguous(), strange


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
