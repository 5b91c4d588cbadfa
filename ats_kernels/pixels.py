"""Whose fault NaN and infinity are, a network's or the pixels' that it was given. Looked at once they have shown."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ats_kernels.backend import may_look

_P = ParamSpec("_P")
_R = TypeVar("_R")


class NonFiniteError(ValueError):
    """Numbers that are NaN or infinite, or the lack of any others."""


def check_pixels(name: str, image: Tensor) -> None:
    """Raise if pixels (B, C, H, W) are NaN or infinite, and say which is the first."""
    if not image.is_floating_point() or image.device.type == "meta":
        return
    bad = image.detach().isfinite().logical_not_()
    count = int(bad.sum())
    if count:
        where = [int(index) for index in bad.nonzero()[0]]
        axes = "image", "channel", "row", "column"
        place = ", ".join(f"{axis} {index}" for axis, index in zip(axes, where, strict=False))
        value = float(image.detach()[tuple(where)])
        raise NonFiniteError(
            f"{name} holds {count} NaN or infinite pixel(s), the first ({value}) in {place} of {tuple(image.shape)}; "
            f"leave that image out, or replace them, e.g. {name}.nan_to_num(0, 0, 0)"
        )


def check_cause(name: str, images: object, result: Tensor) -> None:
    """Raise if `result` is NaN or infinite and pixels are, of a batch or a sequence; looked at on the CPU only.

    A network may well make something of such pixels, and may fail without them: neither is an error here.
    """
    if may_look(result) and not result.detach().isfinite().all():
        _check_all(name, images)


def _check_all(name: str, images: object) -> None:
    """Check a tensor, or each tensor in a sequence."""
    if isinstance(images, Tensor):
        check_pixels(name, images)
    elif isinstance(images, list | tuple):
        for number, one in enumerate(images):
            if isinstance(one, Tensor):
                check_pixels(f"{name}[{number}][None]", one[None])


def blames_pixels(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a function that ends in a `NonFiniteError` say so if its argument `image` or `view` is the cause."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def blaming(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except NonFiniteError as error:
            given = signature.bind(*args, **kwargs).arguments
            for name in ("image", "view"):
                try:
                    _check_all(name, given.get(name))
                except NonFiniteError as cause:
                    raise cause from error
            raise

    return blaming
