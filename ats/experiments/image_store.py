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
from ats.experiments.image_kinds import check_kind, counted, other_unit
from ats.experiments.images_config import ImagesConfig
from ats.experiments.levels import plain_view, whole_cells
from ats.experiments.live_cells import live_cells, placement_of
from ats.experiments.view_loading import ViewReader
from ats.functional import area_downsample
from ats.grid import Placement, make_grid
from ats.overlap import overlap_message
from ats.sources import ImageSource, Level, open_image, read_view
from ats.sources.plain import PlainSource
from ats.sources.view_cache import CacheError
from ats.sources.whole import check_whole

IN_MEMORY = 4 << 30
"""Bytes of a split's images up to which they are kept in memory, where it is not said."""

MOST_NAMED = 20
"""Files that an error names one by one."""


class ImageStore:
    """Images that can be read, checked as they are opened.

    Args:
        manifest: which the rows are of.
        rows: the images wanted.
        config: of the run.
        data: its data's options.
        name: of the split, for messages.

    What cannot be read is left out, and is in `unread`.

    Attributes:
        unread: lines of the manifest, and what is wrong there.

    Raises:
        ValueError: images that the model cannot take.
    """

    def __init__(
        self, manifest: Manifest, rows: Sequence[Row], config: ExperimentConfig, data: ImagesConfig, name: str
    ) -> None:
        self.manifest, self.config, self.data, self.name = manifest, config, data, name
        self.unread: list[tuple[int, str]] = []
        opened = [(row, source) for row in rows if (source := self._open(row)) is not None]
        for row, source in opened:
            self._check(row, source)
        self._say_what_is_strange(opened)
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
        masked = self._are_masked([row for row, _ in opened])
        placement = placement_of(config) if masked else 0
        self.masks: list[Tensor] | None = [] if masked else None
        """Cells of each image that may be drawn; None: all."""
        for row, source in opened:
            self._keep(row, source, placement)

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
            source = open_image(row.path, mpp=row.mpp)
            check_whole(row.path)
        except (ValueError, OSError) as error:
            self._leave_out(row, error)
            return None
        return source

    def _leave_out(self, row: Row, error: Exception) -> None:
        self.unread.append((row.line, f"{self.manifest.where(row)}: {error}"))

    def _keep(self, row: Row, source: ImageSource, placement: int | Placement) -> None:
        """Read what is kept of an image, by which it shows whether it can be read."""
        image: Tensor | ImageSource
        view = None
        try:
            if self.in_memory:
                full = source.levels[0]
                pixels = source.read(0, 0, 0, full.height, full.width)
                image = pixels.expand(3, -1, -1) if pixels.shape[0] == 1 < self.data.channels else pixels
            else:
                if not isinstance(source, PlainSource):  # of which the view needs not all, and the last is lost first
                    source.read(0, source.levels[0].height - 1, source.levels[0].width - 1, 1, 1)
                image = InColours(source) if source.channels == 1 < self.data.channels else source
                view = self._read_view(image)
            cells = None if self.masks is None else self._cells(row, image, placement, view)
        except CacheError:  # no image is to be left out for it
            raise
        except (ValueError, OSError) as error:
            self._leave_out(row, error)
            return
        keeps = self.data.cache is None and not self.data.workers
        self._views.append(view if keeps else None)
        self.images.append(image)
        self.rows = (*self.rows, row)
        if self.masks is not None and cells is not None:
            self.masks.append(cells)

    def _cells(self, row: Row, image: Tensor | ImageSource, placement: int | Placement, view: Tensor | None) -> Tensor:
        tissue = self.data.tissue
        shown = view if tissue else None
        return live_cells(self.config, placement, image, mask=row.mask, tissue=tissue, view=shown)

    def _check(self, row: Row, source: ImageSource) -> None:
        """Raise ValueError where an image is not of the kind that the model takes."""
        data, where = self.data, f"{self.manifest.where(row)}: {row.path}"
        like = "in the first image (--data.bands, --data.dtype)"
        check_kind(where, source, data.channels, data.dtype, like=like)
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

    def _say_what_is_strange(self, images: Sequence[tuple[Row, ImageSource]]) -> None:
        """Say of the first image of each kind what may not be meant, and how many others there are."""
        grey = [row for row, source in images if source.channels == 1 < self.data.channels]
        if grey:
            also = f", and so are {counted(len(grey) - 1, 'other')}" if len(grey) > 1 else ""
            say(
                f"note: {self.manifest.where(grey[0])}: {grey[0].path} is grey{also}: read as three equal channels",
                stderr=True,
            )
        for row, source in images:
            try:
                strange = other_unit(source, self.data.mean, self.data.std)
            except (ValueError, OSError):  # reading all of it says so
                continue
            if strange is not None:
                say(f"warning: {self.manifest.where(row)}: {row.path}: {strange.text}", stderr=True)
                return

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

    def _are_masked(self, rows: Sequence[Row]) -> bool:
        """Whether attention may not look everywhere in all images.

        Raises:
            ValueError: and the model has no attention, or images are moved.
        """
        data = self.data
        if not data.tissue and all(row.mask is None for row in rows):
            return False
        if self.config.model.method not in ("ats", "uniform"):
            raise ValueError(f"{self.manifest.path}: masks are for attention sampling, not {self.config.model.method}")
        if data.translation or data.zoom != 1 or data.stretch != 1:
            raise ValueError(
                f"{self.manifest.path}: masks are turned and mirrored with their images, but not moved or enlarged; "
                "set --data.translation 0 --data.zoom 1 --data.stretch 1"
            )
        return True


def report_unread(stores: Sequence[ImageStore]) -> None:
    """Name all images of some splits that cannot be read: as one error, or where they are left out, a line each.

    Raises:
        ValueError: there are some, and they are not to be left out.
    """
    unread = [message for _, message in sorted(each for store in stores for each in store.unread)]
    if unread and stores[0].data.unreadable == "stop":
        more = len(unread) - MOST_NAMED
        few = "; ".join(unread[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
        images = sum(len(store.rows) for store in stores) + len(unread)
        splits = " and ".join(store.name for store in stores)
        raise ValueError(
            f"{len(unread)} of {counted(images, f'{splits} image')} cannot be read: {few}. Mend them, or leave them "
            "out with --data.unreadable skip"
        )
    for line in unread:
        say(f"left out: {line}", stderr=True)
