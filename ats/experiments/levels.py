"""Nested attention from a configuration: `--model.levels 128:10 4:2` of any experiment whose `Networks` have a `level`.

`build.build_model` and `build.make_view` come here. A text is read by `level_options.read_levels`; `ModelConfig.nested`
has the levels, none where attention is flat. An experiment that keeps views itself makes them by `nested_view`: they
lie on whole pixels of the first level's scale, and are padded to whole cells.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ats.batches import Images, size_of
from ats.experiments.config import ModelConfig
from ats.experiments.level_options import LevelOptions
from ats.models.classifier import UniformAttention
from ats.models.networks import Networks
from ats.nn import NestedAttentionSampling, Zoom
from ats.regions import Reading, read_views
from ats.sources import ImageSource
from ats.sources.view_cache import cached_view


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
    if not isinstance(images, Tensor):
        return [whole_cells(normalised(plain_view(each, level), networks), level, networks) for each in images]
    views = read_views(images, level.scale, Reading())
    assert isinstance(views, Tensor)
    return whole_cells(normalised(_brightened(views, size_of(images[0]), level.scale), networks), level, networks)


def plain_view(image: Tensor | ImageSource, level: LevelOptions, *, cache: Path | None = None) -> Tensor:
    """What the first level sees of an image, as read: (C, h, w), each pixel the mean of what the image has of it.

    Args:
        image: (C, H, W), or a source.
        level: the first.
        cache: folder that keeps the views of sources.
    """

    def read() -> Tensor:
        (view,) = read_views([image], level.scale, Reading())
        return _brightened(view, (height, width), level.scale)

    height, width = size_of(image)
    if cache is None or isinstance(image, Tensor):
        return read()
    # Of a name of its own: other views begin with the coarsest level that suits, counted from the finest.
    return cached_view(cache, image, -1, (-(-height // level.scale), -(-width // level.scale)), read)


def normalised(view: Tensor, networks: Networks) -> Tensor:
    """A view (…, C, h, w) as the networks of levels see it."""
    if networks.mean is None or networks.std is None:
        return view
    mean, std = (view.new_tensor(values).view(-1, 1, 1) for values in (networks.mean, networks.std))
    return (view - mean) / std


def _brightened(view: Tensor, size: tuple[int, int], scale: int) -> Tensor:
    """A view whose last pixels reach out of the image, into zeros, with the mean of what is in it."""
    rows, columns = size[0] % scale, size[1] % scale
    if rows:
        view[..., -1, :] *= scale / rows
    if columns:
        view[..., -1] *= scale / columns
    return view


def nested_view_size(image_size: tuple[int, int], level: LevelOptions, networks: Networks) -> tuple[int, int]:
    """Pixels (h, w) of the `nested_view` of an image (H, W)."""
    side = level.scale * level_stride(level, networks)
    height, width = (-(-size // side) * level_stride(level, networks) for size in image_size)
    return height, width


def whole_cells(view: Tensor, level: LevelOptions, networks: Networks) -> Tensor:
    """A view or a mask (…, h, w) with zeros below and to the right up to whole cells."""
    stride = level_stride(level, networks)
    return F.pad(view, (0, -view.shape[-1] % stride, 0, -view.shape[-2] % stride))
