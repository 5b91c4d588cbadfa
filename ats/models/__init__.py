"""Networks that the experiments train."""

from ats.models import colon_cancer, megapixel_mnist, speed_limits
from ats.models.classifier import ATSClassifier, CNNClassifier, UniformAttention
from ats.models.mil import MILClassifier

__all__ = [
    "ATSClassifier",
    "CNNClassifier",
    "MILClassifier",
    "UniformAttention",
    "colon_cancer",
    "megapixel_mnist",
    "speed_limits",
]
