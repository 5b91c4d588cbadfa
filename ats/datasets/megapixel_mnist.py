"""Megapixel MNIST (paper, section 4.2): a few digits and many patches of noise on a large black image.

Five digits that don't overlap, three of the target class and two of others; the label is the class that occurs
most. An image is kept as glyphs and places and rendered when asked for. Each depends on nothing but the seed,
the split and its index, and only on integer arithmetic: it is the same on every machine.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ats.datasets.integers import Integers
from ats.datasets.mnist import Digits

GLYPH = 28  # pixels, a side of a digit or a patch of noise
N_CLASSES = 10
_SPLITS = {"train": 0, "validation": 1, "test": 2, "small": 3, "medium": 4}
_N_NOISE_GLYPHS = 2000
_TRIES = 1000


def members_by_class(digits: Digits) -> list[np.ndarray]:
    """Where the digits of each class are, an int64 array a class; ValueError where a class has none."""
    members = [(digits.labels == label).nonzero().flatten().numpy() for label in range(N_CLASSES)]
    if any(len(each) == 0 for each in members):
        raise ValueError(f"digits must hold every class 0-9, got {digits.labels.unique().tolist()}")
    return members


class MegapixelMNIST(Dataset[tuple[Tensor, int]]):
    """`n_images` images of (1, image_size, image_size) uint8 and their labels.

    Args:
        digits: the handwritten digits to place; take those of another split for testing.
        n_images: images in the set. A longer set starts with the images of a shorter one.
        image_size: pixels a side.
        n_noise: patches of noise an image, each two random strokes in 28×28, anywhere.
        n_digits: digits an image, none overlapping another.
        n_target: how many of them are of the target class; more than half.
        seed, split: which images; "train", "validation" or "test", or "small" or "medium" for more to train on.
        first: how many of the split's images to leave out before the first.

    Raises:
        ValueError: sizes that do not fit each other, an unknown split, a class without digits.
    """

    def __init__(
        self,
        digits: Digits,
        n_images: int,
        *,
        image_size: int = 1500,
        n_noise: int = 50,
        n_digits: int = 5,
        n_target: int = 3,
        seed: int = 0,
        split: str = "train",
        first: int = 0,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {', '.join(map(repr, _SPLITS))}")
        if min(n_images, n_noise, first) < 0:
            raise ValueError(f"n_images, n_noise and first must be at least 0, got {n_images}, {n_noise} and {first}")
        if image_size < GLYPH:
            raise ValueError(f"image_size must be at least {GLYPH}, a digit's size, got {image_size}")
        if not n_digits / 2 < n_target <= n_digits:
            raise ValueError(f"n_target must be more than half of n_digits={n_digits} and no more, got {n_target}")
        by_class = members_by_class(digits)
        self.image_size = image_size
        self.n_digits = n_digits
        noise = noise_glyphs(np.random.Philox(key=[seed, _key(split, 0, noise=True)]), _N_NOISE_GLYPHS)
        self.glyphs = torch.cat([digits.images, noise])  # (G, 28, 28)
        self.labels = torch.empty(n_images, dtype=torch.int64, device="cpu")
        self.glyph_ids = torch.empty(n_images, n_digits + n_noise, dtype=torch.int32, device="cpu")
        self.places = torch.empty(n_images, n_digits + n_noise, 2, dtype=torch.int32, device="cpu")  # top-left (y, x)
        first_noise = len(digits.images)
        for index in range(n_images):
            random = Integers(np.random.Philox(key=[seed, _key(split, first + index)]), 4 * (n_digits + n_noise) + 1)
            target = random.below(N_CLASSES)
            others = [(target + 1 + random.below(N_CLASSES - 1)) % N_CLASSES for _ in range(n_digits - n_target)]
            members = [by_class[label] for label in [target] * n_target + others]
            ids = [int(some[random.below(len(some))]) for some in members]
            ids += [first_noise + random.below(_N_NOISE_GLYPHS) for _ in range(n_noise)]
            places = _places_apart(random, n_digits, image_size)
            places += [_place(random, image_size) for _ in range(n_noise)]
            self.labels[index] = target
            self.glyph_ids[index] = torch.tensor(ids, dtype=torch.int32, device="cpu")
            self.places[index] = torch.tensor(places, dtype=torch.int32, device="cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image (1, H, W) uint8 and label."""
        return self.render([index])[0], int(self.labels[index])

    def render(self, indices: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> Tensor:
        """The images of `indices` as (B, 1, H, W) uint8 on `device`. Where glyphs overlap the brighter pixel wins."""
        which = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        side = self.image_size
        pixels = self.glyphs[self.glyph_ids[which].long()].to(device)  # (B, G, 28, 28)
        places = self.places[which].to(device, torch.int64)  # (B, G, 2)
        along = torch.arange(GLYPH, device=device)
        rows, columns = places[..., 0, None] + along, places[..., 1, None] + along  # (B, G, 28)
        flat = rows.unsqueeze(-1) * side + columns.unsqueeze(-2)  # (B, G, 28, 28)
        canvas = torch.zeros(len(which), side * side, dtype=torch.uint8, device=device)
        canvas.scatter_reduce_(1, flat.flatten(1), pixels.flatten(1), "amax")
        return canvas.view(-1, 1, side, side)


def _key(split: str, index: int, *, noise: bool = False) -> int:
    return (_SPLITS[split] * 2 + noise) << 48 | index


def _place(random: Integers, image_size: int) -> tuple[int, int]:
    bound = image_size - GLYPH + 1
    return random.below(bound), random.below(bound)


def _places_apart(random: Integers, count: int, image_size: int) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    for _ in range(_TRIES):
        if len(places) == count:
            return places
        y, x = _place(random, image_size)
        if all(abs(y - other[0]) >= GLYPH or abs(x - other[1]) >= GLYPH for other in places):
            places.append((y, x))
    if len(places) == count:
        return places
    raise ValueError(
        f"{count} digits of {GLYPH}×{GLYPH} that don't overlap found no room in {image_size}×{image_size}; "
        "make the images larger"
    )


def noise_glyphs(bits: np.random.Philox, count: int) -> Tensor:
    """Patches (count, 28, 28) uint8 with two straight strokes each, about as thick as a digit's, soft-edged."""
    ends = torch.from_numpy((bits.random_raw(count * 8) % (GLYPH - 4)).astype(np.int64)) + 2
    start, end = ends.view(count, 2, 2, 2, 1, 1).unbind(2)  # each (count, stroke, yx, 1, 1)
    grid = torch.stack(
        torch.meshgrid(torch.arange(GLYPH, device="cpu"), torch.arange(GLYPH, device="cpu"), indexing="ij")
    )  # (2, 28, 28)
    along, offset = end - start, grid - start
    length = (along * along).sum(2).clamp(min=1)  # (count, stroke, 1, 1), squared; 1 where a stroke is a dot
    dot = (along * offset).sum(2).clamp(min=0).minimum(length)  # how far along the stroke, times its length²
    # Squared distance to the stroke's nearest point, times length²: integers, so rounding cannot differ.
    nearest = (offset * offset).sum(2) * length - 2 * dot * (along * offset).sum(2) + dot * dot
    ink = sum(((nearest * 4 <= reach * length) * 85) for reach in (4, 8, 12))  # within 1, 1.4 and 1.7 pixels
    assert isinstance(ink, Tensor)
    return ink.amax(1).to(torch.uint8)
