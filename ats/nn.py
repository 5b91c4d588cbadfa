"""The functions of `ats.functional` as modules, and the whole model with its attention and feature networks."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ats import functional
from ats.grid import Placement, patch_positions
from ats.probe import measure_placement, shifting_layer
from ats.samples import Estimator, PatchSample, Selection
from ats_kernels.checks import Normalisation, check_choice, check_count, check_pair
from ats_kernels.patches.op import PADDINGS
from ats_kernels.pooling.op import check_estimator
from ats_kernels.sampling.draws import METHODS


class SamplePatches(nn.Module):
    """`ats.sample_patches` as a module: forward(image, logits) -> `PatchSample`."""

    def __init__(
        self,
        n_patches: int,
        patch_size: int | tuple[int, int],
        *,
        replace: bool = False,
        method: Selection = "sample",
        receptive_field: int | Placement = 0,
        padding: str = "zeros",
        mean: Normalisation = None,
        std: Normalisation = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("method", method, METHODS)
        check_choice("padding", padding, PADDINGS)
        self.n_patches = check_count("n_patches", n_patches)
        self.patch_size = check_pair("patch_size", patch_size)
        self.replace = replace
        self.method: Any = method
        self.receptive_field = check_count("receptive_field", receptive_field, least=0)
        self.padding = padding
        self.mean = mean
        self.std = std
        self.dtype = dtype

    def forward(
        self,
        image: Tensor,
        logits: Tensor,
        *,
        view_size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> PatchSample:
        """Image (B, C, H, W) and logits (B, gh, gw) -> PatchSample. `view_size` is needed with a receptive_field."""
        return functional.sample_patches(
            image,
            logits,
            self.n_patches,
            replace=self.replace,
            selection=self.method,
            view_size=view_size,
            generator=generator,
            **self.reading(),
        )

    def reading(self) -> dict[str, Any]:
        """The options that say how patches are read, wherever they lie."""
        return {
            name: getattr(self, name) for name in ("patch_size", "receptive_field", "padding", "mean", "std", "dtype")
        }

    def extra_repr(self) -> str:
        """What is drawn, and those options of reading that are not the default."""
        always = ("n_patches", "patch_size", "replace", "method")
        shown = []
        for name, parameter in inspect.signature(SamplePatches).parameters.items():
            value = getattr(self, name)
            value = value.tolist() if hasattr(value, "tolist") else value
            if name in always or value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class Expectation(nn.Module):
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


class AttentionSampling(nn.Module):
    """Attention on a low-resolution view, features of the patches drawn from it, pooled without bias.

    Args:
        attention: network from the view (B, C, h, w) to logits (B, gh, gw) or (B, 1, gh, gw).
        feature: network from patches (M, C, ph, pw) to features (M, …); end it with an L2 normalisation, for which
            sampling from the attention has the least variance (paper, section 3.4).
        n_patches: patches an image.
        patch_size: pixels, an int or (ph, pw).
        replace, method, padding, mean, std, dtype: as in `ats.sample_patches`.
        estimator, control_variate: as in `ats.expectation`.
        receptive_field: where cells lie in the view: "auto" to measure it (`ats.measure_placement`), an
            `ats.Placement`, or the view pixels that the attention network loses along an axis. None is 0, cells that
            divide the view evenly, with a warning where the network's layers say that they do not.
        positions: tell the feature network where patches lie: it is called as feature(patches, positions), with
            positions (M, 2) the patches' centres (y, x) in [0, 1], see `ats.patch_positions` (paper, section 3.4).

    `sampler.n_patches`, `sampler.method` and `sampler.replace` may be changed at any time, e.g. for evaluation.
    """

    def __init__(
        self,
        attention: nn.Module,
        feature: nn.Module,
        n_patches: int,
        patch_size: int | tuple[int, int],
        *,
        replace: bool = False,
        method: Selection = "sample",
        estimator: Estimator = "ordered",
        control_variate: bool = False,
        receptive_field: int | Placement | str | None = None,
        positions: bool = False,
        padding: str = "zeros",
        mean: Normalisation = None,
        std: Normalisation = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_estimator(estimator, replace=replace)
        if positions:
            _check_takes_positions(feature)
        if isinstance(receptive_field, str):
            if receptive_field != "auto":
                raise ValueError(f"receptive_field must be an int, 'auto' or an ats.Placement, got {receptive_field!r}")
            receptive_field = measure_placement(attention)
        elif receptive_field is None:
            receptive_field = 0
            if layer := shifting_layer(attention):
                warnings.warn(
                    f"patches may lie beside the cells: {layer} in the attention network shifts or shrinks its grid, "
                    "but receptive_field was not given, and is 0 by default; pass receptive_field='auto' to measure "
                    "where cells lie, or 0 to keep this",
                    stacklevel=2,
                )
        self.attention = attention
        self.feature = feature
        self.sampler = SamplePatches(
            n_patches,
            patch_size,
            replace=replace,
            method=method,
            receptive_field=receptive_field,
            padding=padding,
            mean=mean,
            std=std,
            dtype=dtype,
        )
        self.estimator = estimator
        self.control_variate = control_variate
        self.positions = positions

    def forward(
        self, view: Tensor, image: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, PatchSample]:
        """View (B, C, h, w) and image (B, C, H, W) -> pooled features (B, …), logits, PatchSample.

        The most probable cells ("topk") are no random draw: they are pooled by their attention, scaled to sum to 1.
        """
        logits = self.attention_logits(view, image)
        pooled, sample = self.draw(image, logits, (view.shape[-2], view.shape[-1]), generator=generator)
        return pooled, logits, sample

    def draw(
        self,
        image: Tensor,
        logits: Tensor,
        view_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, PatchSample]:
        """Image (B, C, H, W) and logits of its attention, on a view (h, w) -> pooled features (B, …), PatchSample.

        What `forward` does once attention is there; to draw again from attention that is.
        """
        sample = self.sampler(image, logits, view_size=view_size, generator=generator)
        features = self.patch_features(sample.patches, sample.offsets, (image.shape[2], image.shape[3]))
        pooled = functional.pool(features, sample, estimator=self.estimator, control_variate=self.control_variate)
        return pooled, sample

    def attention_logits(self, view: Tensor, image: Tensor) -> Tensor:
        """View (B, C, h, w) and image (B, C, H, W) -> logits (B, gh, gw) or (B, 1, gh, gw)."""
        # Before the attention network runs: on an image in the view's place it would take long, or fail obscurely.
        functional.check_view(view, image, self.sampler.receptive_field)
        return self.attention(view)

    def patch_features(self, patches: Tensor, offsets: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Patches (B, M, C, ph, pw) at offsets (B, M, 2) of images of a size (H, W) -> features (B, M, …)."""
        flat = patches.flatten(0, 1)
        if self.positions:
            positions = patch_positions(offsets, self.sampler.patch_size, image_size).flatten(0, 1)
            features = self.feature(flat, positions.to(patches.dtype))
        else:
            features = self.feature(flat)
        return features.unflatten(0, tuple(patches.shape[:2]))

    def read_cells(
        self, image: Tensor, indices: Tensor, grid_size: tuple[int, int], view_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The patches (B, M, C, ph, pw) of cells (B, M) of a grid (gh, gw) on a view (h, w), and their offsets."""
        return functional.extract_cells(image, indices, grid_size, view_size=view_size, **self.sampler.reading())

    def full(self, view: Tensor, image: Tensor, *, chunk_size: int = 1024) -> Tensor:
        """Φ = Σ_i a_i f_i (B, …) over all K cells, `chunk_size` patches at a time: the model without sampling.

        It reads K patches an image: for checks and small images. It works with gradients too, for which the
        features of all chunks are kept; evaluate under ``torch.no_grad()`` where none are wanted.
        """
        logits = self.attention_logits(view, image)
        grid = (logits.shape[-2], logits.shape[-1])
        log_attention = logits.flatten(1).log_softmax(-1)  # (B, K)
        cells = torch.arange(log_attention.shape[1], device=logits.device)
        batch = logits.shape[0]
        total: Tensor | None = None
        for some in cells.split(max(1, chunk_size // batch)):
            indices = some.expand(batch, -1)  # (B, M)
            patches, offsets = self.read_cells(image, indices, grid, (view.shape[-2], view.shape[-1]))
            features = self.patch_features(patches, offsets, (image.shape[2], image.shape[3]))  # (B, M, …)
            attention = log_attention[:, some].exp().to(features.dtype)
            part = torch.einsum("bm,bm...->b...", attention, features)
            total = part if total is None else total + part
        assert total is not None  # a grid has at least one cell
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
