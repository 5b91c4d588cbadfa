"""The functions of `ats.functional` as modules, and the whole model with its attention and feature networks."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ats import functional
from ats._modules import check_evaluating, run_network
from ats._renamed import renamed_option
from ats.batches import GridSizes, Images, Maps, Sizes, Views, each_size, is_many, pad_logits, sizes_of
from ats.cells import check_drawable
from ats.draw_options import EstimatorOption
from ats.grid import Placement, patch_positions
from ats.layers import Expectation, SamplePatches
from ats.nested import NestedAttentionSampling
from ats.overlap import OverlapWarning, warn_of_overlap
from ats.probe import resolve_placement
from ats.samples import CellSample, Estimator, PatchSample, Selection
from ats.zoom import Zoom
from ats_kernels.backend import is_transformed
from ats_kernels.checks import Normalisation, Padding, check_count
from ats_kernels.pixels import blames_pixels, check_cause
from ats_kernels.pooling.op import check_estimator

__all__ = ["AttentionSampling", "Expectation", "NestedAttentionSampling", "OverlapWarning", "SamplePatches", "Zoom"]


class AttentionSampling(EstimatorOption):
    """Attention on a low-resolution view, features of the patches drawn from it, pooled without bias.

    Args:
        attention: network from the view (B, C, h, w) to logits (B, gh, gw) or (B, 1, gh, gw).
        feature: network from patches (M, C, ph, pw) to features (M, …); end it with an L2 normalisation, for which
            sampling from the attention has the least variance (paper, section 3.4).
        n_patches: patches an image.
        patch_size: pixels, an int or (ph, pw).
        replace, selection, allow_fewer, padding, mean, std, dtype: as in `ats.sample_patches`.
        estimator, control_variate: as in `ats.expectation`.
        receptive_field: where cells lie in the view: "auto" to measure it (`ats.measure_placement`), an
            `ats.Placement`, or the view pixels that the attention network loses along an axis. None is 0, cells that
            divide the view evenly, with a warning where the network's layers say that they do not.
        positions: tell the feature network where patches lie: it is called as feature(patches, positions), with
            positions (M, 2) the patches' centres (y, x) in [0, 1], see `ats.patch_positions` (paper, section 3.4).

    `n_patches`, `selection`, `replace` and `estimator` may be changed at any time, e.g. for evaluation.

    Images may be a tensor or a sequence of tensors (C, H, W) and `ats.ImageSource`s, views a tensor or a sequence of
    tensors (C, h, w), of any sizes. Attention runs once for all views of one size. Where grids differ, logits are
    padded with −inf at the bottom and on the right, and an image with fewer live cells than `n_patches` has all of them
    read (`allow_fewer`).

    Patches are read by `read_cells` alone, whatever they are read for: override it to read them from elsewhere.
    """

    @renamed_option("method", "selection")
    def __init__(
        self,
        attention: nn.Module,
        feature: nn.Module,
        n_patches: int,
        patch_size: int | tuple[int, int],
        *,
        replace: bool = False,
        selection: Selection = "sample",
        allow_fewer: bool | None = None,
        estimator: Estimator = "ordered",
        control_variate: bool = False,
        receptive_field: int | Placement | str | None = None,
        positions: bool = False,
        padding: Padding = "zeros",
        mean: Normalisation = None,
        std: Normalisation = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if positions:
            _check_takes_positions(feature)
        # The level of the warning: by way of what seals the module and takes the old name of an option.
        receptive_field = resolve_placement(attention, receptive_field, stacklevel=4)
        self.attention = attention
        self.feature = feature
        self.sampler = SamplePatches(
            n_patches,
            patch_size,
            replace=replace,
            selection=selection,
            allow_fewer=allow_fewer,
            receptive_field=receptive_field,
            padding=padding,
            mean=mean,
            std=std,
            dtype=dtype,
        )
        self.estimator = estimator
        self.control_variate = control_variate
        self.positions = positions

    @property
    def n_patches(self) -> int:
        """Patches an image."""
        return self.sampler.n_patches

    @n_patches.setter
    def n_patches(self, value: int) -> None:
        self.sampler.n_patches = value

    @property
    def selection(self) -> Selection:
        """How cells are chosen: "sample" or "topk"."""
        return self.sampler.selection

    @selection.setter
    def selection(self, value: Selection) -> None:
        self.sampler.selection = value

    @property
    def replace(self) -> bool:
        """Whether cells are drawn with replacement."""
        return self.sampler.replace

    @replace.setter
    def replace(self, value: bool) -> None:
        if value is True:
            check_estimator(self.estimator, replace=True)
        self.sampler.replace = value

    @blames_pixels
    def forward(
        self, view: Views, image: Images, *, mask: Maps | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, PatchSample]:
        """View (B, C, h, w) and image (B, C, H, W) -> pooled features (B, …), logits, PatchSample.

        Features are pooled by `ats.pool`. A `mask` (as in `ats.sample_cells`) is −inf in the logits that come back, and
        so is what they are padded with; the sample's `grid_sizes` are the images' own.
        """
        logits, grids = self.attend(view, image, mask=mask)
        pooled, sample = self._draw(image, logits, grids, sizes_of(view), mask, generator)
        return pooled, logits, sample

    def draw(
        self,
        image: Images,
        logits: Maps,
        view_size: Sizes,
        *,
        mask: Maps | None = None,
        grid_sizes: Sequence[tuple[int, int]] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, PatchSample]:
        """Image (B, C, H, W) and logits of its attention, on a view (h, w) -> pooled features (B, …), PatchSample.

        What `forward` does once attention is there; to draw again from attention that is. Of images whose grids differ,
        logits that `forward` gave go with ``grid_sizes=sample.grid_sizes``.
        """
        logits, grids = functional.own_grids(image, logits, grid_sizes, view_size)
        return self._draw(image, logits, grids, view_size, mask, generator)

    def _draw(
        self,
        image: Images,
        logits: Tensor,
        grids: GridSizes,
        view_size: Sizes,
        mask: Maps | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, PatchSample]:
        cells = self.sampler.draw(logits, mask=mask, grid_sizes=grids, generator=generator)
        if next(self.attention.parameters(), None) is not None:  # else it learns no place to look at
            warn_of_overlap(self, self.sampler, image, cells, view_size)
        sample = self.read_sample(image, cells, view_size)
        features = self.patch_features(sample.patches, sample.offsets, sizes_of(image))
        pooled = functional.pool(features, sample, estimator=self.estimator, control_variate=self.control_variate)
        check_cause("image", image, pooled)
        return pooled, sample

    def read_sample(self, image: Images, cells: CellSample, view_size: Sizes) -> PatchSample:
        """The patches of cells that were drawn on a view (h, w), or on views of as many sizes, read by `read_cells`."""
        patches, offsets = self.read_drawn(image, cells.readable(), cells, view_size)
        return PatchSample.of(cells, patches, offsets)

    def read_drawn(self, image: Images, indices: Tensor, cells: CellSample, view_size: Sizes) -> tuple[Tensor, Tensor]:
        """What `read_cells` reads of cells (B, M) on the grids of a draw."""
        if cells.grid_sizes is None:
            return self.read_cells(image, indices, cells.grid_size, view_size)
        return self.read_cells(image, indices, cells.grid_size, view_size, cells.grid_sizes)

    def attend(self, view: Views, image: Images, *, mask: Maps | None = None) -> tuple[Tensor, GridSizes]:
        """View and image -> logits (B, gh, gw) or (B, 1, gh, gw), masked and padded, and each image's own grid.

        The grids are None where all are the same.
        """
        logits, grids = pad_logits(self.attention_logits(view, image))
        logits = functional.mask_logits(logits, mask, grids)
        functional.check_inputs(image, logits, grids)
        return logits, grids

    def attention_logits(self, view: Views, image: Images) -> Maps:
        """View (B, C, h, w) and image (B, C, H, W) -> logits (B, gh, gw) or (B, 1, gh, gw).

        Of a sequence of views: a list of maps (gh, gw), for which the network runs once for all views of one size.
        """
        # Before the attention network runs: on an image in the view's place it would take long, or fail obscurely.
        functional.check_view(view, image, self.sampler.receptive_field)
        if isinstance(view, Tensor):
            return run_network("attention", self.attention, view)
        buckets: dict[torch.Size, list[int]] = {}
        for number, one in enumerate(view):
            buckets.setdefault(one.shape, []).append(number)
        maps: list[Tensor] = [view[0]] * len(view)  # each is put in its place below
        for numbers in buckets.values():
            logits = run_network("attention", self.attention, torch.stack([view[number] for number in numbers]))
            functional.check_logits(logits)
            for number, one in zip(numbers, logits.view(len(numbers), *logits.shape[-2:]), strict=True):
                maps[number] = one
        return maps

    def patch_features(self, patches: Tensor, offsets: Tensor, image_size: Sizes) -> Tensor:
        """Patches (B, M, C, ph, pw) at offsets (B, M, 2) of images of a size (H, W) -> features (B, M, …).

        Sizes may be one an image.
        """
        flat = patches.flatten(0, 1)
        arguments = [flat]
        if self.positions:
            size = self.sampler.patch_size
            if is_many(image_size):
                each = zip(offsets, each_size("image_size", image_size, len(offsets)), strict=True)
                positions = torch.cat([patch_positions(some, size, own) for some, own in each])
            else:
                positions = patch_positions(offsets, size, image_size).flatten(0, 1)
            arguments.append(positions.to(patches.dtype))
        features = run_network("feature", self.feature, *arguments)
        return features.unflatten(0, tuple(patches.shape[:2]))

    def read_cells(
        self,
        image: Images,
        indices: Tensor,
        grid_size: tuple[int, int],
        view_size: Sizes,
        grid_sizes: GridSizes = None,
    ) -> tuple[Tensor, Tensor]:
        """The patches (B, M, C, ph, pw) of cells (B, M) of a grid (gh, gw) on a view (h, w), and their offsets.

        All reading goes through here: of `forward`, `draw`, `full`, `ats.predict` and `ats.anytime`. `grid_sizes`,
        given only where they differ, are each image's own cells: the top left part of the grid.
        """
        return self.sampler.read_cells(image, indices, grid_size, view_size, grid_sizes)

    @blames_pixels
    def full(self, view: Views, image: Images, *, mask: Maps | None = None, chunk_size: int = 1024) -> Tensor:
        """Φ = Σ_i a_i f_i (B, …) over all K cells, `chunk_size` patches at a time: the model without sampling.

        It reads every live cell of an image: for checks and small images. It works with gradients too, for which the
        features of all chunks are kept; evaluate under ``torch.no_grad()`` where none are wanted.

        Raises:
            ValueError: a batch norm, a dropout or the like in training mode, for which the chunks would matter; logits
                that are NaN, an image with every cell masked, NaN or infinite pixels (looked for on the CPU only).
        """
        chunk_size = check_count("chunk_size", chunk_size)
        check_evaluating(sampling=self)
        logits, grids = self.attend(view, image, mask=mask)
        check_drawable(logits)
        if grids is None:
            total = self._full(logits, image, sizes_of(view), chunk_size)
        else:
            sizes = each_size("view_size", sizes_of(view), len(logits))
            rows = [logits[number : number + 1, :height, :width] for number, (height, width) in enumerate(grids)]
            parts = enumerate(zip(rows, sizes, strict=True))
            total = torch.cat([self._full(row, image[b : b + 1], size, chunk_size) for b, (row, size) in parts])
        check_cause("image", image, total)
        return total

    def _full(self, logits: Tensor, image: Images, view_size: Sizes, chunk_size: int) -> Tensor:
        grid = (logits.shape[-2], logits.shape[-1])
        log_attention = logits.flatten(1).log_softmax(-1)  # (B, K)
        # Masked cells are not read, for there may be nothing to read: another cell of the image takes their place.
        masked, instead = log_attention.isneginf(), log_attention.argmax(-1, keepdim=True)
        cells = torch.arange(masked.shape[1], device=logits.device)
        if not (logits.is_meta or torch.compiler.is_compiling() or is_transformed()):
            cells = cells[~masked.all(0)]
        batch = len(logits)
        total: Tensor | None = None
        for chunk in cells.split(max(1, chunk_size // batch)):
            indices = torch.where(masked[:, chunk], instead, chunk)  # (B, M)
            patches, offsets = self.read_cells(image, indices, grid, view_size)
            features = self.patch_features(patches, offsets, sizes_of(image))  # (B, M, …)
            attention = log_attention[:, chunk].exp().to(features.dtype)
            part = torch.einsum("bm,bm...->b...", attention, features)
            total = part if total is None else total + part
        assert total is not None  # every image has a live cell
        return total


def _check_takes_positions(feature: nn.Module) -> None:
    try:
        inspect.signature(feature.forward).bind(None, None)
    except TypeError:
        raise TypeError(
            "with positions=True the feature network is called as feature(patches, positions), which "
            f"{type(feature).__name__} does not take; give its forward both, or wrap it in "
            "ats.models.classifier.PlacedFeatures"
        ) from None
