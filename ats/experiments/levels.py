"""Nested attention from a configuration: `--model.levels 128:10 4:2` of any experiment whose `Networks` have a `level`.

`build.build_model` and `build.make_view` come here. A text is read by `level_options.read_levels`; `ModelConfig.nested`
has the levels, none where attention is flat. An experiment that keeps views itself makes them by `nested_view`: they
lie on whole pixels of the first level's scale, and are padded to whole cells.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ats.batches import Images
from ats.experiments.config import ModelConfig
from ats.experiments.level_options import LevelOptions
from ats.models.classifier import UniformAttention
from ats.models.networks import Networks
from ats.nn import NestedAttentionSampling, Zoom
from ats.regions import Reading, read_views


def level_stride(level: LevelOptions, networks: Networks) -> int:
    """View pixels a cell of a level."""
    return networks.stride if level.stride is None else level.stride


def build_levels(levels: Sequence[LevelOptions], networks: Networks, *, learned: bool) -> list[Zoom]:
    """The `ats.nn.Zoom` of each level, with fresh weights; not `learned`: attention that is the same everywhere.

    Raises:
        ValueError: networks that have none for levels, a context that does not fit a stride.
    """
    if networks.level is None:
        raise ValueError("these networks have none for model.levels; leave the option out")
    zooms = []
    for depth, level in enumerate(levels):
        stride = level_stride(level, networks)
        attention: nn.Module = networks.level(level.scale, stride) if learned else UniformAttention(stride)
        context = level.context
        if context is None:
            context = stride if depth else 0
        zooms.append(Zoom(attention, level.scale, level.n, context=context, receptive_field="auto" if learned else 0))
    return zooms


def build_sampling(model: ModelConfig, networks: Networks, feature: nn.Module) -> NestedAttentionSampling:
    """The nested sampling that options name, of an experiment's networks and a feature network.

    Raises:
        ValueError: networks of which views and patches are normalised differently, or that have none for levels.
    """
    if networks.for_view != (networks.mean, networks.std):
        raise ValueError(
            "with model.levels views and patches are normalised alike: have both model.attention and model.feature of "
            "timm's, or say by --data.mean and --data.std how"
        )
    return NestedAttentionSampling(
        build_levels(model.nested, networks, learned=model.method == "ats"),
        feature,
        model.patch_size,
        replace=model.replace,
        estimator=model.estimator,
        control_variate=model.control_variate,
        positions=model.positions,
        mean=networks.mean,
        std=networks.std,
    )


def nested_view(images: Images, level: LevelOptions, networks: Networks) -> Tensor | list[Tensor]:
    """What the first level sees of whole images: normalised (B, C, h, w), or a list of (C, h, w).

    Views have whole cells: what is missing to one is zeros, and cells that lie beyond the image are not drawn.
    """
    views = read_views(images, level.scale, Reading(mean=networks.mean, std=networks.std))
    stride = level_stride(level, networks)
    return _whole(views, stride) if isinstance(views, Tensor) else [_whole(view, stride) for view in views]


def nested_view_size(image_size: tuple[int, int], level: LevelOptions, networks: Networks) -> tuple[int, int]:
    """Pixels (h, w) of the `nested_view` of an image (H, W)."""
    side = level.scale * level_stride(level, networks)
    height, width = (-(-size // side) * level_stride(level, networks) for size in image_size)
    return height, width


def _whole(view: Tensor, stride: int) -> Tensor:
    """A view (…, h, w) with zeros below and to the right up to whole cells."""
    return F.pad(view, (0, -view.shape[-1] % stride, 0, -view.shape[-2] % stride))
