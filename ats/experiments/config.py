"""What an experiment is made of, as dataclasses. Each field is an option of the command line."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ats.models.megapixel_mnist import ATTENTION_STRIDE


@dataclass(frozen=True)
class DataConfig:
    """Megapixel MNIST."""

    digits: Literal["bundled", "full"] = "full"
    """The 6,000 digits that ship with the package, or all of MNIST."""
    mnist: Path | None = None
    """Folder with MNIST's IDX files, for digits=full. Default: $ATS_DATA/mnist, else a cache; downloaded if missing."""
    image_size: int = 1500
    """Pixels a side."""
    n_noise: int = 50
    """Patches of noise an image."""
    train_images: int = 5000
    """Images to train on."""
    validation_images: int = 0
    """Images, made of training digits, to validate on after each epoch; 0 for none."""
    test_images: int = 1000
    """Images, made of test digits, that `ats evaluate` uses."""


@dataclass(frozen=True)
class ModelConfig:
    """The networks and how patches are drawn."""

    networks: Literal["paper", "modern"] = "modern"
    """As published, or our faster recipe (docs/megapixel-mnist.md)."""
    attention: Literal["learned", "uniform"] = "learned"
    """Learned, or the same everywhere: uniform sampling."""
    n_patches: int = 10
    """Patches drawn from an image."""
    patch_size: int = 50
    """Pixels a side."""
    view_scale: float = 0.12
    """Size of the low-resolution view relative to the image."""
    replace: bool = False
    """Draw with replacement."""
    feature_scale: float = 8.0
    """Factor on the pooled unit-length features; 1 is the paper's."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its schedule."""

    epochs: int = 500
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, on each device."""
    learning_rate: float = 1e-3
    """Adam's, at its highest."""
    weight_decay: float = 0.0
    """Decoupled from the gradient, as in AdamW."""
    warmup: float = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to a fiftieth along a cosine."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    entropy_weight: float = 1e-4
    """λ of the entropy bonus, which keeps the attention from collapsing (paper, eq. 21). It falls as the learning rate
    does, without a warm-up."""


@dataclass(frozen=True)
class TrainerConfig:
    """Passed on to lightning.Trainer under the same names."""

    accelerator: str = "auto"
    """cpu, gpu, mps, …"""
    devices: str = "auto"
    """How many, or which: 2, "0,1"."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """ddp, …"""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Mixed precision keeps the weights in float32."""


@dataclass(frozen=True)
class ExperimentConfig:
    """One training run of Megapixel MNIST."""

    preset: Literal["demo", "paper", "modern"] = "modern"
    """Where the defaults of all other options come from."""
    output: Path | None = None
    """Folder of the run; default runs/megapixel-mnist-PRESET-seed-SEED. A run that stopped goes on from there."""
    seed: int = 0
    """Of the images, the initial weights, the order of the data and the draws."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        for section, names in _AT_LEAST_ONE.items():
            for name in names:
                if (value := getattr(getattr(self, section), name)) < 1:
                    raise ValueError(f"{section}.{name} must be at least 1, got {value}")
        for name in ("n_noise", "validation_images"):
            if (value := getattr(self.data, name)) < 0:
                raise ValueError(f"data.{name} must be at least 0, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.optim.learning_rate <= 0:
            raise ValueError(f"optim.learning_rate must be positive, got {self.optim.learning_rate}")
        if not 0 < self.model.view_scale <= 1:
            raise ValueError(f"model.view_scale must be in (0, 1], got {self.model.view_scale}")
        if not 0 <= self.optim.warmup < 1:
            raise ValueError(f"optim.warmup is a share of the steps, in [0, 1), got {self.optim.warmup}")

    @property
    def view_size(self) -> int:
        """Pixels a side of the low-resolution view."""
        stride = ATTENTION_STRIDE[self.model.networks]  # whole cells
        return stride * max(1, round(self.data.image_size * self.model.view_scale / stride))

    @property
    def run_folder(self) -> Path:
        """Where the run's files go."""
        return self.output or Path("runs") / f"megapixel-mnist-{self.preset}-seed-{self.seed}"


_AT_LEAST_ONE = {
    "data": ("train_images", "test_images"),
    "model": ("n_patches", "patch_size"),
    "optim": ("epochs", "batch_size"),
}

_MODERN = OptimConfig(
    batch_size=32, learning_rate=5e-3, weight_decay=0.05, warmup=0.03, schedule="cosine", entropy_weight=1e-3
)

PRESETS = {
    "paper": ExperimentConfig(
        preset="paper",
        model=ModelConfig(networks="paper", feature_scale=1.0),
    ),
    "modern": ExperimentConfig(
        preset="modern",
        optim=dataclasses.replace(_MODERN, epochs=50),
    ),
    "demo": ExperimentConfig(
        preset="demo",
        data=DataConfig(digits="bundled", image_size=500, n_noise=10, train_images=14_000, test_images=500),
        optim=dataclasses.replace(_MODERN, epochs=3),
    ),
}


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration as plain values, e.g. for a checkpoint or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(values: dict[str, Any]) -> ExperimentConfig:
    """The inverse of `to_dict`.

    Raises:
        ValueError: values that are no configuration of this version.
    """
    sections = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "trainer": TrainerConfig}
    try:
        parts: dict[str, Any] = {name: sections[name](**values[name]) for name in sections}
        rest = {name: value for name, value in values.items() if name not in sections}
        config = ExperimentConfig(**rest, **parts)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a configuration of this version of ats: {error}") from error
    paths = {"output": config.output, "mnist": config.data.mnist}
    output, mnist = (Path(path) if path is not None else None for path in paths.values())
    return dataclasses.replace(config, output=output, data=dataclasses.replace(config.data, mnist=mnist))


def differences(one: ExperimentConfig, other: ExperimentConfig) -> list[str]:
    """Options in which two configurations differ, other than where they run, as "name: value -> value"."""
    left, right = to_dict(one), to_dict(other)
    found = []
    for name in left:
        if name in ("output", "trainer"):
            continue
        parts = left[name].items() if isinstance(left[name], dict) else [(None, left[name])]
        for key, value in parts:
            new = right[name] if key is None else right[name][key]
            if value != new and key != "mnist":
                found.append(f"{name if key is None else f'{name}.{key}'}: {value} -> {new}")
    return found


def mnist_folder(data: DataConfig) -> Path:
    """Where the whole of MNIST is, or is to be put."""
    if data.mnist is not None:
        return data.mnist
    if "ATS_DATA" in os.environ:
        return Path(os.environ["ATS_DATA"]) / "mnist"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch-ats" / "mnist"


def entropy_weight(step: int, total: int, optim: OptimConfig) -> float:
    """λ at a step of `total`: as configured while there is little to go by, less once there is much."""
    return optim.entropy_weight * _fall(step / total, optim)


def learning_rate_factor(step: int, total: int, optim: OptimConfig) -> float:
    """What the learning rate is multiplied with at a step of `total`."""
    warmup = round(optim.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    return _fall((step - warmup) / max(1, total - warmup), optim)


def _fall(progress: float, optim: OptimConfig) -> float:
    if optim.schedule == "constant":
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
