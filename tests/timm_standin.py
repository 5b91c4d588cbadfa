"""A stand-in for timm, which needs torchvision: its functions with its own signatures, and two small networks.

What is copied is how timm behaves, from its sources: weights with other names are left out in silence where the
classifier differs, `features_only` keeps the first stages, `in_chans` fits the first convolution, and names may have a
tag.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@dataclass(frozen=True)
class PretrainedCfg:
    architecture: str
    tag: str | None = "small"
    file: str | None = None
    custom_load: bool = False
    input_size: tuple[int, int, int] = (3, 32, 32)
    fixed_input_size: bool = False
    num_classes: int = 1000
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


CONFIGS = {
    "resnet10": PretrainedCfg("resnet10"),
    "resnet18": PretrainedCfg("resnet18"),
    "vit_small": PretrainedCfg("vit_small", fixed_input_size=True),
}


class Residual(nn.Module):
    """A ResNet in small: strides 2 and 4 of the stem, 8 of a stage."""

    def __init__(self, in_chans: int = 3, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 8, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.fc = nn.Linear(12, num_classes) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": 8, "reduction": 2, "module": "act1"},
            {"num_chs": 12, "reduction": 8, "module": "layer1"},
        ]

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer1(self.maxpool(self.act1(self.bn1(self.conv1(images)))))
        return self.fc(maps.mean((2, 3)))


class Transformer(nn.Module):
    """Patches of 8 pixels of an image of one size, each of which sees all."""

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, img_size: int = 32) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_embed = nn.Conv2d(in_chans, 12, 8, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, (img_size // 8) ** 2, 12) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == self.img_size, f"Input height ({images.shape[-1]}) doesn't match {self.img_size}."
        return (self.patch_embed(images).flatten(2).mT + self.pos_embed).mean(1)


class FeatureInfo:
    def __init__(self, info: list[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info, self.out_indices = info, tuple(out_indices)

    def reduction(self) -> list[int]:
        return [self.info[i]["reduction"] for i in self.out_indices]

    def channels(self) -> list[int]:
        return [self.info[i]["num_chs"] for i in self.out_indices]


class FeatureListNet(nn.ModuleDict):
    def __init__(self, model: Residual, out_indices: Sequence[int]) -> None:
        self_info = FeatureInfo(model.feature_info, out_indices)
        wanted = [model.feature_info[i]["module"] for i in self_info.out_indices]
        layers: dict[str, nn.Module] = {}
        for name, layer in model.named_children():
            layers[name] = layer
            if not set(wanted) - set(layers):
                break
        super().__init__(layers)
        self.feature_info, self.wanted = self_info, wanted

    def forward(self, images: Tensor) -> list[Tensor]:
        found = []
        for name, layer in self.items():
            images = layer(images)
            if name in self.wanted:
                found.append(images)
        return found


class StandIn(ModuleType):
    """The module. `hub` has the weights that it would download, by network; without any it is offline."""

    __version__ = "1.0.0"

    def __init__(self) -> None:
        super().__init__("timm")
        self.hub: dict[str, dict[str, Tensor]] = {}
        self.pretrained_calls = 0

    def is_model(self, model_name: str) -> bool:
        return model_name.split(".")[0] in CONFIGS

    def list_models(self, filter: str = "", module: str = "", include_tags: bool | None = None) -> list[str]:
        names = [f"{name}.{config.tag}" if include_tags else name for name, config in CONFIGS.items()]
        return [name for name in sorted(names) if fnmatch.fnmatch(name, filter or "*")]

    def get_pretrained_cfg(self, model_name: str, allow_unregistered: bool = True) -> PretrainedCfg | None:
        architecture, _, tag = model_name.partition(".")
        config = CONFIGS.get(architecture)
        if config is not None and tag and tag != config.tag:
            raise RuntimeError(f"Invalid pretrained tag ({tag}) for {architecture}.")
        return config

    def create_model(
        self,
        model_name: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        checkpoint_path: str = "",
        **kwargs: Any,
    ) -> nn.Module:
        architecture = model_name.split(".")[0]
        config = replace(CONFIGS[architecture], **(pretrained_cfg_overlay or {}))
        features = kwargs.pop("features_only", False)
        stages = kwargs.pop("out_indices", (0, 1))
        if architecture == "vit_small" and features:
            raise RuntimeError("features_only not implemented for Vision Transformer models.")
        kwargs.setdefault("num_classes", config.num_classes)
        model = (Transformer if architecture == "vit_small" else Residual)(**kwargs)
        if pretrained:
            self.pretrained_calls += 1
            if config.file is not None:
                state = torch.load(config.file, map_location="cpu", weights_only=True)
            elif architecture in self.hub:
                state = dict(self.hub[architecture])
            else:
                raise ConnectionError("Max retries exceeded\nwith url: /resnet10")
            self._load(model, state, kwargs.get("in_chans", 3))
        found: nn.Module = FeatureListNet(model, stages) if features else model  # type: ignore[arg-type]
        found.pretrained_cfg = asdict(config)  # type: ignore[assignment]
        return found

    @staticmethod
    def _load(model: nn.Module, state: dict[str, Tensor], channels: int) -> None:
        first = "conv1.weight"
        if channels != 3 and first in state:
            repeated = state[first].repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
            state[first] = state[first].sum(1, keepdim=True) if channels == 1 else repeated
        if model.fc.__class__ is nn.Identity:
            state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        model.load_state_dict(state, strict=False)
