"""Which networks a configuration means: the experiment's own, or timm's in their place, and what these begin with."""

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.experiments.console import say
from ats.models.networks import Networks
from ats.models.timm_networks import (
    PREFIX,
    TimmAttention,
    TimmFeatures,
    TimmNetwork,
    load_pretrained,
    statistics,
    whole_name,
)


def networks_of(config: ExperimentConfig) -> Networks:
    """The networks of a run, none of which is made yet.

    Networks of timm's see images by their own mean and std, unless the data's options say what theirs are.

    Raises:
        ValueError: the experiment has no networks of that name, timm none of its, or there is no evidence head.
        ModuleNotFoundError: timm is not installed, and asked for.
    """
    model, data = config.model, config.data
    networks = data.networks_for(model)
    if model.evidence != "none":
        if networks.evidence is None:
            raise ValueError(
                f"the networks {model.networks!r} of {config.experiment} have no evidence head: choose "
                "model.networks=modern, or leave model.evidence out"
            )
        networks = replace(networks, attention=partial(networks.evidence, peaks=model.evidence == "peaks"))
    own_unit = bool(getattr(data, "mean", ()))
    if model.attention:
        name = model.attention.removeprefix(PREFIX)
        networks = replace(
            networks,
            attention=partial(TimmAttention, name, data.channels, model.attention_stride),
            level=partial(_timm_level, name, data.channels),
            stride=model.attention_stride,
            lost=0,
            view=networks.for_view if own_unit else statistics(name, data.channels),
        )
    if model.feature:
        name = model.feature.removeprefix(PREFIX)
        mean, std = (networks.mean, networks.std) if own_unit else statistics(name, data.channels)
        networks = replace(
            networks,
            feature=partial(TimmFeatures, name, data.channels, model.patch_size, frozen=model.freeze),
            n_features=0,
            view=networks.for_view,
            mean=mean,
            std=std,
        )
    return networks


def _timm_level(name: str, channels: int, scale: int, stride: int) -> TimmAttention:
    """A level's attention network, `Networks.level`."""
    return TimmAttention(name, channels, stride)


def resolved(model: ModelConfig) -> ModelConfig:
    """With names of timm's networks that say whose weights are meant, whatever later versions of timm mean by them."""
    whole: dict[str, Any] = {}
    for option in ("feature", "attention"):
        if value := getattr(model, option):
            whole[option] = PREFIX + whole_name(value.removeprefix(PREFIX))
    return replace(model, **whole) if whole else model


def begin_pretrained(model: nn.Module, config: ModelConfig) -> None:
    """Give networks of timm's the weights that a training begins with, and say what has none.

    Raises:
        ValueError: weights that cannot be had, or are another network's.
        FileNotFoundError: there is no such file.
    """
    files = {TimmFeatures: config.feature_weights, TimmAttention: config.attention_weights}
    for network in model.modules():
        if not isinstance(network, TimmNetwork):
            continue
        file = files[type(network)]
        if file is None and not config.pretrained:
            continue
        missing = load_pretrained(network, file)
        if missing:
            named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            say(
                f"{PREFIX}{network.name}: {len(missing)} layers have no pretrained weights and begin at random: {named}"
            )
