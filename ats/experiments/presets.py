"""Named configurations: `paper` as published, `modern` our best, `quick` and `demo` for a few CPU cores.

What is not printed in the paper is from the authors' release or, for the colon cancer batch, ours: docs/experiments.md
says which.
"""

from dataclasses import replace
from typing import Any

from ats.experiments.config import ExperimentConfig, ModelConfig, OptimConfig, TrainerConfig
from ats.experiments.data_config import ColonCancerConfig, MegapixelMNISTConfig, SpeedLimitsConfig

# Less noise in what is pooled and in the attention's gradient (docs/estimators.md).
_LESS_NOISE: dict[str, Any] = {"estimator": "unordered", "control_variate": True}

_MNIST_MODEL = ModelConfig(**_LESS_NOISE)
_MNIST = OptimConfig(
    batch_size=32, learning_rate=5e-3, weight_decay=0.05, warmup=0.03, schedule="cosine", entropy_weight=1e-3
)
_MEGAPIXEL_MNIST = {
    "paper": ExperimentConfig(
        preset="paper",
        model=ModelConfig(networks="paper", feature_scale=1.0),
    ),
    "modern": ExperimentConfig(
        preset="modern",
        data=MegapixelMNISTConfig(small_epochs=6, medium_epochs=54),
        model=_MNIST_MODEL,
        optim=replace(_MNIST, batch_size=16, epochs=100),
    ),
    "quick": ExperimentConfig(
        preset="quick",
        data=MegapixelMNISTConfig(small_epochs=6, medium_epochs=40),
        model=_MNIST_MODEL,
        optim=replace(_MNIST, batch_size=16, epochs=52),
    ),
    "demo": ExperimentConfig(
        preset="demo",
        data=MegapixelMNISTConfig(digits="bundled", image_size=500, n_noise=10, train_images=14_000, test_images=500),
        model=_MNIST_MODEL,
        optim=replace(_MNIST, epochs=3),
    ),
}

# Epochs of a few seconds: their checkpoints would take as long as they do.
_SHORT_EPOCHS = TrainerConfig(checkpoint_seconds=20.0)

_COLON_MODEL = ModelConfig(n_patches=10, patch_size=27, view_scale=0.2, grid_step=10)
_COLON = OptimConfig(
    epochs=300,
    batch_size=14,
    learning_rate=3e-3,
    weight_decay=0.05,
    warmup=0.05,
    schedule="cosine",
    entropy_weight=1e-3,
    average=0.99,
)
_COLON_IMAGES = ColonCancerConfig(symmetries=True, translation=25, tint=0.05)
_COLON_CANCER = {
    "paper": ExperimentConfig(
        preset="paper",
        data=ColonCancerConfig(),
        model=replace(_COLON_MODEL, networks="paper", feature_scale=1.0),
        optim=OptimConfig(updates=30_000, batch_size=5, entropy_weight=0.01),
        trainer=_SHORT_EPOCHS,
    ),
    "modern": ExperimentConfig(
        preset="modern",
        data=_COLON_IMAGES,
        model=replace(_COLON_MODEL, **_LESS_NOISE),
        optim=_COLON,
        trainer=_SHORT_EPOCHS,
    ),
    "quick": ExperimentConfig(
        preset="quick",
        data=replace(_COLON_IMAGES, folds=5),
        model=replace(_COLON_MODEL, grid_step=27, **_LESS_NOISE),
        optim=replace(_COLON, epochs=120),
        trainer=_SHORT_EPOCHS,
    ),
}

_SPEED_MODEL = ModelConfig(n_patches=5, patch_size=100, view_scale=0.3, grid_step=80)
_SPEED = OptimConfig(
    epochs=300,
    batch_size=8,
    draws=4,
    learning_rate=3e-3,
    weight_decay=0.05,
    warmup=0.05,
    schedule="cosine",
    entropy_weight=5e-4,
    class_weights=True,
    average=0.99,
)
_STREETS = SpeedLimitsConfig(
    contrast=0.3,
    brightness=0.15,
    tint=0.05,
    translation=50,
    zoom=1.35,
    stretch=1.08,
    drawn_limits=0.5,
    drawn_patches=28_800,
)
_SPEED_LIMITS = {
    "paper": ExperimentConfig(
        preset="paper",
        data=SpeedLimitsConfig(),
        model=replace(_SPEED_MODEL, networks="paper", feature_scale=1.0),
        optim=OptimConfig(updates=300_000, batch_size=32, entropy_weight=0.05, class_weights=True),
        trainer=_SHORT_EPOCHS,
    ),
    "modern": ExperimentConfig(
        preset="modern",
        data=_STREETS,
        model=replace(_SPEED_MODEL, **_LESS_NOISE),
        optim=_SPEED,
        trainer=_SHORT_EPOCHS,
    ),
    "quick": ExperimentConfig(
        preset="quick",
        data=_STREETS,
        model=replace(_SPEED_MODEL, patch_size=64, grid_step=64, **_LESS_NOISE),
        optim=replace(_SPEED, epochs=150),
        trainer=_SHORT_EPOCHS,
    ),
}

PRESETS: dict[str, dict[str, ExperimentConfig]] = {
    "megapixel-mnist": _MEGAPIXEL_MNIST,
    "colon-cancer": _COLON_CANCER,
    "speed-limits": _SPEED_LIMITS,
}
