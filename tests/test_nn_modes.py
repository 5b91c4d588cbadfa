"""`ats.nn` and what a network does in training only: layers that differ then, and activation checkpointing."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ats
from tests.helpers import assert_close, seeded
from tests.small_models import make_images, make_model


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return make_images()


class Trained(nn.Module):
    """What looks at its own mode, as layers outside of torch do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if self.training else 1)


DIFFERENT = {
    "BatchNorm1d": nn.BatchNorm1d(3),
    "Dropout": nn.Dropout(0.1),
    "AlphaDropout": nn.AlphaDropout(0.1),
    "RReLU": nn.RReLU(),
    "InstanceNorm1d": nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()
    ),
    "Trained": Trained(),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_reading_all_cells_is_refused_while_a_layer_is_training(name, images) -> None:
    """One layer is enough, wherever it is; its statistics stay, and the error says which it is."""
    layer = copy.deepcopy(DIFFERENT[name])
    model = make_model()
    model.feature = nn.Sequential(model.feature, nn.Sequential(layer)).double()
    model.eval()
    full = model.full(*images, chunk_size=7)
    assert_close(full, model.full(*images))
    layer.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    where = rf"sampling\.feature\.1\.0(\.1)? \({name}\) is in training mode.*model\.eval\(\)"
    for run in (lambda: model.full(*images), lambda: ats.predict(model, nn.Linear(3, 2).double(), *images)):
        with pytest.raises(ValueError, match=where):
            run()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_that_are_the_same_in_training_may_be(images) -> None:
    model = make_model()
    model.feature = nn.Sequential(
        model.feature, nn.Dropout(0.0), nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1), nn.Flatten()
    )
    assert model.training
    got = model.full(*images)
    assert_close(got, model.eval().full(*images))
    model.feature = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(25, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=r"keeps no running statistics.*track_running_stats=True"):
        model.full(*images)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, images) -> None:
    """torch's own generator is wound back for the second pass; one that is passed is not, and is refused there."""
    view, image = images
    model = make_model()

    def gradient(step) -> list[Tensor]:
        torch.manual_seed(3)
        torch.rand(())  # a state that no fresh process begins with
        start = view.clone().requires_grad_()
        model.zero_grad()
        pooled = step(start)
        torch.rand(5)  # and that has moved on before the backward pass
        pooled.square().sum().backward()
        return [start.grad, *(value.grad.clone() for value in model.parameters())]

    def recomputed(start: Tensor) -> Tensor:
        return checkpoint(lambda v: model(v, image)[0], start, use_reentrant=reentrant)

    for got, want in zip(gradient(recomputed), gradient(lambda start: model(start, image)[0]), strict=True):
        assert_close(got, want)

    generator = seeded()
    start = view.clone().requires_grad_()
    pooled = checkpoint(lambda v: model(v, image, generator=generator)[0], start, use_reentrant=reentrant)
    with pytest.raises(
        ValueError, match=r"a draw with a generator of its own was run again in the backward pass.*checkpointing"
    ):
        pooled.sum().backward()
