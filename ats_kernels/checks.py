"""Argument checks that several ops share. Each error says what came, what was expected and how to mend it."""

import math
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ats_kernels import advice
from ats_kernels.backend import may_look

IMAGE_DTYPES = (
    torch.uint8,
    torch.uint16,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)

_FEW = 64  # up to so many numbers are looked at one by one, without an operation of an array
_ARRAYS = (np.ndarray, Tensor)  # a union of them is nothing that torch.compile can trace

Padding = Literal["zeros", "edge"]
Estimator = Literal["ordered", "unordered"]
Normalisation = float | Sequence[float] | np.ndarray | Tensor | None


def check_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{advice.to_tensor(name, value)}")


def check_image(image: Tensor) -> None:
    """Raise unless `image` is a non-empty (B, C, H, W) tensor of a dtype that patches can be read from."""
    check_tensor("image", image)
    if image.dtype not in IMAGE_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in IMAGE_DTYPES)
        raise TypeError(f"image has dtype {image.dtype}, expected one of {names}; {advice.image_dtype(image)}")
    last = image.ndim in (3, 4) and _channels_look_last(image)
    if image.ndim != 4:
        mend = {
            1: "a row of pixels needs image[None, None, None]",
            2: "a single grey image (H, W) needs image[None, None]",
            3: f"a single image needs image{'.movedim(-1, 0)' if last else ''}[None]"
            + (", as its channels seem to come last" if last else ""),
        }.get(image.ndim, "dimensions before (C, H, W) are joined to one by image.flatten(0, -4)")
        raise ValueError(f"image must be (B, C, H, W), got {image.ndim} dimensions: {tuple(image.shape)}; {mend}")
    if image.numel() == 0:
        raise ValueError(f"image is empty: {tuple(image.shape)}; every dimension must be at least 1")
    if last:
        raise ValueError(
            f"image must be (B, C, H, W), got {tuple(image.shape)}, whose channels seem to come last; bring them "
            f"forward with image.movedim(-1, 1), or, if it has {image.shape[1]} channels, say so with "
            "image.to(memory_format=torch.channels_last)"
        )


def _channels_look_last(image: Tensor) -> bool:
    """Whether (…, a, b, c) reads as (H, W, C): few columns of a long list of channels, not beside each other in memory.

    Three or four columns, or one of whole numbers, are enough; other numbers must be as few as bands are, and a and b
    be as an image's sides: signals have one column, too.
    """
    if image.stride(-3) == 1:
        return False
    channels, height, width = image.shape[-3:]
    whole = width == 1 and min(channels, height) >= 32 and not image.is_floating_point()
    return whole or reads_as_channels_last(channels, height, width)


def reads_as_channels_last(channels: int, height: int, width: int) -> bool:
    """Whether sizes (C, H, W) are more likely those of (H, W, C)."""
    short, long = min(channels, height), max(channels, height)
    if width > 32 or short < 32:
        return False
    return width in (3, 4) or (4 * width <= short and long <= 4 * short)


def check_floating(name: str, value: Tensor) -> None:
    """Raise unless `value` is a floating-point tensor."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}; {advice.to_floating(name, value)}")


def check_log_probabilities(name: str, value: Tensor, *, distinct: bool = False) -> None:
    """Raise where `value` holds numbers that no log-probability can be; on the CPU only, as a GPU would make us wait.

    With `distinct` each row (N,) is of different cells, whose probabilities add up to 1 at most. What rounding leaves
    above passes, and so does NaN, which marks a row that could not be drawn from.
    """
    if not may_look(value):
        return
    if value.numel() <= _FEW and _few_are_log_probabilities(value.tolist(), _slack(value) if distinct else math.inf):
        return
    value = value.detach()
    numbers = (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # whose small operations cost less
    if numbers.size == 0:
        return
    if np.fmax.reduce(numbers, axis=None) > 1e-6:  # the largest but for NaN
        above = numbers > 1e-6
        raise ValueError(
            f"{name} holds {int(above.sum())} value(s) above 0, up to {float(numbers[above].max()):.4g}, which "
            "are no log-probabilities; pass log_attention of PatchSample, not probabilities or logits"
        )
    if not distinct:
        return
    slack = _slack(value)
    totals = np.add.reduce(np.exp(numbers), -1, np.float64)
    if np.fmax.reduce(totals) > 1 + slack:
        row = int((totals > 1 + slack).argmax())
        raise ValueError(
            f"the probabilities exp({name}) of row {row} add up to {totals[row]:.4g}, which those of different cells "
            "cannot: cells drawn with replacement are pooled with replace=True, and anything but log_attention of "
            "PatchSample is no log-probability"
        )


def _few_are_log_probabilities(rows: list, slack: float) -> bool:
    """Whether all is well with rows (B, N); False also of NaN, and of what has not two dimensions."""
    for row in rows:
        if not isinstance(row, list) or not max(row, default=0.0) <= 1e-6 or not sum(map(math.exp, row)) <= 1 + slack:
            return False
    return True


def _slack(value: Tensor) -> float:
    return 1e-3 if value.dtype in (torch.float32, torch.float64) else 5e-2


def check_generator(generator: object, device: torch.device) -> None:
    """Raise unless `generator` is None or a generator for tensors on `device`."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {type(generator).__name__}: {generator!r}; "
            f"make one from a seed with torch.Generator({device.type!r}).manual_seed(seed)"
        )
    if device.type not in (generator.device.type, "meta"):
        raise ValueError(
            f"generator is on {generator.device} but the logits are on {device}; "
            f"make it there with torch.Generator({device.type!r})"
        )
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "a draw with a generator of its own was run again in the backward pass, as activation checkpointing does: "
            "the generator has moved on, so that other cells would be drawn than in the forward pass, and the gradient "
            "would be wrong. Leave the generator out there, for torch's own is wound back; or draw outside of the "
            "checkpointed part"
        )


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return `value` as an int, or raise unless it is a whole number of at least `least`; NumPy's and tensors are."""
    number = value if isinstance(value, int) and not isinstance(value, bool) else _whole(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _whole(name: str, value: object) -> int:
    boolean = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool))
    if not boolean:
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    whole = isinstance(value, (float, np.floating)) and math.isfinite(value) and value == int(value)
    mend = f"; {name}=int({value}) is the same number" if whole else ""
    raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}{mend}")


def check_drawn_features(features: Tensor, name: str, drawn: Tensor) -> None:
    """Raise unless features (B, N, …) are those of the draws of `drawn` (B, N), which goes by `name`, on its device."""
    if features.ndim < 2 or features.shape[:2] != drawn.shape:
        raise ValueError(
            f"features must be (B, N, …) with (B, N) = {tuple(drawn.shape)} as {name} has, got "
            f"{tuple(features.shape)}; patches that went through a network as one batch need "
            "features.unflatten(0, (B, N))"
        )
    if features.device != drawn.device:
        raise ValueError(f"features are on {features.device} but {name} is on {drawn.device}; move one to the other")


def check_pair(name: str, value: object) -> tuple[int, int]:
    """Return an int or a pair (height, width) as a pair, or raise unless both are at least 1."""
    if type(value) is int and value > 0:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int and min(value) > 0:
        return value
    if isinstance(value, _ARRAYS) and value.ndim:
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{name} must be an int or a pair (height, width), got {value!r}")
        return check_count(f"{name}[0]", value[0]), check_count(f"{name}[1]", value[1])
    side = check_count(name, value)
    return side, side


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:  # of an array even the question is an error
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False: of texts and arrays the truth is seldom what is meant."""
    if not isinstance(value, bool):
        number = isinstance(value, (int, np.bool_)) or (isinstance(value, _ARRAYS) and not value.ndim)
        mend = f"; {name}=bool({value}) is one" if number and not isinstance(value, str) else ""
        raise TypeError(f"{name} must be True or False, got {value!r}{mend}")


def check_number(name: str, value: object) -> float:
    """Return `value` as a float, or raise unless it is one finite number; NumPy's and tensors are."""
    if isinstance(value, (*_ARRAYS, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def check_normalisation(
    mean: Normalisation, std: Normalisation, image: Tensor
) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and std as one float a channel (None where not given)."""
    channels = image.shape[1]
    means, stds = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if stds is not None and not all(value > 0 for value in stds):
        raise ValueError(f"std must be positive, got {stds}; leave std out to keep the image's scale")
    if image.dtype == torch.uint8:
        # Of numbers in [0, 1] a mean is no larger than 1 and a std than 1/2; a larger std may be a scale of one's own.
        for name, values, most in (("mean", means, 1.0), ("std", stds, 10.0)):
            if values is not None and max(values) > most:
                raise ValueError(
                    f"{name} {values} is of bytes, but a uint8 image is scaled to [0, 1] before: divide mean and std "
                    "by 255"
                )
    return means, stds


def _per_channel(name: str, value: Normalisation, channels: int) -> list[float] | None:
    if value is None:
        return None
    if isinstance(value, _ARRAYS):
        value = value.tolist()  # a number or a list
    if not isinstance(value, list | tuple):
        return [_number(name, value)] * channels
    values = [_number(name, x) for x in value]
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} values but the image has {channels} channels; give one a channel")
    return values


def _number(name: str, value: object) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, (*_ARRAYS, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, or one a channel, got {type(value).__name__}: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}; leave it out to keep the image's values")
    return float(value)


def output_dtype(image: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that comes out: `dtype`, or float32 for integer images and the image's own otherwise."""
    if dtype is None:
        return image.dtype if image.is_floating_point() else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype}; what comes out is normalised")
    return dtype


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any of `dtypes` is, else float32: half precision is for storage only."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_channels_last(image: Tensor) -> bool:
    """Whether a pixel's channels lie beside each other in memory; then they do in what comes out, too."""
    return image.shape[1] > 1 and 0 < image.stride(1) < image.stride(3)


def bits(image: Tensor) -> Tensor:
    """The same memory as a dtype that all operators take: int16 in place of uint16, which few do."""
    return image.view(torch.int16) if image.dtype == torch.uint16 else image


def normalise(
    values: Tensor, means: list[float] | None, stds: list[float] | None, *, channel_dim: int, is_byte: bool
) -> Tensor:
    """Bring `values` (any float dtype) from the image's scale to the network's: (x [/ 255] − mean) / std."""
    if means is None and stds is None and not is_byte:
        return values
    shape = [1] * values.ndim
    shape[channel_dim] = -1
    if is_byte:
        values = values / 255
    if means is not None:
        values = values - values.new_tensor(means).view(shape)
    if stds is not None:
        values = values / values.new_tensor(stds).view(shape)
    return values
