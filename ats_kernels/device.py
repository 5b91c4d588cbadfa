"""Device functions that kernels of several ops share."""

import triton
import triton.language as tl

SCALARS = 4  # of a kind that travel with a launch, one a channel


@triton.jit
def of_channel(channel, value_0, value_1, value_2, value_3, CHANNELS: tl.constexpr = 4):
    """The value of each channel; channels from 3 on share the last."""
    value = value_3 if CHANNELS > 3 else value_2
    if CHANNELS > 2:
        value = tl.where(channel == 2, value_2, value)
    if CHANNELS > 1:
        value = tl.where(channel == 1, value_1, value)
    return tl.where(channel == 0, value_0, value)


def padded(values: list[float] | None, default: float) -> list[float]:
    """As many numbers as kernels take, the last of them for all channels that follow."""
    values = values or [default]
    return (values + [values[-1]] * SCALARS)[:SCALARS]


def fits(values: list[float] | None) -> bool:
    """Whether `padded` gives each channel its own value."""
    return values is None or all(value == values[SCALARS - 1] for value in values[SCALARS:])
