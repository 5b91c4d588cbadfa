"""Deep MIL: its attention is the published formula, its grid covers the image, and chunks change nothing."""

import pytest
import torch
from torch import Tensor, nn

from ats.models.classifier import CNNClassifier
from ats.models.colon_cancer import feature_network
from ats.models.mil import MILAttention, MILClassifier, grid_offsets
from tests.helpers import cut, seeded


@pytest.mark.parametrize("gated", [False, True])
def test_attention_is_the_formula_of_ilse_and_others(gated: bool) -> None:
    torch.manual_seed(0)
    attention = MILAttention(6, hidden=5, gated=gated).double()
    features = torch.randn(2, 7, 6, dtype=torch.float64, generator=seeded())
    for b in range(2):
        scores = []
        for h in features[b]:
            v, w = attention.tanh_layer, attention.score
            hidden = torch.tanh(v.weight @ h + v.bias)
            if attention.gate is not None:
                hidden = hidden / (1 + torch.exp(-(attention.gate.weight @ h + attention.gate.bias)))
            scores.append(float((w.weight[0] @ hidden + w.bias).detach()))
        expected = torch.tensor(scores, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(attention(features)[b].exp(), expected, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in attention.parameters()) == (6 + 1) * 5 * (1 + gated) + 6


def test_published_grids() -> None:
    """2,500 patches of 27×27 an image of colon cancer; 192 of 100×100 a photograph, as published."""
    colon = grid_offsets((500, 500), 27, 10)
    assert colon.shape == (2500, 2)
    assert colon[0].tolist() == [-8, -8]  # 5 − 13.5, rounded half up
    assert colon[51].tolist() == [2, 2]
    assert grid_offsets((960, 1280), 100, 80).shape == (192, 2)


@pytest.mark.parametrize(("size", "patch", "step"), [((500, 500), 27, 27), ((40, 61), 9, 9), ((40, 61), 9, 4)])
def test_grids_without_gaps_read_every_pixel(size: tuple[int, int], patch: int, step: int) -> None:
    covered = torch.zeros(size)
    for top, left in grid_offsets(size, patch, step).tolist():
        covered[max(0, top) : top + patch, max(0, left) : left + patch] += 1
    assert bool((covered > 0).all())


def model(chunk: int, *, gated: bool = False) -> MILClassifier:
    torch.manual_seed(1)
    feature = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3))
    return MILClassifier(feature, 4, 3, patch_size=9, grid_step=9, gated=gated, chunk_size=chunk)


def test_it_pools_the_features_of_the_grids_patches() -> None:
    image = torch.randint(256, (2, 3, 20, 31), dtype=torch.uint8, generator=seeded())
    mil = model(0, gated=True).eval()
    logits, sample = mil(image, image)
    assert sample is None
    for b in range(2):
        patches = torch.stack([cut(image[b], y, x, (9, 9)).float() / 255 for y, x in grid_offsets((20, 31), 9, 9)])
        features = mil.feature(patches)
        weights = mil.attention(features[None])[0].exp()
        torch.testing.assert_close(logits[b], mil.head(weights @ features), rtol=1e-4, atol=1e-5)


def gradients(mil: MILClassifier, image: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(7)
    logits, _ = mil(image, image)
    logits.square().sum().backward()
    return logits.detach(), [p.grad for p in mil.parameters() if p.grad is not None]


def test_chunks_give_the_same_loss_and_gradients() -> None:
    """Dropout must be the same when a chunk is computed again for the backward pass."""
    image = torch.randint(256, (2, 3, 20, 31), dtype=torch.uint8, generator=seeded())
    mil = model(5)
    mil.feature[-1] = nn.Identity()
    plain = model(0)
    plain.feature[-1] = nn.Identity()
    (logits, grads), (expected, expected_grads) = gradients(mil, image), gradients(plain, image)
    torch.testing.assert_close(logits, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    one_chunk, whole = gradients(model(1000), image), gradients(model(0), image)  # both drop the same features
    for grad, other in zip(one_chunk[1], whole[1], strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def test_features_are_shared_with_attention_sampling_but_for_their_length() -> None:
    torch.manual_seed(0)
    normalised = feature_network("paper").eval()
    plain = feature_network("paper", normalised=False).eval()
    plain.load_state_dict(normalised.state_dict())
    patches = torch.rand(3, 3, 27, 27)
    features = plain(patches)
    torch.testing.assert_close(normalised(patches), features / features.norm(dim=1, keepdim=True))


def test_images_of_different_sizes_are_as_each_alone() -> None:
    images = [torch.rand(3, *size, generator=seeded()) for size in ((40, 52), (61, 33))]
    feature = nn.Sequential(nn.Conv2d(3, 4, 5), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    mil = MILClassifier(feature, 4, 2, patch_size=9, grid_step=9)
    cnn = CNNClassifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten()), 4, 2)
    for model in (mil, cnn):
        alone = torch.cat([model(image[None], image[None])[0] for image in images])
        torch.testing.assert_close(model(images, images)[0], alone)
