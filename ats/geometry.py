"""Where a cell of the attention grid lies in the full-resolution image.

Along one axis, with H pixels in the image, h in the view, g cells in the grid and rf view pixels lost by an
unpadded attention network:

    step = (h − rf)·(H/h) / g          centre_i = rf/2·(H/h) + (i + ½)·step          top_i = round(centre_i − p/2)

rounded half to even. All of it is rational, so it is computed in integers: the same on every device, and a
half is a half.
"""

import torch
from torch import Tensor, nn


def cell_offsets(
    indices: Tensor,
    grid_size: tuple[int, int],
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    view_size: tuple[int, int] | None = None,
    receptive_field: int = 0,
) -> Tensor:
    """Top-left pixels of the patches centred on cells.

    Args:
        indices: (…) int64, flat cells of a row-major grid.
        grid_size: cells (gh, gw).
        image_size: pixels (H, W).
        patch_size: pixels (ph, pw).
        view_size: pixels (h, w) of the view; needed only where receptive_field > 0.
        receptive_field: view pixels that the attention network loses along an axis, see `receptive_field`.

    Returns:
        (…, 2) int64 pixels (y, x). Patches near the border start or end outside the image.
    """
    view_size = view_size or image_size  # without a loss the view's size cancels out
    cells = indices // grid_size[1], indices % grid_size[1]
    first = [
        _first_pixel(cells[axis], grid_size[axis], image_size[axis], patch_size[axis], view_size[axis], receptive_field)
        for axis in (0, 1)
    ]
    return torch.stack(first, dim=-1)


def _first_pixel(cell: Tensor, grid: int, image: int, patch: int, view: int, lost: int) -> Tensor:
    # centre − patch/2 over the common denominator 2·view·grid
    numerator = (2 * cell + 1) * ((view - lost) * image) + (lost * image - patch * view) * grid
    denominator = 2 * view * grid
    quotient = numerator.div(denominator, rounding_mode="floor")
    twice_rest = 2 * (numerator - quotient * denominator)
    round_up = (twice_rest > denominator) | ((twice_rest == denominator) & (quotient % 2 == 1))
    return quotient + round_up


_POINTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm,
    nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def receptive_field(module: nn.Module) -> int:
    """The view pixels that an attention network loses along an axis, worked out from its layers.

    What a stride leaves over at the far edge is not part of it: give views of which (h − rf) is a multiple of the
    grid's step.

    With padding p, dilation d and stride s, the centre of the first output lies at
    ``c = ½ + Σ (d(k − 1)/2 − p)·j`` view pixels, where j, the product of the strides before the layer, ends as
    the grid's step J. `cell_offsets` puts that centre at rf/2 + J/2, so rf = 2c − J: 0 for 'same' convolutions,
    Σ(k − 1) for unpadded ones, and pooling k×k with stride k adds nothing.

    Args:
        module: a layer or (nested) nn.Sequential of 2-D convolutions, max and average pooling, pointwise
            activations, normalisation and dropout. A layer of your own that mixes no positions says so with an
            attribute ``pointwise = True``.

    Raises:
        ValueError: another layer; layers that differ along the axes; padding that puts the first cell further
            out than half a step, which no rf describes. Pass `receptive_field` as a number then.
    """
    return lost_and_step(module)[0]


def lost_and_step(module: nn.Module) -> tuple[int, int]:
    """`receptive_field` of a network, and the step of its grid, both in view pixels."""
    twice_centre, step = 1, 1
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, (nn.Sequential, *_POINTWISE)) or getattr(layer, "pointwise", False):
            continue
        if not isinstance(layer, _WINDOWED):
            raise ValueError(
                f"cannot work out the receptive field of {type(layer).__name__} ({name or 'the module itself'}); "
                "pass receptive_field as a number: the view pixels lost along an axis"
            )
        kernel, stride, padding, dilation = _window(name, layer)
        twice_centre += (dilation * (kernel - 1) - 2 * padding) * step
        step *= stride
    lost = twice_centre - step
    if lost < 0:
        raise ValueError(
            f"the first cell's centre is {twice_centre / 2} view pixels from the edge, less than half the grid's "
            f"step of {step}; pad the strided layers less (a kernel as large as its stride needs no padding), or "
            "pass receptive_field as a number"
        )
    return lost, step


def _window(name: str, layer: nn.Module) -> tuple[int, int, int, int]:
    if getattr(layer, "ceil_mode", False):
        raise ValueError(
            f"layer {name!r} has ceil_mode=True, so its last cell lies partly outside; use ceil_mode=False"
        )
    kernel, stride = _equal(name, layer, "kernel_size"), _equal(name, layer, "stride")
    dilation = _equal(name, layer, "dilation") if hasattr(layer, "dilation") else 1
    if getattr(layer, "padding", 0) == "same":
        if (dilation * (kernel - 1)) % 2:
            raise ValueError(f"layer {name!r} pads an even kernel on one side more; pass receptive_field as a number")
        return kernel, stride, dilation * (kernel - 1) // 2, dilation
    padding = 0 if getattr(layer, "padding", 0) == "valid" else _equal(name, layer, "padding")
    return kernel, stride, padding, dilation


def _equal(name: str, layer: nn.Module, attribute: str) -> int:
    value = getattr(layer, attribute)
    values = set(value) if isinstance(value, tuple) else {value}
    if len(values) != 1:
        raise ValueError(
            f"layer {name!r} has {attribute}={value}, which differs along the axes; pass receptive_field as a number"
        )
    return int(values.pop())
