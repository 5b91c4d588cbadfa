"""What a training run is made of, as dataclasses. Each field is an option of the command line.

One `ExperimentConfig` for all experiments: which one it is shows in the type of its `data`, and what is an experiment's
own affair is asked of that.
"""

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ats.datasets.image_files import default_folder
from ats.experiments.backbone_options import BackboneOptions, check_least
from ats.experiments.level_options import LevelOptions, read_levels
from ats.experiments.objectives import Classes, Objective
from ats.experiments.shown_options import ATTENTION, BAGS, CNN, PATCHES, SAMPLING
from ats.models.networks import Networks
from ats.paths import user_path


@dataclass(frozen=True)
class ModelConfig(BackboneOptions):
    """The networks, and how they meet an image."""

    method: Literal["ats", "uniform", "mil", "gated-mil", "cnn"] = "ats"
    """Attention sampling; uniform sampling; Deep MIL over all patches of a regular grid, plain or gated; a CNN. With
    --help: the options of that method."""
    networks: Literal["paper", "modern", "wide"] = "modern"
    """As published, our recipe (docs/experiments.md), or, of Megapixel MNIST alone, it with a wider attention
    network."""
    levels: Annotated[tuple[str, ...], SAMPLING] = ()
    """Attention within attention, a level each, the outermost first: SCALE:DRAWS[:STRIDE[:CONTEXT]], in
    place of view_scale and n_patches (docs/nested.md); e.g. 128:10 4:2 draws 10 regions from a view of 1/128 and 2
    patches in each from its view of 1/4. None: attention on a view of the whole image."""
    n_patches: Annotated[int, SAMPLING] = 10
    """Patches drawn from an image."""
    patch_size: Annotated[int, PATCHES] = 50
    """Pixels of a patch, a side."""
    view_scale: Annotated[float, SAMPLING] = 0.12
    """Size of the low-resolution view relative to the image."""
    replace: Annotated[bool, SAMPLING] = False
    """Draw with replacement."""
    estimator: Annotated[Literal["ordered", "unordered"], SAMPLING] = "ordered"
    """The paper's, or its mean over all orders of the draw, which has less noise (docs/estimators.md)."""
    control_variate: Annotated[bool, ATTENTION] = False
    """Take a baseline off the features in the attention's gradient (docs/estimators.md)."""
    positions: Annotated[bool, SAMPLING] = False
    """Tell the feature network where in the image a patch lies."""
    feature_scale: Annotated[float, SAMPLING] = 8.0
    """Factor on the pooled unit-length features; 1 is the paper's."""
    grid_step: Annotated[int, BAGS] = 50
    """Pixels from one patch of the grid to the next."""
    grid_chunk: Annotated[int, BAGS] = 0
    """Patches of an image at a time, which saves memory and costs a second forward pass; 0: all."""
    cnn_scale: Annotated[float, CNN] = 1.0
    """Size of what it sees relative to the image."""
    cnn_channels: Annotated[int, CNN] = 32
    """Channels that it starts with; 32 is the paper's, 16 the fewest (with 8, torch 2.13 on a CPU crashes)."""

    def __post_init__(self) -> None:
        """Refuse values that no model can have."""
        check_least(self, "model", 1, "n_patches", "patch_size", "grid_step")
        check_least(self, "model", 16, "cnn_channels")
        check_least(self, "model", 0, "grid_chunk")
        for name in ("view_scale", "cnn_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"model.{name} must be in (0, 1], got {getattr(self, name)}")
        self.check_backbones(self.method)
        read_levels(self.levels)
        self.check_evidence(self.method, nested=bool(self.levels))
        if self.replace and self.estimator == "unordered":
            raise ValueError(
                "model.estimator=unordered needs model.replace=False: it averages over the orders of a set; to draw "
                "with replacement, choose model.estimator=ordered"
            )

    def with_method(self, method: str, **options: Any) -> "ModelConfig":
        """The same with another method, without an evidence head where it learns no attention, and other options."""
        own: dict[str, Any] = {"method": method} | ({} if method == "ats" else {"evidence": "none"})
        return dataclasses.replace(self, **own | options)

    @property
    def nested(self) -> tuple[LevelOptions, ...]:
        """The levels of nested attention; none where it is flat, or the method has none."""
        return read_levels(self.levels) if self.method in ("ats", "uniform") else ()

    @property
    def draws(self) -> str:
        """What is drawn from an image: "10" patches, or "10x2" in nested levels."""
        return "x".join(str(level.n) for level in self.nested) or str(self.n_patches)

    @property
    def label(self) -> str:
        """A short name, as in the paper's tables and in the names of folders."""
        if self.method in ("ats", "uniform"):
            return f"{self.method}-{self.draws}"
        return f"cnn-{self.cnn_scale:g}" if self.method == "cnn" else self.method


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its schedule."""

    epochs: int = 500
    """Passes over the training images."""
    updates: int = 0
    """Steps of the optimiser, in place of epochs; 0: as many as the epochs have."""
    batch_size: int = 128
    """Images a step, on each device."""
    draws: Annotated[int, SAMPLING] = 1
    """Times that patches are drawn from each image in a step, whose loss is the mean over them: loading
    an image and its attention are paid for once."""
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
    widening: Annotated[float, SAMPLING] = 1.0
    """How many times as wide the bound of the attention's logits is at the end as at the start. It widens over the
    first half, or at the restart: narrow, it keeps attention from collapsing; wide, it lets it rank what it found."""
    restart: float = 0.0
    """Last share of the steps, over which learning rate, from 0.6 of its height, and entropy weight fall once more."""
    class_weights: bool = False
    """Weight the cross-entropy by the inverse of the classes' shares of the training images."""
    average: float = 0.0
    """Evaluate an exponential average of the weights, with this decay a step, e.g. 0.99; 0: the last weights."""
    keep: Literal["last", "best"] = "last"
    """Evaluate the weights of the last epoch, or of the one with the least loss on images for validation."""
    patience: int = 0
    """Epochs without a lower loss on images for validation after which training ends; 0: it goes on to the end."""

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        check_least(self, "optim", 1, "epochs", "batch_size", "draws")
        check_least(self, "optim", 0, "updates", "patience")
        if self.learning_rate <= 0:
            raise ValueError(f"optim.learning_rate must be positive, got {self.learning_rate}")
        if self.widening < 1:
            raise ValueError(f"optim.widening must be at least 1, got {self.widening}")
        for name, what in ("average", "decay"), ("warmup", "share of the steps"), ("restart", "share of the steps"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is a {what}, in [0, 1), got {getattr(self, name)}")
        if self.restart and self.schedule == "constant":
            raise ValueError("optim.restart has a schedule run again: choose optim.schedule=cosine, or leave it at 0")


Precision = Literal["32-true", "16-mixed", "bf16-mixed"]


@dataclass(frozen=True)
class TrainerConfig:
    """Where and how a run runs. What lightning.Trainer has, too, is passed on to it under the same name."""

    accelerator: str = "auto"
    """cpu, gpu, mps, …"""
    devices: str = "auto"
    """How many, or which: 2, "0,1"."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """ddp, …"""
    precision: Precision = "32-true"
    """Mixed precision keeps the weights in float32. On CPUs bf16-mixed pays where they have AMX."""
    checkpoint_seconds: float = 0.0
    """A checkpoint is written after an epoch if the last one is at least this old, and after the last epoch."""
    snapshots: int = 0
    """Checkpoints to keep, evenly over the training, as checkpoints/step-STEP.ckpt: for curves and pictures of it."""
    sync_batchnorm: bool = False
    """On several GPUs: batch normalisation's statistics are those of all of a step's images, which makes steps wait
    for each other; else each GPU has those of its own images, and rank 0's are what is evaluated."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Loggers of Lightning's beside our own CSV: tensorboard, wandb, mlflow, …, each with its package."""
    extend: bool = False
    """Train a run on that had fewer epochs, or updates. The schedule is the longer training's, from the step at which
    the run is: a learning rate that had fallen along a cosine rises to where the longer one has it."""


@dataclass(frozen=True)
class DiagnosticsConfig:
    """A look at the attention as training goes on, which changes nothing of it (docs/diagnostics.md)."""

    every: int = 0
    """Steps between looks: numbers for the logs, and warnings; 0: never."""
    pictures: int = 10
    """Epochs between pictures of the attention on a few images, at most 20 of each in a training, in TensorBoard and
    other loggers that take them; 0: none."""
    gradient_draws: int = 0
    """Draws at each look that tell signal from noise in the attention's gradient, a forward and backward pass each; or
    0."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        check_least(self, "diagnostics", 0, "every", "pictures", "gradient_draws")
        if self.gradient_draws == 1:
            raise ValueError("diagnostics.gradient_draws must be 0 or at least 2: one draw has no spread")


PLACES = ("folder", "manifest", "cache")
"""Options of data that say where they are, which may change: what they are is told otherwise."""

# What presets share: less noise in what is pooled and in the attention's gradient (docs/estimators.md); and epochs of a
# few seconds, whose checkpoints would take as long as they do.
LESS_NOISE: dict[str, Any] = {"estimator": "unordered", "control_variate": True}
SHORT_EPOCHS = TrainerConfig(checkpoint_seconds=20.0)


@dataclass(frozen=True)
class DataConfig(ABC):
    """What an experiment's data are made of, and the networks that fit them. Each experiment has its own."""

    experiment: ClassVar[str]
    """The experiment's name on the command line."""
    networks: ClassVar[Mapping[str, Networks]]
    """By the names that `ModelConfig.networks` has."""

    folder: Path | None = None
    """Folder of the data set. Default: the experiment's folder in $ATS_DATA."""

    @property
    @abstractmethod
    def n_classes(self) -> int:
        """Classes to tell apart; outputs of the model."""

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return 3

    @property
    def variant(self) -> str:
        """What tells a run on these data from the preset's own, in the names of folders; empty: nothing."""
        return ""

    @property
    def objective(self) -> Objective:
        """What is learned: a class, unless an experiment has something else."""
        return Classes()

    def resolved(self, seed: int) -> "DataConfig":
        """These options with what only the data say, e.g. which classes there are; they are looked at for that.

        A checkpoint holds the options so, and needs no data to be used.
        """
        return self

    @classmethod
    def subfolder(cls) -> str:
        """The data set's own folder in one that holds the data of several experiments."""
        return cls.experiment

    def find_folder(self) -> Path:
        """Where the data are, or where they are to be put if they can be downloaded.

        Raises:
            FileNotFoundError: nobody said where data are that cannot be downloaded.
        """
        return self.folder if self.folder is not None else default_folder(self.subfolder())

    def check_run(self, config: "ExperimentConfig") -> None:  # noqa: B027 (most have nothing to refuse)
        """Raise ValueError where other options of a run do not go with these."""

    def with_test_images(self, count: int) -> "DataConfig":
        """The same with `count` images to test on, where there are as many as anyone wants; else as it is."""
        return self

    @property
    def taught_patches(self) -> int:
        """Patches on which features learn before the training, which leaves them as they are then; 0: none."""
        return 0

    def networks_for(self, model: ModelConfig) -> Networks:
        """The networks that a model is made of.

        Raises:
            ValueError: the experiment has none of that name.
        """
        if model.networks not in self.networks:
            known = ", ".join(map(repr, self.networks))
            raise ValueError(f"{self.experiment} has no networks {model.networks!r}, expected one of {known}")
        return self.networks[model.networks]


@dataclass(frozen=True)
class ExperimentConfig:
    """One training run."""

    preset: Literal["demo", "paper", "modern", "quick", "view-300"] = "modern"
    """Where the defaults of all other options come from. "demo" is of Megapixel and Gigapixel MNIST alone, "view-300"
    of Megapixel MNIST."""
    output: Path | None = None
    """Folder of the run; default runs/EXPERIMENT-PRESET-METHOD-seed-SEED. A run that stopped goes on from there."""
    seed: int = 0
    """Decides images or their split, initial weights, the order of the data, their random changes and the draws."""
    data: DataConfig = field(kw_only=True)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        self.data.check_run(self)

    @property
    def experiment(self) -> str:
        """The experiment's name on the command line."""
        return self.data.experiment

    @property
    def run_folder(self) -> Path:
        """Where the run's files go."""
        parts = self.experiment, self.preset, self.data.variant, self.model.label, f"seed-{self.seed}"
        return user_path(self.output or Path("runs") / "-".join(filter(None, parts)))


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """The configuration as plain values, e.g. for a checkpoint or JSON."""
    return json.loads(json.dumps({"experiment": config.experiment} | dataclasses.asdict(config), default=str))


def differences(one: ExperimentConfig, other: ExperimentConfig) -> list[str]:
    """Options in which two runs differ, as "name: value -> value": not where they run, nor what they watch."""
    left, right = to_dict(one), to_dict(other)
    if one.experiment != other.experiment:
        return [f"experiment: {one.experiment} -> {other.experiment}"]
    found = []
    for name in left:
        if name in ("output", "trainer", "diagnostics"):
            continue
        parts = left[name].items() if isinstance(left[name], dict) else [(None, left[name])]
        for key, value in parts:
            new = right[name] if key is None else right[name][key]
            if value != new and key not in PLACES:
                found.append(f"{name if key is None else f'{name}.{key}'}: {value} -> {new}")
    return found
