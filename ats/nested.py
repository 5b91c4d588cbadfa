"""Attention in attention: regions drawn from a coarse view, regions in them from finer views, patches in the last.

With attention a over the cells i of an image, b over the cells j of region i, and f of the patch,

    Φ = Σ_i a_i Σ_j b_ij f_ij            Φ̂ = Σ_k w_k Σ_l v_kl f_{i_k j_l}

w and v are the `ats.estimator_weights` of either draw. Given the regions, the inner sum is unbiased for φ_i, and
Σ_k w_k h_{i_k} is unbiased for Σ_i a_i h_i whatever h is; so by induction any number of levels is, forward and
backward: `ats.pool`, once a level. One level is `ats.nn.AttentionSampling`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats._modules import check_evaluating
from ats.batches import Images, Maps, Views
from ats.cells import check_drawable, sample_cells
from ats.draw_options import DrawOptions, EstimatorOption
from ats.nested_levels import Look, NestedLevels
from ats.nested_sample import NestedSample
from ats.pooling import pool
from ats.regions import Reading
from ats.samples import BoxSample, CellSample, Estimator, PatchSample, Selection
from ats.zoom import Zoom
from ats_kernels.checks import Normalisation, Padding, check_count
from ats_kernels.pixels import blames_pixels, check_cause


class Drawing(NamedTuple):
    """How cells are drawn: as many at each level, and as in `ats.sample_cells`."""

    n: tuple[int, ...]
    replace: bool
    selection: Selection
    allow_fewer: bool | None


Timed = Callable[[int, int], AbstractContextManager[None]]
"""Given a level and how many of its cells are read, what they are read in."""


class NestedAttentionSampling(NestedLevels, DrawOptions, EstimatorOption):
    """Attention on a coarse view draws regions, attention on each region's own view draws patches, at any depth.

    Args:
        levels: the `ats.nn.Zoom` of each level, the outermost first, scales falling.
        feature: network from patches (M, C, ph, pw), at full resolution, to features (M, …).
        patch_size: pixels, an int or (ph, pw).
        replace, selection, allow_fewer: as in `ats.sample_cells`, of every level.
        estimator, control_variate: as in `ats.expectation`, of every level.
        positions: call feature(patches, positions), as in `ats.nn.AttentionSampling`.
        padding, mean, std, dtype: as in `ats.read_patches`, of the patches and of all views that this module reads.

    `selection`, `replace`, `estimator` and the levels' `n` may be changed at any time. Batch normalisation in training
    mode makes the regions of a step depend on each other, as it does patches; group normalisation does not.
    """

    def __init__(
        self,
        levels: Sequence[Zoom],
        feature: nn.Module,
        patch_size: int | tuple[int, int],
        *,
        replace: bool = False,
        selection: Selection = "sample",
        allow_fewer: bool | None = None,
        estimator: Estimator = "ordered",
        control_variate: bool = False,
        positions: bool = False,
        padding: Padding = "zeros",
        mean: Normalisation = None,
        std: Normalisation = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        reading = Reading(padding, mean, std, dtype)
        super().__init__(levels, feature, patch_size, positions=positions, reading=reading)
        self.selection = selection
        self.replace = replace
        self.allow_fewer = allow_fewer
        self.estimator = estimator
        self.control_variate = control_variate

    @blames_pixels
    def forward(
        self,
        view: Views | None,
        image: Images,
        *,
        mask: Maps | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, NestedSample]:
        """View and image -> pooled features (B, …), logits of the first level (B, gh, gw), `NestedSample`.

        Args:
            view: (B, C, h, w) of the whole images at the first level's scale; a sequence of (C, h, w) where images
                are one; None to read it, which costs as much as the image is large. What a stride leaves over at the
                far edge is not seen: pad the view to whole cells, of which those beyond the image are not drawn.
            image: (B, C, H, W), or a sequence of (C, H, W) and image sources, which may differ in size.
            mask: bool, True where a cell may be drawn: (gh, gw) or (B, gh, gw) with an element a cell of the first
                level, or k×k of them, which then mask the cells of the other levels as well.
            generator: of the draws, on the logits' device.
        """
        look = self.look(view, image, mask)
        features, levels = self.draw(image, look, generator=generator)
        pooled = self.pool_levels(features, levels)
        check_cause("image", image, pooled)
        return pooled, look.logits, NestedSample(levels=levels, entropy=self.tree_entropy(levels))

    def drawing(self) -> Drawing:
        """How this module draws."""
        n = tuple(self.zoom(depth).n for depth in range(len(self.levels)))
        return Drawing(n, self.replace, self.selection, self.allow_fewer)

    def draw_cells(self, depth: int, look: Look, how: Drawing, generator: torch.Generator | None) -> CellSample:
        """The cells drawn at level `depth` from what it saw: all draws are made here."""
        return sample_cells(
            look.logits,
            how.n[depth],
            replace=how.replace,
            selection=how.selection,
            allow_fewer=look.fewer if how.allow_fewer is None else how.allow_fewer,
            grid_sizes=look.grids,
            generator=generator,
        )

    def draw(
        self,
        image: Images,
        look: Look,
        *,
        depth: int = 0,
        how: Drawing | None = None,
        generator: torch.Generator | None = None,
        timed: Timed = lambda level, cells: nullcontext(),
    ) -> tuple[Tensor, tuple[BoxSample, ...]]:
        """From what level `depth` saw: features (R, n, …) of patches in the last regions, and every draw from there on.

        Args:
            image: of as many images as `look` is of.
            how: in place of the module's own way of drawing.
            timed: what reading cells is measured by.
        """
        how = self.drawing() if how is None else how
        drawn: list[BoxSample] = []
        for level in range(depth, len(self.levels)):
            cells = self.draw_cells(level, look, how, generator)
            boxes, size = self.boxes(level, look, cells.readable())
            if level + 1 < len(self.levels):
                drawn.append(BoxSample(**vars(cells), offsets=boxes, patch_size=size))
                with timed(level, len(boxes) * boxes.shape[1]):
                    look = self.look_into(level + 1, image, boxes.view(len(image), -1, 2), size, look.ground)
        with timed(level, len(boxes) * boxes.shape[1]):
            patches, features = self.read_features(image, boxes)
        drawn.append(PatchSample.of(cells, patches, boxes))
        return features, tuple(drawn)

    def pool_levels(self, features: Tensor, levels: Sequence[CellSample]) -> Tensor:
        """Features (R, n, …) of the last level's patches -> (B, …), pooled level by level."""
        for depth in reversed(range(len(levels))):
            features = pool(features, levels[depth], estimator=self.estimator, control_variate=self.control_variate)
            if depth:
                features = features.unflatten(0, tuple(levels[depth - 1].indices.shape))
        return features

    def tree_entropy(self, levels: Sequence[CellSample]) -> Tensor:
        """H(a) + Σ_i a_i H(b_i) (B,) of all levels, of the drawn regions' entropies without bias."""
        entropy = levels[-1].entropy  # (R,)
        for depth in reversed(range(len(levels) - 1)):
            level = levels[depth]
            entropy = level.entropy + self.pool_levels(entropy.view(level.indices.shape), [level])
        return entropy

    @blames_pixels
    def full(self, view: Views | None, image: Images, *, mask: Maps | None = None, chunk_size: int = 1024) -> Tensor:
        """Φ (B, …) over all cells of all levels, `chunk_size` patches or regions at a time, the model without sampling.

        It looks into every region and reads every patch: for checks and small images. It works with gradients too.

        Raises:
            ValueError: a batch norm, a dropout or the like in training mode, for which the chunks would matter.
        """
        chunk_size = check_count("chunk_size", chunk_size)
        check_evaluating(sampling=self)
        total = self._whole(0, image, self.look(view, image, mask), chunk_size)
        check_cause("image", image, total)
        return total

    def _whole(self, depth: int, image: Images, look: Look, chunk_size: int) -> Tensor:
        """Σ_i a_i φ_i (R, …) of all cells of what a level saw."""
        check_drawable(look.logits)
        log_attention = look.logits.flatten(1).log_softmax(-1)  # (R, K)
        regions = len(log_attention)
        total: Tensor | None = None
        for some in torch.arange(log_attention.shape[1], device=log_attention.device).split(
            max(1, chunk_size // regions)
        ):
            boxes, size = self.boxes(depth, look, some.expand(regions, -1))
            if depth + 1 == len(self.levels):
                _, features = self.read_features(image, boxes)
            else:
                inner = self.look_into(depth + 1, image, boxes.view(len(image), -1, 2), size, look.ground)
                features = self._whole(depth + 1, image, inner, chunk_size).unflatten(0, (regions, len(some)))
            part = torch.einsum("bm,bm...->b...", log_attention[:, some].exp().to(features.dtype), features)
            total = part if total is None else total + part
        assert total is not None  # a grid has at least one cell
        return total

    def extra_repr(self) -> str:
        """What is drawn, and how."""
        names = "patch_size", "n_patches", "replace", "selection", "estimator"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
