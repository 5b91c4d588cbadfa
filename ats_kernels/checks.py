"""Argument checks that several ops share. Each error says what came, what was expected and how to mend it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ats_kernels.backend import is_transformed

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)

Normalisation = float | Sequence[float] | Tensor | None


def check_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor")


def check_image(image: Tensor) -> None:
    """Raise unless `image` is a non-empty (B, C, H, W) tensor of a dtype that patches can be read from."""
    check_tensor("image", image)
    if image.dtype not in IMAGE_DTYPES:
        raise TypeError(
            f"image has dtype {image.dtype}, expected one of uint8, float16, bfloat16, float32, float64; "
            "convert it, e.g. image.to(torch.uint8)"
        )
    last = image.ndim in (3, 4) and _channels_look_last(image)
    if image.ndim != 4:
        single = "image.movedim(-1, 0)[None], as its channels seem to come last" if last else "image[None]"
        raise ValueError(
            f"image must be (B, C, H, W), got {image.ndim} dimensions: {tuple(image.shape)}; "
            f"a single image needs {single}"
        )
    if image.numel() == 0:
        raise ValueError(f"image is empty: {tuple(image.shape)}; every dimension must be at least 1")
    if last:
        raise ValueError(
            f"image must be (B, C, H, W), got {tuple(image.shape)}, whose channels seem to come last; "
            "bring them forward with image.movedim(-1, 1)"
        )


def _channels_look_last(image: Tensor) -> bool:
    """Whether (…, a, b, c) reads as (H, W, C): three or four columns, or one of bytes, of a long list of channels."""
    channels, height, width = image.shape[-3:]
    return min(channels, height) >= 32 and (width in (3, 4) or (width == 1 and image.dtype == torch.uint8))


def check_floating(name: str, value: Tensor) -> None:
    """Raise unless `value` is a floating-point tensor."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}; convert with {name}.float()")


def check_log_probabilities(name: str, value: Tensor) -> None:
    """Raise where `value` holds numbers that no log-probability can be; on the CPU only, as a GPU would make us wait.

    What rounding leaves above 0 passes, and so does NaN, which marks a row that could not be drawn from.
    """
    if not may_look(value):
        return
    above = value.detach() > 1e-6
    if above.any():
        raise ValueError(
            f"{name} holds {int(above.sum())} value(s) above 0, up to {float(value.detach()[above].max()):.4g}, which "
            "are no log-probabilities; pass log_attention of PatchSample, not probabilities or logits"
        )


def may_look(value: Tensor) -> bool:
    """Whether the host may look at the numbers in `value`: a GPU would make it wait, and a trace has none."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


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


def check_count(name: str, value: object) -> int:
    """Return `value` as an int, or raise unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    number = value if isinstance(value, int) else value.__index__()  # a size that torch.compile traces is an int
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def check_pair(name: str, value: object) -> tuple[int, int]:
    """Return an int or a pair (height, width) as a pair, or raise unless both are at least 1."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{name} must be an int or a pair (height, width), got {value!r}")
        return check_count(f"{name}[0]", value[0]), check_count(f"{name}[1]", value[1])
    side = check_count(name, value)
    return side, side


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_normalisation(
    mean: Normalisation, std: Normalisation, channels: int
) -> tuple[list[float] | None, list[float] | None]:
    """Return mean and std as one float a channel (None where not given)."""
    means, stds = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if stds is not None and not all(value > 0 for value in stds):
        raise ValueError(f"std must be positive, got {stds}; leave std out to keep the image's scale")
    return means, stds


def _per_channel(name: str, value: Normalisation, channels: int) -> list[float] | None:
    if value is None:
        return None
    if isinstance(value, int | float):
        return [float(value)] * channels
    if isinstance(value, list | tuple):
        values = [float(x) for x in value]  # without a tensor, whose values torch.compile could not trace
    else:
        given = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        values = (given.expand(channels) if given.ndim == 0 else given.flatten()).tolist()
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} values but the image has {channels} channels; give one a channel")
    return values


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


def normalise(
    values: Tensor, means: list[float] | None, stds: list[float] | None, *, channel_dim: int, is_byte: bool
) -> Tensor:
    """Bring `values` (any float dtype) from the image's scale to the network's: (x [/ 255] − mean) / std."""
    shape = [1] * values.ndim
    shape[channel_dim] = -1
    if is_byte:
        values = values / 255
    if means is not None:
        values = values - values.new_tensor(means).view(shape)
    if stds is not None:
        values = values / values.new_tensor(stds).view(shape)
    return values
