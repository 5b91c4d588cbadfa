"""Gigapixel MNIST: five digits in a gigapixel, told apart from noise at full resolution only, found from afar.

On a black image lie *places*, squares a shade lighter, some of them *inhabited* and a shade lighter still. Each
inhabited place has one digit; three of the five are of the label's class. Noise glyphs lie in all places and, many
more, everywhere else. From very far only places show; which are inhabited is a matter of a few grey levels; a digit is
told from noise at about 1/8; which digit it is takes full resolution.

An image is kept as glyphs and where they lie, of which no two overlap, and any box of it is rendered at any scale when
asked for, without the pixels in between: 0.5 MB in place of a gigabyte. Each depends on nothing but the seed, the split
and its index, and only on integer arithmetic: it is the same on every machine.
"""

import functools
import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ats.datasets.glyph_sums import Ints, add_glyphs, covered, over
from ats.datasets.megapixel_mnist import GLYPH, N_CLASSES, members_by_class, noise_glyphs
from ats.datasets.mnist import Digits
from ats.sources.image_source import Level, check_box

SHADE, INHABITED_SHADE = 16, 24
"""Brightness of places, as bytes; glyphs are up to 255."""

DEMO: dict[str, Any] = {"image_size": 8192, "place_size": 256, "place_noise": 5}
"""A size to train on within minutes: places a 32nd of a side as in the full size, with less noise in each."""

FULL_SIZE = 32_768
"""Pixels a side, of which `n_noise` glyphs elsewhere are counted."""

_GROUNDS = (0, SHADE, INHABITED_SHADE)  # that glyphs lie on
_N_NOISE_GLYPHS = 2000
_SPLITS = {"train": 0, "validation": 1, "test": 2}
_SLOT = 2 * GLYPH  # a side of the squares in which one glyph lies at most
_ROUNDS = 100


class Scene(NamedTuple):
    """What an image is made of.

    Attributes:
        glyph_ids: (G,) which glyphs; those of the digits first, then the noise in places, then that elsewhere.
        corners: (G, 2) their top-left pixels (y, x).
        shades: (G,) of the ground that they lie on, as a byte.
        places: (P, 2) the top-left pixels of places, the inhabited ones first, in the order of their digits.
        order: (G,) the glyphs from top to bottom.
    """

    glyph_ids: Ints
    corners: Ints
    shades: Ints
    places: Ints
    order: Ints

    def touched(self, top: int, left: int, height: int, width: int) -> Ints:
        """The glyphs that lie in a box, in part at least."""
        begin, end = np.searchsorted(self.corners[:, 0], [top - GLYPH + 1, top + height], sorter=self.order)
        some = self.order[begin:end]
        columns = self.corners[some, 1]
        return some[(columns > left - GLYPH) & (columns < left + width)]


class GigapixelMNIST(Dataset["tuple[GigapixelImage, int]"]):
    """`n_images` images of (1, image_size, image_size) and their labels, rendered box by box.

    Args:
        digits: the handwritten digits to place; take those of another split for testing.
        n_images: images in the set. A longer set starts with the images of a shorter one.
        image_size: pixels a side, e.g. 32,768 (a gigapixel) or 8,192.
        n_places, place_size: squares of so many pixels a side that show from afar.
        n_inhabited: how many of them have a digit.
        n_target: how many of the digits are of the label's class; more than half.
        place_noise: noise glyphs in each place.
        n_noise: noise glyphs elsewhere; None: 20,000 in 32,768², in proportion to the area.
        seed, split: which images; "train", "validation" or "test".
        first: how many of the split's images to leave out before the first.

    Raises:
        ValueError: sizes that do not fit each other, an unknown split, a class without digits.
    """

    def __init__(
        self,
        digits: Digits,
        n_images: int,
        *,
        image_size: int = FULL_SIZE,
        n_places: int = 24,
        place_size: int = 1024,
        n_inhabited: int = 5,
        n_target: int = 3,
        place_noise: int = 40,
        n_noise: int | None = None,
        seed: int = 0,
        split: str = "train",
        first: int = 0,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {', '.join(map(repr, _SPLITS))}")
        if min(n_images, place_noise, first, 0 if n_noise is None else n_noise) < 0:
            raise ValueError(
                "n_images, place_noise, n_noise and first must be at least 0, got "
                f"{n_images}, {place_noise}, {n_noise} and {first}"
            )
        if not n_inhabited / 2 < n_target <= n_inhabited <= n_places:
            raise ValueError(
                f"n_target must be more than half of n_inhabited and that no more than n_places, got {n_target}, "
                f"{n_inhabited} and {n_places}"
            )
        in_place, across = (place_size // _SLOT) ** 2, image_size // _spacing(place_size)
        if in_place < place_noise + 1:
            raise ValueError(
                f"a place of {place_size}×{place_size} pixels has room for {in_place} glyphs, got place_noise="
                f"{place_noise} and a digit; make places larger"
            )
        if across**2 < n_places:
            raise ValueError(
                f"{image_size}×{image_size} pixels have room for {across**2} places of {place_size}×{place_size}, got "
                f"n_places={n_places}; make the image larger or the places smaller"
            )
        self._by_class = members_by_class(digits)
        self.image_size, self.place_size = image_size, place_size
        self.n_places, self.n_inhabited, self.n_target = n_places, n_inhabited, n_target
        self.place_noise = place_noise
        self.n_noise = 20_000 * image_size**2 // FULL_SIZE**2 if n_noise is None else n_noise
        self.seed, self.split, self.first = seed, split, first
        noise = noise_glyphs(np.random.Philox(key=[seed, _key(split, 0, noise=True)]), _N_NOISE_GLYPHS)
        self.glyphs = torch.cat([digits.images, noise]).numpy()  # (G, 28, 28) uint8
        self.glyph_checksum = zlib.crc32(self.glyphs.tobytes())
        self._sums = np.concatenate([over(shade, self.glyphs[len(digits.images) :]) for shade in _GROUNDS])
        self.n_digits = len(digits.images)
        labels = [self._digits(index)[1] for index in range(n_images)]
        self.labels = torch.tensor(labels, dtype=torch.int64, device="cpu")
        self._scenes = functools.lru_cache(maxsize=256)(self._scene)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> "tuple[GigapixelImage, int]":
        """The image, a source of boxes, and its label."""
        image = self.image(index)
        return image, int(self.labels[image.index])

    def image(self, index: int, *, dtype: torch.dtype = torch.float32) -> "GigapixelImage":
        """An image as a source, exact in float32, or in bytes, to which a file's levels are rounded."""
        return GigapixelImage(self, range(len(self))[operator.index(index)], dtype=dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_scenes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._scenes = functools.lru_cache(maxsize=256)(self._scene)

    def scene(self, index: int) -> Scene:
        """What an image is made of: where its places and its digits lie, for an oracle or a picture."""
        return self._scenes(range(len(self))[index])

    def _digits(self, index: int) -> tuple[np.random.Philox, int, list[int]]:
        """The image's random numbers, its label, and its digits' numbers."""
        bits = np.random.Philox(key=[self.seed, _key(self.split, self.first + index)])
        label = int(_below(bits, N_CLASSES, 1)[0])
        others = (label + 1 + _below(bits, N_CLASSES - 1, self.n_inhabited - self.n_target)) % N_CLASSES
        picks = bits.random_raw(self.n_inhabited)
        members = [self._by_class[one] for one in [label] * self.n_target + others.tolist()]
        return bits, label, [int(some[int(pick) % len(some)]) for some, pick in zip(members, picks, strict=True)]

    def _scene(self, index: int) -> Scene:
        bits, _, digits = self._digits(index)
        spacing, side = _spacing(self.place_size), self.image_size
        places = _in_slots(bits, self.n_places, side // spacing, spacing, self.place_size)
        inner = [
            corner + _in_slots(bits, self.place_noise + 1, self.place_size // _SLOT, _SLOT, GLYPH) for corner in places
        ]
        # The first glyph of an inhabited place is its digit.
        corners = [np.stack([some[0] for some in inner[: self.n_inhabited]])]
        corners += [some[1:] for some in inner]
        shades = [INHABITED_SHADE if number < self.n_inhabited else SHADE for number in range(self.n_places)]
        corners.append(self._elsewhere(bits, places))
        noise = self.n_places * self.place_noise + self.n_noise
        ids = np.concatenate([np.array(digits), self.n_digits + _below(bits, _N_NOISE_GLYPHS, noise)])
        grounds = np.concatenate([shades[: self.n_inhabited], np.repeat(shades, self.place_noise), [0] * self.n_noise])
        every = np.concatenate(corners)
        return Scene(ids, every, grounds.astype(np.int64), places, np.argsort(every[:, 0], kind="stable"))

    def _elsewhere(self, bits: np.random.Philox, places: Ints) -> Ints:
        """Where noise outside of places lies, (n_noise, 2)."""
        found, slots = np.empty((0, 2), np.int64), np.empty(0, np.int64)
        across = self.image_size // _SLOT
        for _ in range(_ROUNDS):
            if len(found) >= self.n_noise:
                break
            count = self.n_noise + self.n_noise // 4 + 16
            some, jitter = _below(bits, across**2, count), _below(bits, (_SLOT - GLYPH + 1) ** 2, count)
            _, order = np.unique(np.concatenate([slots, some]), return_index=True)
            new = np.sort(order[order >= len(slots)]) - len(slots)  # of slots that were not taken, the first of each
            slots = np.concatenate([slots, some[new]])
            corners = _corners(some[new], jitter[new], across, _SLOT, _SLOT - GLYPH + 1)
            beside = np.ones(len(corners), bool)
            for y, x in places.tolist():
                rows = (corners[:, 0] > y - GLYPH) & (corners[:, 0] < y + self.place_size)
                beside &= ~(rows & (corners[:, 1] > x - GLYPH) & (corners[:, 1] < x + self.place_size))
            found = np.concatenate([found, corners[beside]])
        if len(found) < self.n_noise:
            raise ValueError(
                f"{self.n_noise} noise glyphs find no room outside of the places in {self.image_size}×"
                f"{self.image_size} pixels; pass a smaller n_noise"
            )
        return found[: self.n_noise]

    def render(self, index: int, top: int, left: int, height: int, width: int, *, scale: int = 1) -> Tensor:
        """A box of an image, each pixel the mean over scale×scale of it: (1, height / scale, width / scale) float32.

        Args:
            index: of the image.
            top, left, height, width: the box, in pixels at full resolution; beyond the image it is black.
            scale: a whole number that divides height and width.

        Returns:
            Values in [0, 1], the same as `ats.area_downsample` gives of the box at full resolution.
        """
        total = self._total(index, top, left, height, width, scale)
        return torch.from_numpy((total / (255 * scale * scale)).astype(np.float32))[None]

    def render_bytes(self, index: int, top: int, left: int, height: int, width: int, *, scale: int = 1) -> Tensor:
        """A box as `render` has it, in bytes, halves rounded up: (1, height / scale, width / scale) uint8."""
        total, area = self._total(index, top, left, height, width, scale), scale * scale
        return torch.from_numpy(((2 * total + area) // (2 * area)).astype(np.uint8))[None]

    def _total(self, index: int, top: int, left: int, height: int, width: int, scale: int) -> Ints:
        """The sums of a box's bytes over scale×scale pixels each, (rows, columns)."""
        if scale < 1 or height < 1 or width < 1 or height % scale or width % scale:
            raise ValueError(f"the box, {height}×{width}, must be whole pixels of scale={scale}, one at least")
        scene, corner = self.scene(index), np.array([top, left])
        rows, columns = height // scale, width // scale
        total = np.zeros((rows, columns), np.int64)
        places = scene.places - corner
        for number in np.flatnonzero(((places < (height, width)) & (places + self.place_size > 0)).all(-1)).tolist():
            shade = INHABITED_SHADE if number < self.n_inhabited else SHADE
            down = covered(int(places[number, 0]), self.place_size, scale, rows)
            across = covered(int(places[number, 1]), self.place_size, scale, columns)
            total += shade * down[:, None] * across
        seen = scene.touched(top, left, height, width)
        is_digit = seen < self.n_inhabited
        noise, digits = seen[~is_digit], seen[is_digit]
        which = (
            scene.glyph_ids[noise] - self.n_digits + _N_NOISE_GLYPHS * np.searchsorted(_GROUNDS, scene.shades[noise])
        )
        add_glyphs(total, self._sums, which, scene.corners[noise] - corner, scale)
        if len(digits):
            sums = over(INHABITED_SHADE, self.glyphs[scene.glyph_ids[digits]])
            add_glyphs(total, sums, np.arange(len(digits)), scene.corners[digits] - corner, scale)
        return total


@dataclass(frozen=True)
class GigapixelImage:
    """An image as an `ats.ImageSource`, whose levels halve down to 1/256 and are rendered as they are read.

    Each pixel of a level is the mean over its area at full resolution: in float32, or where `dtype` is uint8 the byte
    nearest to it.
    """

    dataset: GigapixelMNIST
    index: int
    channels: int = 1
    dtype: torch.dtype = torch.float32
    mpp: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"Gigapixel MNIST {self.dataset.split} {self.dataset.first + self.index}"

    @property
    def levels(self) -> Sequence[Level]:
        """See `ats.sources.ImageSource`."""
        return _levels(self.dataset.image_size)

    @property
    def fingerprint(self) -> str:
        """All that the pixels depend on."""
        data = self.dataset
        numbers = (
            *(data.image_size, data.n_places, data.place_size, data.n_inhabited, data.n_target, data.place_noise),
            *(data.n_noise, data.seed, data.split, data.first + self.index, data.glyph_checksum),
        )
        kind = "" if self.dtype == torch.float32 else f":{self.dtype}"
        return f"gigapixel-mnist:{':'.join(map(str, numbers))}{kind}"

    def read(self, level: int, top: int, left: int, height: int, width: int) -> Tensor:
        """See `ats.sources.ImageSource`."""
        level, top, left, height, width = check_box(self, level, top, left, height, width)
        scale = 2**level
        box = (side * scale for side in (top, left, height, width))
        render = self.dataset.render_bytes if self.dtype == torch.uint8 else self.dataset.render
        return render(self.index, *box, scale=scale)


@functools.cache
def _levels(image_size: int) -> tuple[Level, ...]:
    halves = [image_size]
    while len(halves) < 9 and halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    return tuple(Level(side, side) for side in halves)


def _key(split: str, index: int, *, noise: bool = False) -> int:
    return (_SPLITS[split] * 2 + noise + 16) << 48 | index  # beside those of Megapixel MNIST


def _spacing(place_size: int) -> int:
    """A side of the squares in which one place lies at most."""
    return place_size + place_size // 3


def _below(bits: np.random.Philox, bound: int, count: int) -> Ints:
    return (bits.random_raw(count) % bound).astype(np.int64) if count else np.empty(0, np.int64)


def _in_slots(bits: np.random.Philox, count: int, across: int, slot: int, size: int) -> Ints:
    """The corners (count, 2) of as many squares, each anywhere within a slot of its own of across×across."""
    taken: dict[int, None] = {}
    while len(taken) < count:
        taken.update(dict.fromkeys(_below(bits, across**2, count + 4).tolist()))
    slots = np.array(list(taken)[:count], np.int64)
    free = slot - size + 1
    return _corners(slots, _below(bits, free**2, count), across, slot, free)


def _corners(slots: Ints, jitter: Ints, across: int, slot: int, free: int) -> Ints:
    return np.stack([slots // across * slot + jitter // free, slots % across * slot + jitter % free], -1)
