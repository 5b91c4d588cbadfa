"""Networks that the experiments train."""

from ats.models import colon_cancer, megapixel_mnist, speed_limits
from ats.models.classifier import ATSClassifier, CNNClassifier, SamplingClassifier, UniformAttention
from ats.models.evidence import EvidenceClassifier
from ats.models.mil import MILClassifier
from ats.models.nested import NestedClassifier

__all__ = [
    "ATSClassifier",
    "CNNClassifier",
    "EvidenceClassifier",
    "MILClassifier",
    "NestedClassifier",
    "SamplingClassifier",
    "UniformAttention",
    "colon_cancer",
    "megapixel_mnist",
    "speed_limits",
]
