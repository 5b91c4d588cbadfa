"""The experiments' networks are what they are said to be."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import ats
from ats.experiments.build import build_model, view_size
from ats.experiments.checkpoints import check_weights
from ats.experiments.registry import EXPERIMENTS
from ats.models import ATSClassifier, UniformAttention, colon_cancer, megapixel_mnist, speed_limits
from ats.models.classifier import SoftBound
from ats.models.megapixel_mnist import NETWORKS, attention_network, feature_network
from ats.models.networks import NETWORK_NAMES
from ats.models.resnet import ResidualBlock
from tests.helpers import seeded


def convolutions(network: nn.Module) -> list[tuple[int, int, int]]:
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return [(layer.kernel_size[0], layer.in_channels, layer.out_channels) for layer in layers]


def test_published_networks_have_the_published_layers() -> None:
    assert convolutions(attention_network("paper")) == [(3, 1, 8), (3, 8, 8), (3, 8, 1)]
    assert convolutions(feature_network("paper")) == [(7, 1, 32), (3, 32, 32), (3, 32, 32), (3, 32, 32)]
    assert sum(isinstance(layer, nn.Tanh) for layer in attention_network("paper")) == 2


def test_published_networks_of_the_image_experiments_have_the_published_layers() -> None:
    assert convolutions(colon_cancer.attention_network("paper")) == [(3, 3, 8), (3, 8, 8), (3, 8, 1)]
    assert convolutions(colon_cancer.feature_network("paper")) == [(4, 3, 36), (3, 36, 48)]
    linear = [layer for layer in colon_cancer.feature_network("paper") if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(1200, 512), (512, 512)]
    attention = convolutions(speed_limits.attention_network("paper"))
    assert attention == [(3, 3, 8), (3, 8, 16), (3, 16, 32), (3, 32, 1)]
    # ResNet-8: 7 convolutions of 3×3 and the linear layer; shortcuts of 1×1 where the stride is 2.
    features = convolutions(speed_limits.feature_network("paper"))
    assert [c for c in features if c[0] == 3] == [(3, 3, 32)] + [(3, 32, 32)] * 6
    assert [c for c in features if c[0] == 1] == [(1, 32, 32)] * 3


@pytest.mark.parametrize(
    ("networks", "channels", "depth", "widths"),
    [
        (megapixel_mnist, 1, 15, {32, 64, 128, 256}),
        (colon_cancer, 3, 7, {32}),
        (speed_limits, 3, 15, {32, 64, 128, 256}),
    ],
)
def test_cnns_are_residual_networks_of_the_published_depth(
    networks: ModuleType, channels: int, depth: int, widths: set[int]
) -> None:
    image_network = networks.NETWORKS["paper"].image
    layers, n_features = image_network(32)
    assert len([c for c in convolutions(layers) if c[0] == 3]) == depth
    assert {outputs for _, _, outputs in convolutions(layers)} == widths
    assert layers(torch.rand(2, channels, 33, 47)).shape == (2, n_features)
    slim, n_slim = image_network(16)
    assert n_slim == n_features // 2
    assert {outputs for _, _, outputs in convolutions(slim)} == {width // 2 for width in widths}


def test_a_residual_block_adds_to_what_its_first_relu_gives() -> None:
    block = ResidualBlock(3, 3, 1).eval()
    nn.init.zeros_(block.second.weight)
    maps = torch.randn(2, 3, 8, 8, generator=seeded())
    torch.testing.assert_close(block(maps), torch.relu(block.first_norm(maps)))
    assert ResidualBlock(3, 5, 2)(maps).shape == (2, 5, 4, 4)


@pytest.mark.parametrize("networks", NETWORK_NAMES)
@pytest.mark.parametrize(
    ("module", "image", "patch", "view", "cells"),
    [
        (colon_cancer, (500, 500), 27, (100, 100), {"paper": (100, 100), "modern": (50, 50)}),
        (speed_limits, (960, 1280), 100, (288, 384), {"paper": (35, 47), "modern": (36, 48)}),
        (speed_limits, (800, 1360), 100, (240, 408), {"paper": (29, 50), "modern": (30, 51)}),
    ],
)
def test_views_and_grids_have_the_published_sizes(
    module: ModuleType, networks: str, image: tuple[int, int], patch: int, view: tuple[int, int], cells: dict
) -> None:
    """Uniform sampling must draw from the very grid that attention sampling has, and patches lie where cells look."""
    name = module.__name__.rpartition(".")[2].replace("_", "-")
    config = EXPERIMENTS[name].presets["paper"]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, networks=networks))
    assert config.model.patch_size == patch
    assert view_size(config, image) == view
    attention = module.attention_network(networks)
    logits = attention(torch.rand(1, 3, *view))
    assert logits.shape[-2:] == cells[networks]
    stride, lost = module.NETWORKS[networks].stride, module.NETWORKS[networks].lost
    assert UniformAttention(stride, lost)(torch.rand(1, 3, *view)).shape[-2:] == cells[networks]
    assert ats.receptive_field(attention) == lost
    features = module.feature_network(networks)(torch.rand(2, 3, patch, patch))
    assert features.shape == (2, module.NETWORKS[networks].n_features)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("networks", NETWORK_NAMES)
@pytest.mark.parametrize(("experiment", "patch"), [("megapixel-mnist", 50), ("colon-cancer", 27), ("speed-limits", 64)])
def test_features_that_know_their_place(experiment: str, patch: int, networks: str) -> None:
    """The same patch in two places has two features, both of length 1, and the place's weights get a gradient."""
    config = EXPERIMENTS[experiment].presets["paper"]
    model = dataclasses.replace(config.model, networks=networks, positions=True, patch_size=patch)
    sampling = build_model(dataclasses.replace(config, model=model)).sampling.eval()
    assert sampling.positions
    patch_alone = torch.rand(1, config.data.channels, patch, patch, generator=seeded())
    places = torch.tensor([[0.1, 0.2], [0.1, 0.2], [0.9, 0.2], [0.1, 0.9]])
    features = sampling.feature(patch_alone.expand(4, -1, -1, -1), places)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(features[0], features[1])
    assert all((features[0] - other).norm() > 1e-3 for other in features[2:])
    features[0, 0].backward()
    assert all(weight.grad.abs().sum() > 0 for weight in sampling.feature.place.parameters())


def test_views_of_a_cnn_and_of_deep_mil() -> None:
    config = EXPERIMENTS["speed-limits"].presets["paper"]
    cnn = dataclasses.replace(config, model=dataclasses.replace(config.model, method="cnn", cnn_scale=0.5))
    assert view_size(cnn, (960, 1280)) == (480, 640)
    mil = dataclasses.replace(config, model=dataclasses.replace(config.model, method="mil"))
    assert view_size(mil, (960, 1280)) is None  # it reads the image alone


@pytest.mark.parametrize("networks", NETWORK_NAMES)
@pytest.mark.parametrize("make", [attention_network, feature_network])
def test_grey_images_are_convolved_channels_last(make, networks: str) -> None:
    """Both memory formats fit a grey image, so that asking for one may change nothing: the maps tell."""
    layouts = []
    for layer in (network := make(networks)).modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels > 1:
            layer.register_forward_hook(
                lambda _, __, maps: layouts.append(maps.is_contiguous(memory_format=torch.channels_last))
            )
    network(torch.rand(2, 1, 51, 51))
    assert len(layouts) >= 2
    assert all(layouts)


@pytest.mark.parametrize("networks", NETWORK_NAMES)
def test_grids_start_at_the_views_edge_and_features_have_length_one(networks: str) -> None:
    view, patches = torch.rand(2, 1, 21, 34), torch.rand(3, 1, 50, 50)
    stride = NETWORKS[networks].stride
    assert attention_network(networks)(view).shape == (2, 1, 21 // stride, 34 // stride)
    assert UniformAttention(stride)(view).shape == (2, 21 // stride, 34 // stride)
    assert ats.receptive_field(attention_network(networks)) == 0
    features = feature_network(networks)(patches)
    assert features.shape == (3, NETWORKS[networks].n_features)
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


def test_a_bound_that_was_widened_is_kept_with_the_weights() -> None:
    """Weights from before it was have the bound that they were trained with."""
    logits = torch.linspace(-30, 30, 61, dtype=torch.float64)
    wide, fresh = SoftBound(5.0).double(), SoftBound(5.0).double()
    wide.widen(1.5)
    torch.testing.assert_close(wide(logits), 7.5 * (logits / 7.5).tanh())
    assert not torch.equal(wide(logits), fresh(logits))
    fresh.load_state_dict(wide.state_dict())
    assert torch.equal(wide(logits), fresh(logits))
    older = SoftBound(5.0).double()
    older.load_state_dict({})
    assert torch.equal(older(logits), 5.0 * (logits / 5.0).tanh())
    check_weights(Path("old.ckpt"), {}, older)
    with pytest.raises(ValueError, match="'limit' does not fit"):
        check_weights(Path("old.ckpt"), {"limit": torch.zeros(2)}, older)


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


def test_attention_on_signs_starts_where_it_is_red_and_may_go_anywhere() -> None:
    """Redness of a colour, not its brightness: a dark red rim counts, a white wall does not."""
    torch.manual_seed(0)
    attention = speed_limits.attention_network("modern").eval()
    view = torch.full((1, 3, 64, 80), 0.5)
    view[0, :, 8:16, 8:16] = torch.tensor([0.3, 0.05, 0.05]).view(3, 1, 1)  # dark red: cell (1, 1)
    view[0, :, 32:40, 40:48] = 1.0  # white: cell (4, 5)
    logits = attention((view - 0.4) / 0.25)
    assert logits.shape == (1, 1, 8, 10)
    assert int(logits.flatten().argmax()) == 1 * 10 + 1
    assert abs(float((logits[0, 0, 4, 5] - logits[0, 0, 6, 8]).detach())) < 2
    logits[0, 0, 1, 1].backward()
    assert all(p.grad is not None for p in attention.parameters())
