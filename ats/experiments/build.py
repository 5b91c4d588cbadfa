"""From a configuration to a model with fresh weights, and to the size of what it looks at."""

from types import ModuleType

from torch import nn

from ats.experiments.config import ExperimentConfig
from ats.models import (
    ATSClassifier,
    CNNClassifier,
    MILClassifier,
    UniformAttention,
    colon_cancer,
    megapixel_mnist,
    speed_limits,
)
from ats.models.classifier import Normalisation, PlacedFeatures
from ats.nn import AttentionSampling

_NETWORKS: dict[str, ModuleType] = {
    "megapixel-mnist": megapixel_mnist,
    "colon-cancer": colon_cancer,
    "speed-limits": speed_limits,
}

Classifier = ATSClassifier | MILClassifier | CNNClassifier


def build_model(config: ExperimentConfig) -> Classifier:
    """The networks that a configuration names, with fresh weights from torch's random numbers."""
    networks, model, n_classes = _NETWORKS[config.experiment], config.model, config.data.n_classes
    mean, std = normalisation(config)
    if model.method == "cnn":
        layers, n_features = networks.image_network(model.networks, model.cnn_channels)
        return CNNClassifier(layers, n_features, n_classes)
    if model.method in ("mil", "gated-mil"):
        return MILClassifier(
            networks.feature_network(model.networks, normalised=False),
            networks.N_FEATURES[model.networks],
            n_classes,
            patch_size=model.patch_size,
            grid_step=model.grid_step,
            gated=model.method == "gated-mil",
            chunk_size=model.grid_chunk,
            mean=mean,
            std=std,
        )
    stride, lost = networks.ATTENTION_STRIDE[model.networks], networks.ATTENTION_LOSS[model.networks]
    learned = model.method == "ats"
    attention: nn.Module = UniformAttention(stride, lost)
    if learned:
        attention = networks.attention_network(model.networks)
    n_features = networks.N_FEATURES[model.networks]
    feature: nn.Module = networks.feature_network(model.networks, normalised=not model.positions)
    if model.positions:
        feature = PlacedFeatures(feature, n_features)
    sampling = AttentionSampling(
        attention,
        feature,
        model.n_patches,
        model.patch_size,
        replace=model.replace,
        estimator=model.estimator,
        control_variate=model.control_variate,
        receptive_field="auto" if learned else lost,
        positions=model.positions,
        mean=mean,
        std=std,
    )
    return ATSClassifier(sampling, n_features, n_classes, model.feature_scale)


def patch_features(model: Classifier) -> nn.Module | None:
    """The network from patches to features; a CNN has none."""
    if isinstance(model, CNNClassifier):
        return None
    return model.sampling.feature if isinstance(model, ATSClassifier) else model.feature


def normalisation(config: ExperimentConfig) -> Normalisation:
    """Mean and standard deviation by channel, of views and patches alike."""
    return _NETWORKS[config.experiment].NORMALISATION[config.model.networks]


def view_size(config: ExperimentConfig, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Pixels (h, w) of the view of an image, in whole cells of the attention's grid; None: the image itself."""
    model = config.model
    if model.method in ("mil", "gated-mil"):
        return None
    if model.method == "cnn":
        height, width = (max(1, round(size * model.cnn_scale)) for size in image_size)
        return height, width
    networks = _NETWORKS[config.experiment]
    stride, lost = networks.ATTENTION_STRIDE[model.networks], networks.ATTENTION_LOSS[model.networks]
    height, width = (lost + stride * max(1, round((size * model.view_scale - lost) / stride)) for size in image_size)
    return height, width
