"""What modules of this package have in common: names that mean something, and a mode that can be told."""

import contextlib
import difflib
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn


class SealedModule(nn.Module):
    """A module whose attributes are fixed once it is made: assigning a name that means nothing is an error.

    What a subclass sets in its own ``__init__`` is known, and so is whatever begins with an underscore, for which
    Lightning and PyTorch have their uses.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        make = cls.__dict__.get("__init__")
        if make is None:
            return

        @functools.wraps(make)
        def sealing(self: nn.Module, *args: Any, **given: Any) -> None:
            make(self, *args, **given)
            if type(self).__init__ is sealing:  # the outermost, after which nothing is left to be set
                self.__dict__["_sealed"] = True

        cls.__init__ = sealing  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_sealed") and not name.startswith("_") and not self._has(name):
            known = [one for one in dir(self) if not one.startswith("_")]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "set what is new in the __init__ of a subclass"
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}, to which {value!r:.80} was assigned; {hint}"
            )
        super().__setattr__(name, value)

    def _has(self, name: str) -> bool:
        kept = self.__dict__, self._parameters, self._buffers, self._modules
        return hasattr(type(self), name) or any(name in names for names in kept)


def check_evaluating(**parts: object) -> None:
    """Raise where a module of `parts`, found by their names, behaves in training as it does not in evaluation.

    Its features of a patch would depend on what else is read, and reading would move a batch norm's statistics. A
    module in training that does the same in evaluation may be.
    """
    if torch.compiler.is_compiling():
        return
    for part, module in ((part, module) for part, value in parts.items() for module in modules_in(value)):
        for name, layer in module.named_modules():
            at = f"{part}.{name}" if name else part
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
                raise ValueError(
                    f"{at} ({type(layer).__name__}) keeps no running statistics, so that a patch's features depend on "
                    "what else is read, in evaluation as in training; use track_running_stats=True, or another norm"
                )
            if layer.training and _differs(layer):
                raise ValueError(
                    f"{at} ({type(layer).__name__}) is in training mode, where a patch's features depend on what else "
                    "is read, or on chance; call model.eval() first"
                )


def _differs(layer: nn.Module) -> bool:
    """Whether a module does in training what it does not in evaluation, apart from the modules in it."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.track_running_stats
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return layer.dropout > 0
    kind: type = type(layer)
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) or "training" in _names_read(kind)


@functools.cache
def _names_read(kind: type) -> frozenset[str]:
    """The names that a class's forward reads, and the methods of its own that it calls, as their code has them."""
    found, todo = set[str](), ["forward"]
    while todo:
        code = [getattr(inspect.unwrap(getattr(kind, todo.pop())), "__code__", None)]
        while code:
            one = code.pop()
            code += [inner for inner in getattr(one, "co_consts", ()) if inspect.iscode(inner)]
            for name in set(getattr(one, "co_names", ())) - found:
                found.add(name)
                if inspect.isfunction(getattr(kind, name, None)) and not hasattr(nn.Module, name):
                    todo.append(name)
    return frozenset(found)


def modules_in(function: object) -> list[nn.Module]:
    """The modules that a callable is, is a method of, or holds: what a function closes over, names, or is given."""
    if isinstance(function, nn.Module):
        return [function]
    if inspect.ismethod(function):
        return modules_in(function.__self__)
    if isinstance(function, functools.partial):
        parts = function.func, *function.args, *function.keywords.values()
        return [module for part in parts for module in modules_in(part)]
    if not inspect.isfunction(function):
        return []
    held = [function.__globals__.get(name) for name in function.__code__.co_names]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing was put there yet
            held.append(cell.cell_contents)
    return [value for value in held if isinstance(value, nn.Module)]


def run_network(name: str, network: nn.Module, *arguments: Tensor) -> Tensor:
    """What a network makes of (M, …), the view or the patches; an error that is of their dtype or number says so."""
    try:
        return network(*arguments)
    except ValueError as error:
        if len(arguments[0]) > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"the {name} network normalises over the batch, but in training one image with n_patches=1 gives it a "
            "single patch, which has no variance; draw at least 2 patches, give more images, or call .eval() on its "
            f"normalisation layers (torch says: {error})"
            if name == "feature"
            else f"the {name} network normalises over the batch, which has one value a channel in training; give more "
            f"images, or call .eval() on its normalisation layers (torch says: {error})"
        ) from error
    except RuntimeError as error:
        given = arguments[0].dtype
        weights = {weight.dtype for weight in network.parameters() if weight.is_floating_point()} - {given}
        if not weights or "type" not in str(error):
            raise
        wanted = next(iter(weights))
        what, mend = {
            "feature": ("patches", f"pass dtype={wanted} where patches are read, e.g. to AttentionSampling"),
            "attention": ("the view", f"pass view.to({wanted}), or make it by ats.area_downsample(…, dtype={wanted})"),
        }[name]
        raise TypeError(
            f"the {name} network's weights are {wanted}, but {what} {'are' if name == 'feature' else 'is'} {given}; "
            f"{mend} (torch says: {error})"
        ) from error
