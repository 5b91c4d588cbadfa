"""Features that are told where in the image their patches lie."""

import pytest
import torch
from torch import Tensor, nn

import ats
from ats.models.classifier import PlacedFeatures
from tests.helpers import seeded
from tests.small_models import FromView, UnitNorm, make_images


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return make_images()


def test_features_that_take_no_positions_are_refused_when_the_module_is_made():
    feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(
        TypeError, match=r"feature\(patches, positions\), which Sequential does not take; .*PlacedFeatures"
    ):
        ats.nn.AttentionSampling(FromView(), feature, 3, 4, positions=True)
    placed = PlacedFeatures(feature, 3)
    model = ats.nn.AttentionSampling(FromView(), placed, 3, 4, positions=True)
    pooled, _, _ = model(torch.rand(2, 5, 6), torch.rand(2, 1, 20, 24))
    assert pooled.shape == (2, 3)


class Placed(nn.Module):
    """Features of a patch's mean colour and, where it is told, of where the patch lies."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 8), UnitNorm())
        self.told = told
        self.calls: list[Tensor] = []

    def forward(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        assert (positions is not None) == self.told
        if positions is None:
            positions = torch.zeros(len(patches), 2, dtype=patches.dtype)
        self.calls.append(positions)
        return self.layers(torch.cat([patches.mean((1, 2, 3)).unsqueeze(-1), positions], dim=-1))


def test_features_are_told_where_their_patches_lie(images):
    """(y, x) of the patches' centres, for drawn cells and for all of them, in their order."""
    view, image = images
    model = ats.nn.AttentionSampling(FromView(), Placed(told=True).double(), 4, (5, 7), positions=True)
    _, _, sample = model(view, image, generator=seeded())
    centres = sample.offsets + torch.tensor([2.5, 3.5])
    assert torch.equal(model.feature.calls[0].view(2, 4, 2), (centres / torch.tensor([24.0, 30.0])).double())
    model.full(view, image)
    every = model.feature.calls[1].view(2, 8, 10, 2)
    assert (every[0, 1:, :, 0] > every[0, :-1, :, 0]).all()
    assert (every[0, :, 1:, 1] > every[0, :, :-1, 1]).all()


@pytest.mark.parametrize("told", [True, False])
def test_a_class_that_is_a_place_is_learned_only_by_features_that_know_it(told: bool) -> None:
    """Each image has one bright cell; the class is the quarter that it lies in, which no patch shows."""
    torch.manual_seed(0)
    cells = torch.randint(64, (512,), generator=seeded())
    label = 2 * (cells // 8 >= 4) + (cells % 8 >= 4)
    view = nn.functional.one_hot(cells, 64).view(-1, 1, 8, 8).float()
    image = view.repeat_interleave(4, 2).repeat_interleave(4, 3)
    model, head = ats.nn.AttentionSampling(FromView(), Placed(told), 3, 4, positions=told), nn.Linear(8, 4)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=0.02)
    for step in range(150):
        chosen = torch.randint(384, (64,), generator=seeded(step))
        pooled, _, _ = model(view[chosen], image[chosen], generator=seeded(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(8 * pooled), label[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        error = (head(8 * model.full(view[384:], image[384:])).argmax(-1) != label[384:]).float().mean()
    assert error < 0.1 if told else error > 0.5
