"""From a configuration to a model with fresh weights, and to the size of what it looks at."""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from ats.batches import Images
from ats.experiments.backbones import networks_of
from ats.experiments.config import ExperimentConfig
from ats.experiments.levels import build_sampling, nested_view, nested_view_size
from ats.experiments.objectives import Classes
from ats.functional import area_downsample
from ats.models import (
    ATSClassifier,
    CNNClassifier,
    EvidenceClassifier,
    MILClassifier,
    NestedClassifier,
    UniformAttention,
)
from ats.models.classifier import PlacedFeatures
from ats.nn import AttentionSampling
from ats.probe import measure_placement
from ats.sources import ImageSource, read_view

Classifier = ATSClassifier | NestedClassifier | MILClassifier | CNNClassifier


def build_model(config: ExperimentConfig) -> Classifier:
    """The networks that a configuration names, with fresh weights from torch's random numbers.

    Raises:
        ValueError: the experiment has no such networks, or no classes for an evidence head.
    """
    if config.model.evidence != "none" and not isinstance(config.data.objective, Classes):
        raise ValueError(
            "model.evidence asks which class a patch speaks for, and the task is no class: leave it out, or set "
            "model.evidence=none"
        )
    model = _build(config)
    model.head = config.data.objective.head(model.head)
    return model


def _build(config: ExperimentConfig) -> Classifier:
    model, n_classes, networks = config.model, config.data.n_classes, networks_of(config)
    if model.method == "cnn":
        if networks.image is None:
            raise ValueError(f"{config.experiment} has no CNN; choose another model.method, e.g. ats")
        layers, n_features = networks.image(model.cnn_channels)
        return CNNClassifier(layers, n_features, n_classes)
    if model.method in ("mil", "gated-mil"):
        feature = networks.feature(normalised=False)
        return MILClassifier(
            feature,
            networks.size_of(feature),
            n_classes,
            patch_size=model.patch_size,
            grid_step=model.grid_step,
            gated=model.method == "gated-mil",
            chunk_size=model.grid_chunk,
            mean=networks.mean,
            std=networks.std,
        )
    learned = model.method == "ats"
    feature = networks.feature(normalised=not model.positions)
    n_features = networks.size_of(feature)
    if model.positions:
        feature = PlacedFeatures(feature, n_features)
    if model.nested:
        nested = build_sampling(model, networks, feature)
        return NestedClassifier(nested, n_features, n_classes, model.feature_scale)
    attention: nn.Module = UniformAttention(networks.stride, networks.lost)
    if learned:
        attention = networks.attention()
    try:
        placed = measure_placement(attention) if learned else networks.lost
    except ValueError as error:
        if not model.attention:
            raise
        raise ValueError(
            f"model.attention {model.attention} has no cells that look at a part of the view each: choose a network of "
            f"convolutions that pad by fixed numbers, e.g. timm:resnet18 ({error})"
        ) from error
    sampling = AttentionSampling(
        attention,
        feature,
        model.n_patches,
        model.patch_size,
        replace=model.replace,
        estimator=model.estimator,
        control_variate=model.control_variate,
        receptive_field=placed,
        positions=model.positions,
        mean=networks.mean,
        std=networks.std,
    )
    kind = ATSClassifier if model.evidence == "none" else EvidenceClassifier
    return kind(sampling, n_features, n_classes, model.feature_scale)


def patch_features(model: Classifier) -> nn.Module | None:
    """The network from patches to features; a CNN has none."""
    if isinstance(model, CNNClassifier):
        return None
    return model.sampling.feature if isinstance(model, ATSClassifier | NestedClassifier) else model.feature


def view_size(config: ExperimentConfig, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Pixels (h, w) of the view of an image, in whole cells of the attention's grid; None: the image itself."""
    model = config.model
    if model.method in ("mil", "gated-mil"):
        return None
    if model.method == "cnn":
        height, width = (max(1, round(size * model.cnn_scale)) for size in image_size)
        return height, width
    networks = networks_of(config)
    if model.nested:
        return nested_view_size(image_size, model.nested[0], networks)
    return networks.view_size(image_size, model.view_scale)


@overload
def make_view(config: ExperimentConfig, image: Tensor) -> Tensor: ...
@overload
def make_view(config: ExperimentConfig, image: Sequence[Tensor | ImageSource]) -> Tensor | list[Tensor]: ...
def make_view(config: ExperimentConfig, image: Images) -> Tensor | list[Tensor]:
    """What a model looks at of images (B, C, H, W): normalised (B, C, h, w), or the images themselves.

    Of a sequence of images, in memory or on disk, it is a list where their views differ in size.
    """
    if config.model.nested:
        views = nested_view(image, config.model.nested[0], networks_of(config))
        return views if isinstance(views, Tensor) else stacked(views)
    if not isinstance(image, Tensor):
        return stacked([_view_of_one(config, one) for one in image])
    size = view_size(config, (image.shape[2], image.shape[3]))
    if size is None:
        return image
    mean, std = networks_of(config).for_view
    return area_downsample(image, size, mean=mean, std=std)


def _view_of_one(config: ExperimentConfig, image: Tensor | ImageSource) -> Tensor:
    if isinstance(image, Tensor):
        return make_view(config, image[None])[0]
    size = view_size(config, (image.levels[0].height, image.levels[0].width))
    if size is None:
        raise ValueError(f"{config.model.method} reads whole images: {image.name} must be in memory, as a tensor")
    return normalise(config, read_view(image, size=size))


def normalise(config: ExperimentConfig, view: Tensor) -> Tensor:
    """A view (C, h, w) as the model takes it, from one as `read_view` gives it; bytes, Deep MIL's images, stay."""
    means, stds = networks_of(config).for_view
    if means is None or stds is None or not view.is_floating_point():
        return view
    mean, std = (view.new_tensor(values).view(-1, 1, 1) for values in (means, stds))
    return (view - mean) / std


def stacked(maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """One tensor (B, …) where all have one shape, else a list."""
    return torch.stack(list(maps)) if len({each.shape for each in maps}) == 1 else list(maps)
