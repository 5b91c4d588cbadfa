"""The images of one split of a manifest: in memory, or read from their files as they are needed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ats.datasets.manifest import Manifest, Row
from ats.experiments.augmentation import apply_change, draw_change
from ats.experiments.backbones import networks_of
from ats.experiments.build import normalise, stacked, view_size
from ats.experiments.changed_source import ChangedSource, InColours, changed_view
from ats.experiments.config import ExperimentConfig
from ats.experiments.console import say
from ats.experiments.images_config import ImagesConfig
from ats.experiments.levels import plain_view, whole_cells
from ats.experiments.live_cells import live_cells, placement_of
from ats.experiments.view_loading import ViewReader
from ats.functional import area_downsample
from ats.grid import make_grid
from ats.overlap import overlap_message
from ats.sources import ImageSource, Level, open_image, read_view
from ats.sources.view_cache import CacheError

IN_MEMORY = 4 << 30
"""Bytes of a split's images up to which they are kept in memory, where it is not said."""


class ImageStore:
    """Images that can be read, checked as they are opened.

    Args:
        manifest: which the rows are of.
        rows: the images wanted.
        config: of the run.
        data: its data's options.
        name: of the split, for messages.

    Raises:
        ValueError: files that cannot be read, unless they are to be left out; images that the model cannot take.
    """

    def __init__(
        self, manifest: Manifest, rows: Sequence[Row], config: ExperimentConfig, data: ImagesConfig, name: str
    ) -> None:
        self.manifest, self.config, self.data, self.name = manifest, config, data, name
        self._unread: list[tuple[int, str]] = []  # lines of the manifest, and what is wrong there
        opened = [(row, source) for row in rows if (source := self._open(row)) is not None]
        for row, source in opened:
            self._check(row, source)
        if name == "train":
            self._warn_of_overlap([(row, source.levels[0]) for row, source in opened])
        self.in_memory = self._fits_memory([source for _, source in opened])
        if not self.in_memory:
            self._check_on_disk()
        self.rows: tuple[Row, ...] = ()
        self.images: list[Tensor | ImageSource] = []
        self._views: list[Tensor | None] = []
        self.given: dict[int, Tensor] = {}
        """Views that were read already, by index, for the batch at hand."""
        for row, source in opened:
            self._keep(row, source)
        self._report(len(self.rows))
        self.masks = self._masks()

    def batch(self, indices: Sequence[int], epoch: int | None) -> tuple[list[Tensor | ImageSource], list[Tensor]]:
        """Images, as an epoch changes them, and their views, normalised."""
        pairs = [self._one(index, epoch) for index in indices]
        return [image for image, _ in pairs], [view for _, view in pairs]

    def mask(self, indices: Sequence[int], epoch: int | None = None) -> Tensor | list[Tensor] | None:
        """Which cells may be drawn, (B, gh, gw) bool or a list, of images as an epoch turns them; None: all."""
        if self.masks is None:
            return None
        return stacked([self._whole(self._turned(self.masks[index], index, epoch)) for index in indices])

    def _turned(self, cells: Tensor, index: int, epoch: int | None) -> Tensor:
        """A mask as its image is mirrored and turned. Where cells lie a part of one aside, so does it."""
        if epoch is None:
            return cells
        change = draw_change(self.data, self.config.seed, epoch, index)
        cells = cells.flip(-1) if change.mirror else cells
        return cells.rot90(change.quarter_turns, (-2, -1))

    def _one(self, index: int, epoch: int | None) -> tuple[Tensor | ImageSource, Tensor]:
        image = self.images[index]
        change = None if epoch is None else draw_change(self.data, self.config.seed, epoch, index)
        if isinstance(image, Tensor):
            oblong = self.config.model.method in ("ats", "uniform")  # which take images of different sizes
            image = image if change is None else apply_change(image, change, oblong=oblong)
            return image, self._whole(normalise(self.config, self._shrunk(image)))
        view = self._stored_view(index)
        if change is not None:
            image, view = ChangedSource(image, change), changed_view(view, change)
        return image, self._whole(normalise(self.config, view))

    def _whole(self, view: Tensor) -> Tensor:
        """A view or a mask, in whole cells of the first level if there are levels."""
        levels = self.config.model.nested
        return whole_cells(view, levels[0], networks_of(self.config)) if levels else view

    def _stored_view(self, index: int) -> Tensor:
        image = self.images[index]
        assert not isinstance(image, Tensor)
        view = self.given.get(index, self._views[index])
        return self._read_view(image) if view is None else view

    def reader(self) -> ViewReader:
        """What reads views of images on disk elsewhere."""
        sources = [image for image in self.images if not isinstance(image, Tensor)]
        names = [self.manifest.where(row) for row in self.rows]
        level = self.config.model.nested[0] if self.config.model.nested else None
        return ViewReader(sources, [self._view_size(source) for source in sources], names, self.data.cache, level)

    def _shrunk(self, image: Tensor) -> Tensor:
        if self.config.model.nested:
            return plain_view(image, self.config.model.nested[0])
        size = view_size(self.config, (image.shape[-2], image.shape[-1]))
        return image if size is None else area_downsample(image[None], size)[0]

    def _read_view(self, source: ImageSource) -> Tensor:
        if self.config.model.nested:
            return plain_view(source, self.config.model.nested[0], cache=self.data.cache)
        return read_view(source, size=self._view_size(source), cache=self.data.cache)

    def _view_size(self, source: ImageSource) -> tuple[int, int]:
        size = view_size(self.config, (source.levels[0].height, source.levels[0].width))
        assert size is not None  # `_check_on_disk`
        return size

    def _open(self, row: Row) -> ImageSource | None:
        try:
            return open_image(row.path, mpp=row.mpp)
        except (ValueError, OSError) as error:
            self._unread.append((row.line, f"{self.manifest.where(row)}: {error}"))
            return None

    def _keep(self, row: Row, source: ImageSource) -> None:
        """Read what is kept of an image, by which it shows whether it can be read."""
        try:
            if self.in_memory:
                full = source.levels[0]
                image = source.read(0, 0, 0, full.height, full.width)
                grey = image.shape[0] == 1 < self.data.channels
                self.images.append(image.expand(3, -1, -1) if grey else image)
            else:
                source = InColours(source) if source.channels == 1 < self.data.channels else source
                view = self._read_view(source)
                keeps = self.data.cache is None and not self.data.workers
                self._views.append(view if keeps else None)
                self.images.append(source)
        except CacheError:  # no image is to be left out for it
            raise
        except (ValueError, OSError) as error:
            self._unread.append((row.line, f"{self.manifest.where(row)}: {error}"))
            return
        self.rows = (*self.rows, row)

    def _report(self, kept: int) -> None:
        unread = [message for _, message in sorted(self._unread)]  # by line, whether found by opening or by reading
        if unread and self.data.unreadable == "stop":
            few = "; ".join(unread[:10]) + (f"; and {len(unread) - 10} more" if len(unread) > 10 else "")
            raise ValueError(
                f"{len(unread)} of {kept + len(unread)} {self.name} images cannot be read: {few}. Mend them, or leave "
                "them out with --data.unreadable skip"
            )
        for line in unread:
            say(f"left out: {line}", stderr=True)

    def _check(self, row: Row, source: ImageSource) -> None:
        """Raise ValueError where an image is not of the kind that the model takes."""
        data, where = self.data, f"{self.manifest.where(row)}: {row.path}"
        if source.channels != data.channels and not (source.channels == 1 and data.channels == 3):
            raise ValueError(
                f"{where} has {source.channels} channels, expected {data.channels} as in the first image; convert it, "
                "or set --data.bands"
            )
        if data.channels != 3 and data.tint:
            raise ValueError(f"data.tint is for images of three colours, and these have {data.channels}; set it to 0")
        if source.dtype == torch.uint8:
            return
        if not data.mean:
            raise ValueError(
                f"{where} holds {source.dtype} and not bytes, whose range is not known; say with --data.mean and "
                "--data.std, a number a channel, what its values are like"
            )
        if data.contrast or data.brightness or data.tint or data.zoom != 1 or data.stretch != 1:
            raise ValueError(
                f"{where} holds {source.dtype}, and random colours and sizes are of bytes alone; set --data.contrast 0 "
                "--data.brightness 0 --data.tint 0 --data.zoom 1 --data.stretch 1"
            )

    def _warn_of_overlap(self, images: Sequence[tuple[Row, Level]]) -> None:
        """Say of the first image whose patches overlap too much, before hours are spent on them."""
        model, networks = self.config.model, networks_of(self.config)
        if model.method != "ats" or model.nested:
            return
        for row, full in images:
            view = view_size(self.config, (full.height, full.width))
            assert view is not None  # of attention sampling
            cells = (view[0] - networks.lost) // networks.stride, (view[1] - networks.lost) // networks.stride
            grid = make_grid(cells, (full.height, full.width), view, networks.lost)
            message = overlap_message(grid, (model.patch_size, model.patch_size), model.n_patches)
            if message is not None:
                options = "--model.view-scale, --model.patch-size, --model.n-patches"
                say(f"warning: {self.manifest.where(row)}: {message} ({options})", stderr=True)
                return

    def _fits_memory(self, sources: Sequence[ImageSource]) -> bool:
        """Whether images are kept in memory: as asked, or as many as fit there."""
        if self.data.storage != "auto":
            return self.data.storage == "memory"
        needed = sum(
            each.levels[0].height * each.levels[0].width * self.data.channels * each.dtype.itemsize for each in sources
        )
        return needed <= IN_MEMORY

    def _check_on_disk(self) -> None:
        data, method = self.data, self.config.model.method
        if method not in ("ats", "uniform"):
            raise ValueError(
                f"model.method={method} reads whole images, and these are read from disk in parts; choose ats or "
                "uniform, or keep images in memory with --data.storage memory"
            )
        if data.translation or data.zoom != 1 or data.stretch != 1:
            raise ValueError(
                "images that stay on disk cannot be moved or enlarged at random; set --data.translation 0 --data.zoom "
                "1 --data.stretch 1, or --data.storage memory"
            )

    def _masks(self) -> list[Tensor] | None:
        data = self.data
        if not data.tissue and all(row.mask is None for row in self.rows):
            return None
        if self.config.model.method not in ("ats", "uniform"):
            raise ValueError(f"{self.manifest.path}: masks are for attention sampling, not {self.config.model.method}")
        if data.translation or data.zoom != 1 or data.stretch != 1:
            raise ValueError(
                f"{self.manifest.path}: masks are turned and mirrored with their images, but not moved or enlarged; "
                "set --data.translation 0 --data.zoom 1 --data.stretch 1"
            )
        placement, found = placement_of(self.config), []
        for index, (row, image) in enumerate(zip(self.rows, self.images, strict=True)):
            try:
                view = None if isinstance(image, Tensor) or not data.tissue else self._stored_view(index)
                cells = live_cells(self.config, placement, image, mask=row.mask, tissue=data.tissue, view=view)
            except (ValueError, OSError) as error:
                raise ValueError(f"{self.manifest.where(row)}: {error}") from error
            found.append(cells)
        return found
