"""Which options a command's help shows: those that mean something with the method that was chosen."""

import dataclasses
import typing
from typing import Annotated, Any


class ForMethods(tuple[str, ...]):
    """In an option's type: the values of `ModelConfig.method` that it means something with."""

    __slots__ = ()


SAMPLING = ForMethods(("ats", "uniform"))
ATTENTION = ForMethods(("ats",))
BAGS = ForMethods(("mil", "gated-mil"))
PATCHES = ForMethods((*SAMPLING, *BAGS))
CNN = ForMethods(("cnn",))


def shown_for(method: str, values: Any) -> Any:
    """A dataclass's values, of a type whose help leaves out options of other methods, at any depth.

    For a parser that shows its help and ends: what it would parse is of that type, too.
    """
    import tyro  # only now: what reads a configuration needs no parser

    kind = type(values)
    annotations: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for field, hint in typing.get_type_hints(kind, include_extras=True).items():
        value = getattr(values, field, None)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts[field] = shown_for(method, value)
            annotations[field] = type(parts[field])
        elif any(method not in extra for extra in _methods(hint)):
            annotations[field] = Annotated[hint, tyro.conf.Suppress]
    # The names are the original's: the parser reads the options' descriptions from its source.
    names = {"__annotations__": annotations, "__doc__": kind.__doc__, "__module__": kind.__module__}
    defaults = {field: dataclasses.field(default=getattr(values, field)) for field in annotations if field not in parts}
    makers = {field: dataclasses.field(default_factory=type(part)) for field, part in parts.items()}
    shown: Any = dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), names | defaults | makers))
    return shown(
        **{field.name: parts.get(field.name, getattr(values, field.name)) for field in dataclasses.fields(kind)}
    )


def _methods(hint: Any) -> list[ForMethods]:
    return [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, ForMethods)]
