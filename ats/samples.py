"""What a draw is, before and after its patches are read, and how it was drawn.

`CellSample` is a draw of cells, `BoxSample` one that knows the pixels its cells stand for, `PatchSample` one whose
patches were read. All are immutable records of B images with N draws each, and pytrees of their tensors: they go
through ``torch.export``, a ``DataLoader``, ``torch.save`` and ``torch.load(weights_only=True)``.
"""

import copy
import csv
import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from ats._files import write_whole
from ats.paths import user_path
from ats_kernels import estimator_weights
from ats_kernels.checks import Estimator as Estimator

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

Selection = Literal["sample", "topk"]


class PatchTable(list[dict[str, int | float]]):
    """Rows of patches as dictionaries, one a drawn patch: what ``pandas.DataFrame`` and ``csv.DictWriter`` take."""

    def to_csv(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a CSV file with a header, whole or not at all.

        Raises:
            FileExistsError: there is a file already, and not `overwrite`.
            ValueError: there are no rows to write.
        """
        target = user_path(path)
        if not self:
            raise ValueError(f"there are no patches to write to {target}")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} is there already; name another file, or pass overwrite=True")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(self[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self)
        write_whole(target, text.getvalue().encode())


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CellSample:
    """Cells drawn from the attention on B images, N from each, in draw order.

    ``len(sample)`` is the number of images. ``sample[i]`` is image i alone, still with a batch dimension, of 1, so that
    everything that takes a sample takes it; slices and iteration give samples as well.

    Attributes:
        indices: (B, N) int64, flat cells of the row-major attention grid; −1 at a surplus draw.
        log_attention: (B, N) log probability of each cell under the attention; differentiable. −inf at a surplus draw.
        logsumexp: (B,) of the logits.
        entropy: (B,) of the attention, nats; differentiable.
        replace: whether cells were drawn with replacement.
        selection: "sample", or "topk": the most probable cells, without randomness.
        grid_size: cells (gh, gw) of the attention. Where grids differ, the common one that `indices` are cells of.
        grid_sizes: where grids differ, each image's own (gh, gw): the top left part of `grid_size`. None: all of it.
        padded: whether an image with fewer than N live cells may be among them. All of its cells were drawn, and the
            draws left over, its surplus, weigh nothing: its estimate is exact.
    """

    indices: Tensor
    log_attention: Tensor
    logsumexp: Tensor
    entropy: Tensor
    replace: bool
    selection: Selection
    grid_size: tuple[int, int]
    padded: bool = False
    grid_sizes: tuple[tuple[int, int], ...] | None = None

    _tensors: ClassVar[tuple[str, ...]]  # the names of its fields that are tensors, and of the others
    _static: ClassVar[tuple[str, ...]]

    if TYPE_CHECKING:
        # At run time iteration goes by __getitem__: what walks into every Iterable, as Lightning does to find the
        # batch size, would never come to an end in images that are samples themselves.
        def __iter__(self) -> "Iterator[Self]": ...

    def __len__(self) -> int:
        """Images."""
        return len(self.indices)

    def __getitem__(self, key: int | slice) -> "Self":
        """Some of the images, as a sample."""
        if isinstance(key, slice):
            return self._some(key)
        if isinstance(key, bool) or not hasattr(key, "__index__"):
            raise TypeError(f"a sample is indexed by an image's number or a slice, got {type(key).__name__}")
        number = key.__index__()
        if not -len(self) <= number < len(self):
            raise IndexError(f"image {number} of a sample of {len(self)}")
        return self._some(slice(number % len(self), number % len(self) + 1))

    def _some(self, key: slice) -> "Self":
        some = self._map(lambda tensor: tensor[key])
        return some if self.grid_sizes is None else dataclasses.replace(some, grid_sizes=self.grid_sizes[key])

    def own_grids(self) -> tuple[tuple[int, int], ...]:
        """Cells (gh, gw) of each image's own grid."""
        return (self.grid_size,) * len(self) if self.grid_sizes is None else self.grid_sizes

    def __repr__(self) -> str:
        sizes = {"images": len(self), "n": self.indices.shape[1]}
        how = (sizes | self._how()).items()
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in how if v is not None)})"

    @classmethod
    def cat(cls, samples: "Iterable[Self]") -> "Self":
        """One sample of all images of several, which were drawn alike.

        Raises:
            ValueError: there are none, or they differ in how they were drawn, in N, in their grid or their patch size.
        """
        every = list(samples)
        if not every:
            raise ValueError("cat needs at least one sample")
        first = every[0]
        for other in every[1:]:
            if type(other) is not type(first) or other._alike() != first._alike():
                raise ValueError(
                    f"samples that are put together must be drawn alike, got {first!r} and {other!r}; keep those that "
                    "differ in a list"
                )
        changes: dict[str, Any] = {name: torch.cat([getattr(s, name) for s in every]) for name in first._tensors}
        if any(sample.grid_sizes for sample in every):
            changes["grid_sizes"] = tuple(grid for sample in every for grid in sample.own_grids())
        return dataclasses.replace(first, **changes, padded=any(sample.padded for sample in every))

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> "Self":
        """The sample on a device, and what of it is floating point in a dtype, which may also come first."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device

        def move(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=kind, non_blocking=non_blocking)

        return self._map(move)

    def cpu(self) -> "Self":
        """The sample in the host's memory."""
        return self.to("cpu")

    def detach(self) -> "Self":
        """The sample without its graph, sharing its memory."""
        return self._map(torch.Tensor.detach)

    def pin_memory(self) -> "Self":
        """The sample in page-locked memory, as ``DataLoader(pin_memory=True)`` asks for it."""
        return self._map(torch.Tensor.pin_memory)

    @property
    def surplus(self) -> Tensor:
        """(B, N) bool: draws that an image had no live cell left for; they are to be left out."""
        return (self.indices < 0) & self.log_attention.isneginf()

    @property
    def counts(self) -> Tensor:
        """(B,) int64: draws of each image without its surplus."""
        return (~self.surplus).sum(-1)

    def readable(self) -> Tensor:
        """Indices (B, N) int64 of cells to read: at a surplus draw the image's first once more.

        Its features weigh nothing. A batch norm is shown nothing that is not there, and an image is never empty.
        """
        return torch.where(self.surplus, self.indices[:, :1], self.indices) if self.padded else self.indices

    def weights(self, estimator: Estimator = "ordered") -> Tensor:
        """The weights (B, N) with which `ats.pool` pools features of this sample; constants to autograd.

        Args:
            estimator: as in `ats.expectation`. The most probable cells ("topk") are no random draw: they are weighted
                by their attention, scaled to sum to 1, whatever the estimator.
        """
        if self.selection == "topk":
            return self.log_attention.detach().softmax(-1)
        if not self.padded:
            return estimator_weights(self.log_attention, replace=self.replace, estimator=estimator)
        short, log_attention = self.split_short()
        weights = estimator_weights(log_attention, replace=self.replace, estimator=estimator)
        return torch.where(short, self.log_attention.detach().exp().to(weights.dtype), weights)

    def split_short(self) -> tuple[Tensor, Tensor]:
        """Which images have a surplus (B, 1), and log_attention (B, N) with something harmless in their place.

        All live cells of these were read, so that their features weighted by their attention are Φ itself.
        """
        short = self.surplus.any(-1, keepdim=True)
        return short, self.log_attention.masked_fill(short, -1.0 - self.indices.shape[1])

    def table(self, estimator: Estimator = "ordered") -> PatchTable:
        """A row a drawn patch: image, draw, cell row and column, attention, and its weight in the estimate.

        Surplus draws are left out. Numbers count from 0.
        """
        fixed = {
            "row": self.indices // self.grid_size[1],
            "column": self.indices % self.grid_size[1],
            **self._boxes(),
            "attention": self.log_attention.detach().double().exp(),
            "weight": self.weights(estimator),
        }
        columns = {name: values.tolist() for name, values in fixed.items()}
        surplus = self.surplus.tolist()
        return PatchTable(
            {"image": image, "draw": draw} | {name: values[image][draw] for name, values in columns.items()}
            for image in range(len(self))
            for draw in range(self.indices.shape[1])
            if not surplus[image][draw]
        )

    def _boxes(self) -> dict[str, Tensor]:
        return {}

    def _how(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._static}

    def _alike(self) -> dict[str, Any]:
        return {**self._how(), "padded": None, "grid_sizes": None, "n": self.indices.shape[1]}

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Self":
        changes: dict[str, Any] = {name: function(getattr(self, name)) for name in self._tensors}
        return dataclasses.replace(self, **changes)

    def __copy__(self) -> "Self":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        # torch copies leaves of a graph only; of what was computed the values are copied, without the graph.
        return self._map(lambda tensor: copy.deepcopy(tensor if tensor.is_leaf else tensor.detach(), memo))

    def __getstate__(self) -> dict[str, Any]:
        # As above: another process could not take a graph, and a file would not hold it.
        values = {name: getattr(self, name) for name in self._tensors}
        return {name: v if v.is_leaf else v.detach() for name, v in values.items()} | self._how()


def _fields(sample: CellSample, kind: type[CellSample]) -> dict[str, Any]:
    """What `kind` has of a sample."""
    return {name: getattr(sample, name) for name in kind._tensors + kind._static}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BoxSample(CellSample):
    """Drawn cells and the boxes of pixels that they stand for: where something was looked at.

    Attributes beside those of `CellSample`:
        offsets: (B, N, 2) int64, top-left pixels (y, x); may lie outside the image.
        patch_size: pixels (ph, pw).
    """

    offsets: Tensor
    patch_size: tuple[int, int]

    @classmethod
    def at(cls, cells: CellSample, offsets: Tensor, patch_size: tuple[int, int]) -> "BoxSample":
        """What was drawn, with the boxes at offsets (B, N, 2) that it stands for."""
        return BoxSample(**_fields(cells, CellSample), offsets=offsets, patch_size=patch_size)

    def table(self, estimator: Estimator = "ordered") -> PatchTable:
        """A row a drawn patch: image, draw, cell row and column, box, attention, and its weight in the estimate.

        A box is top, left, height and width in pixels of the image, and may lie outside in part. Surplus draws are left
        out. Numbers count from 0.
        """
        return super().table(estimator)

    def boxes(self) -> "BoxSample":
        """The sample without its patches."""
        return BoxSample(**_fields(self, BoxSample))

    def _boxes(self) -> dict[str, Tensor]:
        height, width = (torch.full_like(self.indices, side) for side in self.patch_size)
        return {"top": self.offsets[..., 0], "left": self.offsets[..., 1], "height": height, "width": width}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PatchSample(BoxSample):
    """Patches drawn from B images, N from each, in draw order, and how they were drawn.

    Attributes beside those of `BoxSample` and `CellSample`:
        patches: (B, N, C, ph, pw) read from the full-resolution images, normalised.
    """

    patches: Tensor

    @classmethod
    def of(cls, cells: CellSample, patches: Tensor, offsets: Tensor) -> "PatchSample":
        """What was drawn, with the patches (B, N, C, ph, pw) read for its `readable` cells at offsets (B, N, 2)."""
        size = (patches.shape[-2], patches.shape[-1])
        return cls(**_fields(cells, CellSample), offsets=offsets, patch_size=size, patches=patches)


def _register(cls: type[CellSample]) -> None:
    """Let PyTorch see the tensors of a sample, load it from a file, and put samples of single images together."""
    fields = dataclasses.fields(cls)
    cls._tensors = tensors = tuple(field.name for field in fields if field.type is Tensor)
    cls._static = static = tuple(field.name for field in fields if field.type is not Tensor)

    def flatten(sample: CellSample) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(sample, name) for name in tensors], tuple(getattr(sample, name) for name in static)

    def flatten_with_keys(sample: CellSample) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        values, context = flatten(sample)
        return [(pytree.GetAttrKey(name), value) for name, value in zip(tensors, values, strict=True)], context

    def unflatten(values: Iterable[Any], context: Iterable[Any]) -> CellSample:
        return cls(**dict(zip(tensors, values, strict=True)), **dict(zip(static, context, strict=True)))

    def from_json(context: Any) -> tuple[Any, ...]:
        return tuple(from_json(value) if isinstance(value, list) else value for value in context)

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"ats.{cls.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=from_json,
        flatten_with_keys_fn=flatten_with_keys,
    )
    torch.serialization.add_safe_globals([cls])
    default_collate_fn_map[cls] = lambda batch, *, collate_fn_map=None: cls.cat(batch)


for _cls in (CellSample, BoxSample, PatchSample):
    _register(_cls)
