"""Networks of timm (PyTorch Image Models) in place of an experiment's own: features of patches, attention on views.

A network is made with random weights; `load_pretrained` gives it timm's, or those in a file, where a training begins.
So a trained model, whose checkpoint has all weights, is opened without them.
"""

import difflib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ats.models.classifier import ChannelsLast, L2Normalise, SoftBound
from ats.sources.decoding import needed

PREFIX = "timm:"
"""What names of timm's networks begin with, among options."""


def check_name(option: str, value: str) -> None:
    """Raise ValueError unless the value of an option may name a network of timm's, which is not asked for that."""
    name = value.removeprefix(PREFIX)
    if not value.startswith(PREFIX) or not name:
        raise ValueError(f"{option} must be timm:NAME, e.g. timm:{name or 'resnet18'}, got {value!r}")
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        raise ValueError(
            f"{option} {value}: a name that is looked up on a hub cannot be opened offline; name the architecture, "
            "timm:NAME, and give its weights as a file"
        )


def timm_library() -> Any:
    """The module timm.

    Raises:
        ModuleNotFoundError: it is not installed; says how to get it.
    """
    return needed("timm", "timm", "timm", "networks named timm:NAME")


def pretrained_config(name: str) -> Any:
    """What timm knows of a network: its mean and std, its tag and more.

    Args:
        name: e.g. resnet18 or resnet18.a1_in1k, which also says whose weights.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: it has no network of that name, or no weights; the message has names that are like it.
    """
    timm = timm_library()
    architecture = name.partition(".")[0]
    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
        near += [other for other in known if architecture and architecture in other and other not in near][
            : 5 - len(near)
        ]
        also = f"; names like it: {', '.join(near)}" if near else "; timm.list_models() has all names"
        raise ValueError(f"timm {getattr(timm, '__version__', '')} has no network {architecture!r}{also}")
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_models(f"{architecture}*", include_tags=True)
        own = [each for each in tags if each.partition(".")[0] == architecture]
        raise ValueError(f"timm has no weights {name!r}; those of {architecture}: {', '.join(own)}") from error
    if found is None:
        raise ValueError(f"timm says nothing of the network {name!r}; choose another")
    return found


def whole_name(name: str) -> str:
    """A network's name with whose weights are meant, as timm's defaults may change: resnet18 -> resnet18.a1_in1k."""
    if "." in name:
        return name
    tag = getattr(pretrained_config(name), "tag", None)
    return f"{name}.{tag}" if tag else name


def statistics(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that a network's pretrained weights know, for images of so many channels, where 1 is white.

    Of one channel it is the mean over the network's; of more they come in turns, as timm repeats its weights.
    """
    config = pretrained_config(name)

    def fitted(values: Sequence[float]) -> tuple[float, ...]:
        if len(values) == channels:
            return tuple(map(float, values))
        if channels == 1:
            return (sum(values) / len(values),)
        return tuple(float(values[channel % len(values)]) for channel in range(channels))

    return fitted(config.mean), fitted(config.std)


class TimmNetwork(nn.Module):
    """What networks of timm's share: how they are made, and made again with pretrained weights.

    Args:
        name: timm's.
        channels: of its input.
        options: of `timm.create_model`.
    """

    def __init__(self, name: str, channels: int, **options: Any) -> None:
        super().__init__()
        pretrained_config(name)  # there is one of that name
        self.name, self.channels, self.options = name, channels, options
        self.backbone = self.create()

    def create(self, **weights: Any) -> nn.Module:
        """A network of its kind.

        Raises:
            ValueError: timm cannot make one with these options.
        """
        try:
            return timm_library().create_model(self.name, in_chans=self.channels, **self.options, **weights)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever one of a thousand networks has to say
            if weights:
                raise
            raise ValueError(f"timm:{self.name} cannot be made: {_one_line(error)}") from error


class TimmFeatures(TimmNetwork):
    """Features of patches (M, C, ph, pw) by a network of timm's without its classifier, standardised: (M, n_features).

    Args:
        name: timm's.
        channels: C.
        patch_size: pixels a side, which networks of a fixed input size are made for.
        normalised: scale features to length 1.
        frozen: the network stays as it begins: in evaluation mode, without gradients. Only the standardisation learns.

    Attributes:
        n_features: their number.
    """

    def __init__(self, name: str, channels: int, patch_size: int, *, normalised: bool = True, frozen: bool = False):
        config = pretrained_config(name)
        fixed = getattr(config, "fixed_input_size", False) and tuple(config.input_size[1:]) != (patch_size, patch_size)
        super().__init__(name, channels, num_classes=0, **({"img_size": patch_size} if fixed else {}))
        self.frozen = frozen
        self.n_features = self._measure(patch_size)
        if frozen:
            self.backbone.requires_grad_(False).eval()
        self.before = ChannelsLast()
        self.standardise = nn.BatchNorm1d(self.n_features)  # most are above 0: around it they differ more
        self.normalise = L2Normalise() if normalised else nn.Identity()

    def forward(self, patches: Tensor) -> Tensor:
        """(M, C, ph, pw) -> (M, n_features)."""
        return self.normalise(self.standardise(self.backbone(self.before(patches))))

    def train(self, mode: bool = True) -> "TimmFeatures":
        """Training mode, but for a network that is frozen."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @torch.no_grad()
    def _measure(self, patch_size: int) -> int:
        training = self.backbone.training
        device = next(self.backbone.parameters()).device
        try:
            found = self.backbone.eval()(torch.zeros(1, self.channels, patch_size, patch_size, device=device))
        except Exception as error:  # as above
            raise ValueError(
                f"timm:{self.name} does not take patches of {patch_size}×{patch_size} pixels: {_one_line(error)}; "
                "choose another --model.patch-size, or another network"
            ) from error
        self.backbone.train(training)
        if found.ndim != 2:
            raise ValueError(f"timm:{self.name} gives {tuple(found.shape)} of a patch, not (1, features)")
        return int(found.shape[1])


class TimmAttention(TimmNetwork):
    """Attention by the first stages of a network of timm's: views (B, C, h, w) -> logits (B, 1, h/stride, w/stride).

    Args:
        name: timm's, a convolutional network's.
        channels: C.
        stride: view pixels a cell: the network's stages up to that one are kept, and a 1×1 convolution follows.

    Raises:
        ValueError: a network without such a stage; those that there are are named.
    """

    def __init__(self, name: str, channels: int, stride: int) -> None:
        super().__init__(name, channels, features_only=True)
        info: Any = self.backbone.feature_info
        strides, stages = list(info.reduction()), list(info.out_indices)
        if stride not in strides:
            raise ValueError(
                f"timm:{name} has no stage of {stride} view pixels a cell; choose one of --model.attention-stride "
                + ", ".join(map(str, sorted(set(strides))))
            )
        last = len(strides) - 1 - strides[::-1].index(stride)  # the deepest of that stride
        self.options = {"features_only": True, "out_indices": (stages[last],)}
        self.backbone = self.create()
        self.before = ChannelsLast()
        self.logit = nn.Conv2d(int(info.channels()[last]), 1, 1)
        self.bound = SoftBound(5.0)

    def forward(self, view: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 1, h // stride, w // stride)."""
        return self.bound(self.logit(self.backbone(self.before(view))[-1]))


@torch.no_grad()
def load_pretrained(network: TimmNetwork, file: Path | None = None) -> list[str]:
    """Give a network timm's pretrained weights, which timm may download, or those in a file of a state dict.

    No random number of torch's is used up.

    Returns:
        Names of the layers for which there were none.

    Raises:
        ValueError: weights that cannot be had, or are another network's.
        FileNotFoundError: there is no such file.
    """
    weights: dict[str, Any] = {"pretrained": True}
    if file is not None:
        _check_file(file)
        weights["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": file.suffix == ".npz"}
    with torch.random.fork_rng(devices=[]):
        made = []
        for how in ({}, weights):
            torch.manual_seed(0)  # the same before weights come: what is the same afterwards got none
            try:
                made.append(network.create(**how).to("cpu"))
            except (ModuleNotFoundError, KeyboardInterrupt):
                raise
            except Exception as error:  # of timm, of its hub, of the network there
                if file is not None:
                    raise ValueError(f"{file} does not fit timm:{network.name}: {_one_line(error)}") from error
                raise ValueError(
                    f"timm has no pretrained weights of {network.name}, or cannot get them ({_one_line(error)}); name "
                    "a file that has them, or leave out --model.pretrained"
                ) from error
    before, after = (dict(model.named_parameters()) for model in made)
    drawn = [name for name, value in before.items() if value.ndim > 1 and value.amin() < value.amax()]
    missing = [name for name in drawn if torch.equal(before[name], after[name])]
    if 2 * len(missing) > len(drawn):
        raise ValueError(
            f"{file or 'what timm gave'} has no weights for {len(missing)} of {len(drawn)} layers of "
            f"timm:{network.name}, e.g. {missing[0]}: are they another network's?"
        )
    network.backbone.load_state_dict(made[1].state_dict())
    return missing


def _check_file(file: Path) -> None:
    """Raise unless a file is there and holds numbers alone: what pickles hold beside them would be run."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of weights {file}")
    if file.suffix in (".npz", ".safetensors"):
        return
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, AttributeError) as error:
        raise ValueError(
            f"{file} holds more than numbers and texts, or is damaged, and was not read; save the network's state_dict "
            "alone"
        ) from error


def _one_line(error: BaseException) -> str:
    """An error's text, on one line that can be read at once."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
