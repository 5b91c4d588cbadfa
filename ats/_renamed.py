"""Old names of options, which keep working for a while."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_option(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take an option by its old name, too, with a DeprecationWarning; both at once are an error."""

    # An __init__ is called by what seals its module (`ats._modules`).
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            if old in options:
                if new in options:
                    raise TypeError(f"got both {new}= and {old}=, which is its old name; leave {old}= out")
                level = 3 if function.__name__ == "__init__" else 2
                warnings.warn(f"{old}= is now {new}=; the old name will go", DeprecationWarning, stacklevel=level)
                options[new] = options.pop(old)
            return function(*args, **options)

        return call

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """An attribute's old name, with a DeprecationWarning."""

    def warn(level: int) -> None:
        warnings.warn(f".{old} is now .{new}; the old name will go", DeprecationWarning, stacklevel=level)

    def get(self: object) -> Any:
        warn(3)
        return getattr(self, new)

    def put(self: object, value: object) -> None:
        warn(5)  # by way of two __setattr__
        setattr(self, new, value)

    return property(get, put, doc=f"The old name of `{new}`.")
