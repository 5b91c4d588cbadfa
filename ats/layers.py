"""The functions of `ats.functional` as modules; `ats.nn` has them."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from ats import functional
from ats._modules import SealedModule
from ats._renamed import renamed_attribute, renamed_option
from ats.batches import GridSizes, Images, Maps, Sizes
from ats.draw_options import DrawOptions
from ats.grid import Placement
from ats.overlap import warn_of_overlap
from ats.samples import CellSample, Estimator, PatchSample, Selection
from ats_kernels.checks import Normalisation, Padding, check_choice, check_count, check_flag, check_pair
from ats_kernels.patches.op import PADDINGS
from ats_kernels.pooling.op import check_estimator


class SamplePatches(DrawOptions):
    """`ats.sample_patches` as a module: forward(image, logits) -> `PatchSample`. All options may be changed later."""

    @renamed_option("method", "selection")
    def __init__(
        self,
        n_patches: int,
        patch_size: int | tuple[int, int],
        *,
        replace: bool = False,
        selection: Selection = "sample",
        allow_fewer: bool | None = None,
        receptive_field: int | Placement = 0,
        padding: Padding = "zeros",
        mean: Normalisation = None,
        std: Normalisation = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_patches = n_patches
        self.patch_size = patch_size
        self.selection = selection
        self.replace = replace
        if allow_fewer is not None:
            check_flag("allow_fewer", allow_fewer)
        self.allow_fewer = allow_fewer
        placed = isinstance(receptive_field, Placement)
        self.receptive_field = receptive_field if placed else check_count("receptive_field", receptive_field, least=0)
        self.padding = padding
        self.mean = mean
        self.std = std
        self.dtype = dtype

    @property
    def n_patches(self) -> int:
        """Patches an image."""
        return self._n_patches

    @n_patches.setter
    def n_patches(self, value: int) -> None:
        self._n_patches = check_count("n_patches", value)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (ph, pw); may be set to an int."""
        return self._patch_size

    @patch_size.setter
    def patch_size(self, value: int | tuple[int, int]) -> None:
        self._patch_size = check_pair("patch_size", value)

    @property
    def padding(self) -> Padding:
        """What is read outside an image: "zeros" or "edge"."""
        return self._padding

    @padding.setter
    def padding(self, value: Padding) -> None:
        check_choice("padding", value, PADDINGS)
        self._padding = value

    method = renamed_attribute("method", "selection")

    def forward(
        self,
        image: Images,
        logits: Maps,
        *,
        view_size: Sizes | None = None,
        mask: Maps | None = None,
        grid_sizes: Sequence[tuple[int, int]] | None = None,
        generator: torch.Generator | None = None,
    ) -> PatchSample:
        """Image (B, C, H, W) and logits (B, gh, gw) -> PatchSample. `view_size` is needed with a receptive_field.

        Both may be sequences, as in `ats.sample_patches`.
        """
        padded, own = functional.own_grids(image, logits, grid_sizes, view_size)
        cells = self.draw(padded, mask=mask, grid_sizes=own, generator=generator)
        warn_of_overlap(self, self, image, cells, view_size)
        return self.read(image, cells, view_size)

    def draw(
        self,
        logits: Maps,
        *,
        mask: Maps | None = None,
        grid_sizes: Sequence[tuple[int, int]] | None = None,
        generator: torch.Generator | None = None,
    ) -> CellSample:
        """Cells drawn from logits (B, gh, gw), of which nothing is read."""
        return functional.sample_cells(
            logits,
            self.n_patches,
            replace=self.replace,
            selection=self.selection,
            mask=mask,
            allow_fewer=self.allow_fewer,
            grid_sizes=grid_sizes,
            generator=generator,
        )

    def read(self, image: Images, cells: CellSample, view_size: Sizes | None = None) -> PatchSample:
        """The patches of drawn cells, read from images (B, C, H, W) or a sequence of them."""
        patches, offsets = self.read_cells(image, cells.readable(), cells.grid_size, view_size, cells.grid_sizes)
        return PatchSample.of(cells, patches, offsets)

    def read_cells(
        self,
        image: Images,
        indices: Tensor,
        grid_size: tuple[int, int],
        view_size: Sizes | None = None,
        grid_sizes: GridSizes = None,
    ) -> tuple[Tensor, Tensor]:
        """The patches (B, M, C, ph, pw) of cells (B, M) of a grid (gh, gw) on a view (h, w), and their offsets.

        `grid_sizes` are each image's own cells, where they differ: the top left part of the grid.
        """
        return functional.extract_cells(
            image,
            indices,
            grid_size,
            self.patch_size,
            grid_sizes=grid_sizes,
            view_size=view_size,
            receptive_field=self.receptive_field,
            padding=self.padding,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
        )

    def extra_repr(self) -> str:
        """What is drawn, and those options of reading that are not the default."""
        always = ("n_patches", "patch_size", "replace", "selection")
        shown = []
        for name, parameter in inspect.signature(SamplePatches).parameters.items():
            value = getattr(self, name)
            value = value.tolist() if hasattr(value, "tolist") else value
            if name in always or value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class Expectation(SealedModule):
    """`ats.expectation` as a module: forward(features, log_attention) -> pooled features (B, …)."""

    def __init__(
        self, *, replace: bool = False, estimator: Estimator = "ordered", control_variate: bool = False
    ) -> None:
        super().__init__()
        check_estimator(estimator, replace=replace)
        self.replace = replace
        self.estimator = estimator
        self.control_variate = control_variate

    def forward(self, features: Tensor, log_attention: Tensor) -> Tensor:
        """Features (B, N, …) and log_attention (B, N) -> (B, …)."""
        return functional.expectation(
            features,
            log_attention,
            replace=self.replace,
            estimator=self.estimator,
            control_variate=self.control_variate,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"replace={self.replace}, estimator={self.estimator!r}, control_variate={self.control_variate}"
