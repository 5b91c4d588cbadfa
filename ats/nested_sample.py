"""What nested attention sampling drew: the regions of every level and the patches in them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from ats.samples import BoxSample, CellSample, Estimator, PatchSample, PatchTable


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NestedSample:
    """Patches of B images, drawn in regions that were drawn in regions, and how each level was drawn.

    ``len(sample)`` is the number of images; ``sample[i]`` is image i alone, still with a batch dimension.

    Attributes:
        levels: what each level drew, the outermost first, a row a region: those of image 0 first, in draw order. The
            boxes of a level are the regions of the next, in pixels of the image; the last level has the patches.
        entropy: (B,) of the whole tree, H(a) + Σ a_i H(b_i), nats; its second term is estimated without bias from the
            regions that were drawn. Differentiable.
    """

    levels: tuple[BoxSample, ...]
    entropy: Tensor

    if TYPE_CHECKING:  # at run time iteration goes by __getitem__, as that of `CellSample` does

        def __iter__(self) -> "Iterator[NestedSample]": ...

    def __len__(self) -> int:
        """Images."""
        return len(self.entropy)

    def __getitem__(self, key: int | slice) -> "NestedSample":
        """Some of the images, as a sample."""
        numbers = range(len(self))[key if isinstance(key, slice) else slice(key, key + 1 or None)]
        if not isinstance(key, slice) and not -len(self) <= key < len(self):
            raise IndexError(f"image {key} of a sample of {len(self)}")
        if numbers.step != 1:
            raise ValueError(f"images of a nested sample are taken one by one or in a row, got {key}")
        levels = []
        for level in self.levels:
            rows = len(level) // len(self)
            levels.append(level[numbers.start * rows : numbers.stop * rows])
        return NestedSample(levels=tuple(levels), entropy=self.entropy[numbers.start : numbers.stop])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(images={len(self)}, n={self.n}, levels={list(self.levels)!r})"

    @classmethod
    def cat(cls, samples: Iterable["NestedSample"]) -> "NestedSample":
        """One sample of all images of several, which were drawn alike."""
        every = list(samples)
        if not every:
            raise ValueError("cat needs at least one sample")
        if len({sample.n for sample in every}) > 1:
            raise ValueError(f"samples that are put together must be drawn alike, got {[s.n for s in every]} draws")
        levels = zip(*(sample.levels for sample in every), strict=True)
        return cls(
            levels=tuple(type(level[0]).cat(level) for level in levels),
            entropy=torch.cat([sample.entropy for sample in every]),
        )

    @property
    def n(self) -> tuple[int, ...]:
        """Draws of each level."""
        return tuple(level.indices.shape[1] for level in self.levels)

    @property
    def patches(self) -> Tensor:
        """(B, N, C, ph, pw) of all regions of an image, N the product of the levels' draws."""
        last = self.levels[-1]
        if not isinstance(last, PatchSample):
            raise AttributeError("this sample was kept without its patches")
        return self._per_image(last.patches)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels (ph, pw) of the patches."""
        return self.levels[-1].patch_size

    @property
    def offsets(self) -> Tensor:
        """(B, N, 2) int64, top-left pixels (y, x) of the patches in their images."""
        return self._per_image(self.levels[-1].offsets)

    @property
    def log_attention(self) -> Tensor:
        """(B, N) log probability of each patch's cell under the whole tree; differentiable."""
        return self._down(lambda level: level.log_attention, torch.add)

    @property
    def surplus(self) -> Tensor:
        """(B, N) bool: patches of draws, at any level, that there was no live cell left for."""
        return self._down(lambda level: level.surplus, torch.logical_or)

    @property
    def counts(self) -> Tensor:
        """(B,) int64: patches of each image without the surplus."""
        return (~self.surplus).sum(-1)

    def weights(self, estimator: Estimator = "ordered") -> Tensor:
        """(B, N) the weights of the patches in the estimate, products of the levels' own; they sum to 1."""
        return self._down(lambda level: level.weights(estimator), torch.mul)

    def table(self, estimator: Estimator = "ordered") -> PatchTable:
        """A row a drawn patch: image, draw, region, cell, box in pixels of the image, attention and weight.

        `region` numbers the regions of an image's last level in draw order; a region's own box is in the table of the
        level before. Attention and weight are of the whole tree. Surplus draws are left out.
        """
        weights, attention = self.weights(estimator).tolist(), self.log_attention.detach().double().exp().tolist()
        regions, draws = math.prod(self.n[:-1]), self.n[-1]
        rows = PatchTable()
        left_out = self.surplus.tolist()
        for row in self.levels[-1].table(estimator):
            image, region = divmod(int(row["image"]), regions)
            draw = region * draws + int(row["draw"])
            if not left_out[image][draw]:
                found = {"attention": attention[image][draw], "weight": weights[image][draw]}
                rows.append({"image": image, "draw": draw, "region": region, **_box(row), **found})
        return rows

    def boxes(self) -> "NestedSample":
        """The sample without its patches."""
        levels = (level.boxes() if isinstance(level, PatchSample) else level for level in self.levels)
        return NestedSample(levels=tuple(levels), entropy=self.entropy)

    def to(self, *args: Any, **options: Any) -> "NestedSample":
        """The sample on a device, and what of it is floating point in a dtype, as `CellSample.to`."""
        levels = tuple(level.to(*args, **options) for level in self.levels)
        return NestedSample(levels=levels, entropy=self.entropy.to(*args, **options))

    def cpu(self) -> "NestedSample":
        """The sample in the host's memory."""
        return self.to("cpu")

    def detach(self) -> "NestedSample":
        """The sample without its graph, sharing its memory."""
        return NestedSample(levels=tuple(level.detach() for level in self.levels), entropy=self.entropy.detach())

    def pin_memory(self) -> "NestedSample":
        """The sample in page-locked memory."""
        levels = tuple(level.pin_memory() for level in self.levels)
        return NestedSample(levels=levels, entropy=self.entropy.pin_memory())

    def _per_image(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (len(self), math.prod(self.n[:-1]))).flatten(1, 2)

    def _down(self, of: Callable[[CellSample], Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What all levels make of their values (R, n) along each path, (B, N)."""
        total = of(self.levels[0])  # (B, n)
        for level in self.levels[1:]:
            total = join(total.reshape(-1, 1), of(level))  # (R, n) of R regions
        return total.reshape(len(self), -1)


def _box(row: dict[str, int | float]) -> dict[str, int | float]:
    return {name: row[name] for name in ("row", "column", "top", "left", "height", "width")}


pytree.register_pytree_node(
    NestedSample,
    lambda sample: ([*sample.levels, sample.entropy], None),
    lambda values, _: NestedSample(levels=tuple(values)[:-1], entropy=tuple(values)[-1]),
    serialized_type_name="ats.NestedSample",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
)
torch.serialization.add_safe_globals([NestedSample])
default_collate_fn_map[NestedSample] = lambda batch, *, collate_fn_map=None: NestedSample.cat(batch)
