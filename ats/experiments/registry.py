"""Which experiments there are. A new one is a file with an `Experiment`, and a line here."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal

from ats.experiments.colon_cancer import COLON_CANCER
from ats.experiments.config import DiagnosticsConfig, ExperimentConfig, ModelConfig, OptimConfig, TrainerConfig
from ats.experiments.experiment import Experiment, ExperimentData
from ats.experiments.gigapixel_mnist import GIGAPIXEL_MNIST
from ats.experiments.images import IMAGES
from ats.experiments.megapixel_mnist import MEGAPIXEL_MNIST
from ats.experiments.speed_limits import SPEED_LIMITS
from ats.experiments.tables import Table

EXPERIMENTS: dict[str, Experiment] = {}
"""By name."""


def register(experiment: Experiment) -> None:
    """Add an experiment to what every command knows.

    Raises:
        ValueError: there is another one of that name.
    """
    if EXPERIMENTS.setdefault(experiment.name, experiment) is not experiment:
        raise ValueError(f"there is an experiment {experiment.name!r} already; give yours another name")


register(MEGAPIXEL_MNIST)
register(COLON_CANCER)
register(SPEED_LIMITS)
register(IMAGES)
register(GIGAPIXEL_MNIST)


def experiment_data(config: ExperimentConfig) -> ExperimentData:
    """The data that a configuration names."""
    return EXPERIMENTS[config.experiment].data(config)


def tables() -> dict[str, Table]:
    """The experiments' tables by name, the paper's first."""
    own = ((experiment.table, *experiment.more) for experiment in EXPERIMENTS.values())
    found = [table for each in own for table in each if table is not None]
    return {table.name: table for table in sorted(found, key=lambda table: not table.is_published)}


def from_dict(values: dict[str, Any]) -> ExperimentConfig:
    """The inverse of `to_dict`.

    Raises:
        ValueError: values that are no configuration of this version.
    """
    sections = {"model": ModelConfig, "optim": OptimConfig, "trainer": TrainerConfig, "diagnostics": DiagnosticsConfig}
    try:
        values = {"diagnostics": {}} | values  # which change no result: a run from before them is still the same
        if not all(isinstance(values[name], dict) for name in (*sections, "data")):
            raise TypeError("a section is no object")
        sections["data"] = EXPERIMENTS[values["experiment"]].options
        parts: dict[str, Any] = {
            name: section(**_restore_types(section, values[name])) for name, section in sections.items()
        }
        rest = {name: value for name, value in values.items() if name not in sections and name != "experiment"}
        config = ExperimentConfig(**_restore_types(ExperimentConfig, rest), **parts)
        for part in (config, *parts.values()):
            _check_types(part)
        return config
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a configuration of this version of ats: {error}") from error


def _check_types(values: Any) -> None:
    """Raise TypeError where a dataclass has a value that its field's type does not allow; int is one of float's."""
    for name, kind in typing.get_type_hints(type(values)).items():
        if typing.get_origin(kind) is ClassVar or kind is ClassVar:
            continue
        value = getattr(values, name)
        if not dataclasses.is_dataclass(value) and not _allows(kind, value):
            raise TypeError(f"{name}={value!r:.80} where {kind} is expected")


def _allows(kind: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_allows(each, value) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_allows(arguments[0], each) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _restore_types(section: type, values: dict[str, Any]) -> dict[str, Any]:
    """Give values back the types that JSON has not."""
    hints = typing.get_type_hints(section)
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    paths = {
        name: Path(value) for name, value in values.items() if isinstance(value, str) and _is_path(hints.get(name))
    }
    return typed | paths


def _is_path(hint: Any) -> bool:
    return Path in (hint, *typing.get_args(hint))
