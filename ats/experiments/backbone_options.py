"""Options that put networks of timm's in the place of an experiment's own, or an evidence head on these."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ats.experiments.shown_options import ATTENTION, PATCHES, SAMPLING
from ats.models.timm_networks import check_name


def check_least(values: Any, section: str, least: int, *names: str) -> None:
    """Raise ValueError where one of the options `names` of a section is less than `least`."""
    for name in names:
        if (value := getattr(values, name)) < least:
            raise ValueError(f"{section}.{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class BackboneOptions:
    """Networks of timm's, and what they begin with (docs/images.md); an evidence head."""

    evidence: Annotated[Literal["none", "cells", "peaks"], ATTENTION] = "none"
    """Teach attention also by what each drawn patch alone says of the image's class: cells with evidence for it rise,
    with peaks those alone that have more than their neighbours (docs/megapixel-mnist.md)."""
    feature: Annotated[str, PATCHES] = ""
    """Features of patches by a network of timm's, timm:NAME; default: the
    experiment's own."""
    attention: Annotated[str, SAMPLING] = ""
    """Attention by the first stages of a network of timm's, timm:NAME; default: the experiment's own."""
    attention_stride: Annotated[int, SAMPLING] = 8
    """View pixels a cell, with model.attention: a stride that one of the network's stages has."""
    pretrained: Annotated[bool, PATCHES] = False
    """Networks of timm's begin with its pretrained weights, which it may download."""
    feature_weights: Annotated[Path | None, PATCHES] = None
    """Begin with the weights in this file, a state dict, in place of timm's own."""
    attention_weights: Annotated[Path | None, SAMPLING] = None
    """As feature-weights."""
    freeze: Annotated[bool, PATCHES] = False
    """Leave model.feature as it begins: in evaluation mode, without gradients."""

    def check_evidence(self, method: str, *, nested: bool) -> None:
        """Raise ValueError where there is nothing that an evidence head could be on."""
        if self.evidence == "none":
            return
        without = "leave it out, or set model.evidence=none"
        if method != "ats":
            raise ValueError(f"model.evidence teaches attention, and model.method={method} learns none; {without}")
        if nested:
            raise ValueError(f"model.evidence is for attention on one view, not for model.levels; {without}")
        if self.attention:
            raise ValueError(f"model.evidence needs the experiment's own attention network, not timm's; {without}")

    def check_backbones(self, method: str) -> None:
        """Raise ValueError where these do not go together, or with a method."""
        check_least(self, "model", 1, "attention_stride")
        for network, methods in (
            ("feature", ("ats", "uniform", "mil", "gated-mil")),
            ("attention", ("ats", "uniform")),
        ):
            weights = getattr(self, f"{network}_weights")
            if not getattr(self, network):
                if weights is not None:
                    raise ValueError(f"model.{network}_weights are for model.{network} timm:NAME, which is missing")
                continue
            check_name(f"model.{network}", getattr(self, network))
            if method not in methods:
                raise ValueError(f"model.{network} is for the methods {', '.join(methods)}, not {method}")
        if self.pretrained and not (self.feature or self.attention):
            raise ValueError("model.pretrained is for networks of timm's: name one, e.g. model.feature timm:resnet18")
        if self.freeze and not (self.feature and (self.pretrained or self.feature_weights)):
            raise ValueError(
                "model.freeze leaves features as they begin: give model.feature timm:NAME with model.pretrained, or "
                "model.feature_weights FILE"
            )
