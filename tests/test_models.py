"""The experiments' networks are what they are said to be."""

import pytest
import torch
from torch import nn

import ats
from ats.models import ATSClassifier, UniformAttention
from ats.models.classifier import NETWORKS, SoftBound
from ats.models.megapixel_mnist import ATTENTION_STRIDE, N_FEATURES, attention_network, feature_network


def convolutions(network: nn.Module) -> list[tuple[int, int, int]]:
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return [(layer.kernel_size[0], layer.in_channels, layer.out_channels) for layer in layers]


def test_published_networks_have_the_published_layers() -> None:
    assert convolutions(attention_network("paper")) == [(3, 1, 8), (3, 8, 8), (3, 8, 1)]
    assert convolutions(feature_network("paper")) == [(7, 1, 32), (3, 32, 32), (3, 32, 32), (3, 32, 32)]
    assert sum(isinstance(layer, nn.Tanh) for layer in attention_network("paper")) == 2


@pytest.mark.parametrize("networks", NETWORKS)
def test_grids_start_at_the_views_edge_and_features_have_length_one(networks: str) -> None:
    view, patches = torch.rand(2, 1, 21, 34), torch.rand(3, 1, 50, 50)
    stride = ATTENTION_STRIDE[networks]
    assert attention_network(networks)(view).shape == (2, 1, 21 // stride, 34 // stride)
    assert UniformAttention(stride)(view).shape == (2, 21 // stride, 34 // stride)
    assert ats.receptive_field(attention_network(networks)) == 0
    features = feature_network(networks)(patches)
    assert features.shape == (3, N_FEATURES[networks])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_bounded_logits_keep_their_order_and_a_gradient() -> None:
    """A digit's logit must not grow without end, nor must two of them become equal short of the limit."""
    logits = torch.linspace(-20, 20, 9, dtype=torch.float64, requires_grad=True)
    bounded = SoftBound(5.0)(logits)
    bounded.sum().backward()
    assert bool((bounded.diff() > 0).all())
    assert float(bounded.detach().abs().max()) < 5
    torch.testing.assert_close(SoftBound(5.0)(logits / 1000), logits / 1000, rtol=1e-5, atol=0)
    assert logits.grad is not None
    assert bool((logits.grad > 0).all())


def test_unknown_networks_are_named() -> None:
    for build in (attention_network, feature_network):
        with pytest.raises(ValueError, match="unknown networks 'resnet', expected one of 'paper', 'modern'"):
            build("resnet")


def test_uniform_attention_has_the_same_mass_everywhere() -> None:
    logits = UniformAttention(stride=4)(torch.rand(2, 3, 32, 41))
    assert logits.shape == (2, 8, 10)
    assert not logits.any()


def test_classifier_scales_the_pooled_features_before_the_head() -> None:
    sampling = ats.nn.AttentionSampling(UniformAttention(), feature_network("paper"), 4, 20)
    view, image = torch.rand(2, 1, 10, 10), torch.rand(2, 1, 60, 60)
    model = ATSClassifier(sampling, 32, 10, feature_scale=8.0)
    scores, sample = model(view, image, generator=torch.Generator().manual_seed(0))
    pooled, _, again = sampling(view, image, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample.indices, again.indices)
    torch.testing.assert_close(scores, pooled * 8 @ model.head.weight.T + model.head.bias)
