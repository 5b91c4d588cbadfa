"""Networks that the experiments train."""

from ats.models.classifier import ATSClassifier, UniformAttention
from ats.models.megapixel_mnist import attention_network, feature_network

__all__ = ["ATSClassifier", "UniformAttention", "attention_network", "feature_network"]
