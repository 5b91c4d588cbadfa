"""How to mend an argument of the wrong kind: ends of error messages, whose advice works and loses nothing.

They are made once an error is certain, so that they may look at values.
"""

import numpy as np
import torch
from torch import Tensor


def to_tensor(name: str, value: object) -> str:
    """What makes `value` a tensor, after a semicolon; nothing where nothing is known to."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, Tensor) for item in value):
        if len({tuple(item.shape) for item in value}) == 1:
            return f"; join its {len(value)} tensors with torch.stack({name}), or torch.cat({name}) if they are batches"
        return (
            f" of tensors of different sizes, which make no batch; take them one at a time, e.g. {name}[0][None] (what "
            "draws patches, such as ats.sample_patches and ats.predict, takes a list as it is)"
        )
    source = name
    if not isinstance(value, np.ndarray):
        try:
            array = np.asarray(value)
        except ValueError:  # a list whose lists differ in length
            return " whose rows differ in length; pad them to one length"
        if not isinstance(value, int | float | list | tuple):
            source = f"numpy.asarray({name})"
    else:
        array = value
    if array.dtype.kind not in "biufc":
        return ""
    if not array.dtype.isnative:
        source += f'.astype("{array.dtype.newbyteorder("=").name}")'
    elif any(stride < 0 for stride in array.strides):
        source += ".copy()"
    return f"; convert it with torch.as_tensor({source})"


def to_floating(name: str, value: Tensor) -> str:
    """What makes a tensor floating point without a loss."""
    if value.is_complex():
        return f"take a part of it, {name}.real or {name}.abs()"
    return f"convert with {_floating(name, value)}"


def _floating(name: str, value: Tensor) -> str:
    if value.dtype.itemsize <= 2:
        return f"{name}.float()"
    largest = _largest(value)
    if largest is not None and largest > 2**53:
        return f"{name}.double() once its numbers, which reach {largest}, are brought below 2**53, or digits are lost"
    return f"{name}.double()"


def _largest(value: Tensor) -> int | None:
    """The largest magnitude of whole numbers, where the host can look."""
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return None
    numbers = value.detach().numpy()  # torch has no minimum of unsigned numbers
    return max(-int(numbers.min()), int(numbers.max()))


def image_dtype(image: Tensor) -> str:
    """What makes an image one of a dtype that is read, with the same numbers."""
    if image.is_complex():
        return "take a part of it, image.real or image.abs()"
    if image.is_floating_point() or image.is_quantized:  # narrow ones
        return f"convert it with image.{'dequantize' if image.is_quantized else 'float'}(), which loses nothing"
    if image.dtype in (torch.bool, torch.int8):
        return "convert it with image.to(torch.int16), which keeps its numbers as they are"
    return (
        f"convert it with {_floating('image', image)}, which keeps its numbers as they are; smaller are "
        "image.to(torch.uint16), if all lie from 0 to 65535, and image.to(torch.uint8), if they are bytes: those are "
        "scaled to [0, 1]"
    )


def offsets(value: Tensor) -> str:
    """What makes pixel numbers of a tensor."""
    return (
        "round and convert with offsets.round().long()" if value.is_floating_point() else "convert with offsets.long()"
    )
