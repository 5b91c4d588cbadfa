"""The levels of nested attention as options, `--model.levels 128:10 4:2`; `levels` makes a model of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

FORMAT = "SCALE:DRAWS, SCALE:DRAWS:STRIDE or SCALE:DRAWS:STRIDE:CONTEXT, e.g. 128:10 or 8:2:4:4"


@dataclass(frozen=True)
class LevelOptions:
    """A level.

    Attributes:
        scale: pixels of the image along a side of what its attention network sees as one.
        n: cells drawn, from an image (first level) or a region.
        stride: view pixels a cell; None: that of the experiment's networks.
        context: view pixels around a region that are seen as well; None: a cell's. The first level has none.
    """

    scale: int
    n: int
    stride: int | None = None
    context: int | None = None


def read_levels(texts: Sequence[str]) -> tuple[LevelOptions, ...]:
    """The levels that options name, the outermost first.

    Raises:
        ValueError: a text that names none, scales that do not fall, each a multiple of the next.
    """
    levels = tuple(map(_read_level, texts))
    for outer, inner in pairwise(levels):
        if outer.scale <= inner.scale or outer.scale % inner.scale:
            raise ValueError(
                f"model.levels must have falling scales, each a multiple of the next, got {' '.join(texts)}: "
                f"{outer.scale} is followed by {inner.scale}"
            )
    if levels and levels[0].context:
        raise ValueError(f"model.levels: the first sees whole images and has no context: leave it out of {texts[0]!r}")
    return levels


def _read_level(text: str) -> LevelOptions:
    parts = text.split(":")
    if not 2 <= len(parts) <= 4 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"model.levels has {text!r}, expected {FORMAT}")
    numbers = [int(part) for part in parts]
    if min(numbers[:3]) < 1:
        raise ValueError(f"model.levels has {text!r}, in which scale, draws and stride must be at least 1")
    return LevelOptions(*numbers)
