"""Open files of readers that are not safe to share: one handle a (process, thread), and never one from before a fork.

A handle that was opened before a fork reads wrong pixels in the children, in silence, with most readers; a handle that
several threads use crashes with some.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

MOST_OPEN = 16
"""Handles that a thread keeps open, least recently used ones being closed."""


class Handle(Protocol):
    """Something open."""

    def close(self) -> None:
        """Close it."""


class _Open:
    """The open handles of one thread; unlike a dictionary it can be referred to weakly."""

    def __init__(self) -> None:
        self.handles: OrderedDict[Hashable, Any] = OrderedDict()


_LOCAL = threading.local()
_ALL: "weakref.WeakSet[_Open]" = weakref.WeakSet()
_LOCK = threading.Lock()
_kept: list[_Open] = []  # the parent's handles, in a child: closing them there could disturb or lock up the library

H = TypeVar("H", bound=Handle)


def handle(key: Hashable, opened: Callable[[], H]) -> H:
    """This thread's handle of `key`, opened now if it is not."""
    handles = _mine()
    if key in handles:
        handles.move_to_end(key)
        found: H = handles[key]
        return found
    made = opened()
    while len(handles) >= MOST_OPEN:
        handles.popitem(last=False)[1].close()
    handles[key] = made
    return made


def discard(key: Hashable) -> None:
    """Close this thread's handle of `key`, which an error may have spoilt."""
    found = _mine().pop(key, None)
    if found is not None:
        found.close()


def _mine() -> OrderedDict[Hashable, Any]:
    if getattr(_LOCAL, "process", None) != os.getpid():
        _LOCAL.process, _LOCAL.open = os.getpid(), _Open()
        with _LOCK:
            _ALL.add(_LOCAL.open)
    mine: _Open = _LOCAL.open
    return mine.handles


def _before_fork() -> None:
    _LOCK.acquire()
    _kept.extend(_ALL)


def _in_parent() -> None:
    _kept.clear()
    _LOCK.release()


def _in_child() -> None:
    global _LOCK
    _LOCK = threading.Lock()
    _ALL.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
