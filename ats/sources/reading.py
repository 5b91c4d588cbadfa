"""Reading many boxes at once: by a few threads, each with handles of its own, while something else computes."""

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from ats.sources.image_source import ImageSource


class Box(NamedTuple):
    """Pixels of one level of one image, wholly inside it."""

    source: ImageSource
    level: int
    top: int
    left: int
    height: int
    width: int


class Clipped(NamedTuple):
    """The part of a box that is inside an image, and how many pixels to pad on each side to make up for the rest.

    A box that lies outside has height or width 0 and is all padding.
    """

    top: int
    left: int
    height: int
    width: int
    above: int
    below: int
    before: int
    after: int


def clip_box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> Clipped:
    """The part of a box that is inside an image of `size` (H, W)."""
    first_row, last_row, above, below = _clip(size[0], top, height)
    first_column, last_column, before, after = _clip(size[1], left, width)
    return Clipped(
        first_row, first_column, last_row - first_row, last_column - first_column, above, below, before, after
    )


def _clip(size: int, begin: int, length: int) -> tuple[int, int, int, int]:
    first = min(max(begin, 0), size)
    last = min(max(begin + length, first), size)
    before = min(max(0, -begin), length)
    return first, last, before, length - before - (last - first)


def read_boxes(boxes: Iterable[Box | tuple[ImageSource, int, int, int, int, int]], *, threads: int = 4) -> list[Tensor]:
    """Read boxes, of any images and sizes, in the order given: a list of (C, height, width).

    The threads are kept for the next call, so that files stay open. A source is read by several threads at once; those
    of `ats.sources` are made for it.

    Args:
        boxes: (source, level, top, left, height, width) each.
        threads: that read; 0 reads here and now.

    Raises:
        ValueError: a box that is not inside its level, a damaged file. The first one in order, once all have ended.
    """
    wanted = [Box(*box) for box in boxes]
    if threads < 1 or len(wanted) < 2:
        return [_read(box) for box in wanted]
    futures = [_pool(threads).submit(_read, box) for box in wanted]
    failed = [future.exception() for future in futures]
    for error in failed:
        if error is not None:
            raise error
    return [future.result() for future in futures]


def _read(box: Box) -> Tensor:
    return box.source.read(box.level, box.top, box.left, box.height, box.width)


_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """This process's pool of as many threads; a fork takes no threads along."""
    key = (os.getpid(), threads)
    with _lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="ats-read")
        return _pools[key]


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
