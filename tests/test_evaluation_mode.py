"""Predicting changes no model: what is training is found wherever it hides."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ats
from tests.helpers import seeded

IMAGE = torch.rand(2, 1, 24, 20, generator=seeded())
VIEW = torch.randn(2, 1, 6, 5, generator=seeded(1))


class DropsInAMethod(nn.Module):
    """Its forward does not name `training`; what it calls does."""

    def forward(self, x):
        return self.middle(x)

    def middle(self, x):
        return torch.cat([self.last(row) for row in (x,)])

    def last(self, x):
        return F.dropout(x, 0.5, self.training)


class DropsInALambda(nn.Module):
    def forward(self, x):
        return (lambda y: F.dropout(y, 0.5, self.training))(x)


def make_model(*layers):
    torch.manual_seed(0)
    feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), *layers)
    return ats.nn.AttentionSampling(nn.Identity(), feature, 4, 4, receptive_field=0).eval()


@pytest.mark.parametrize("kind", [DropsInAMethod, DropsInALambda])
def test_a_training_layer_is_found_by_the_methods_it_calls(kind):
    model = make_model(kind())
    model.feature[-1].train()
    with pytest.raises(ValueError, match=rf"sampling.feature.2 \({kind.__name__}\) is in training mode"):
        model.full(VIEW, IMAGE)
    model.eval()
    whole = model.full(VIEW, IMAGE)
    assert torch.allclose(model.full(VIEW, IMAGE, chunk_size=3), whole, atol=1e-6)


def test_the_outermost_flag_alone_is_no_training():
    model = make_model()
    expected = model.full(VIEW, IMAGE)
    model.training = True  # and none of its layers
    assert torch.equal(model.full(VIEW, IMAGE), expected)


norm, linear = nn.BatchNorm1d(3), nn.Linear(3, 2)


def heads(layer):
    def with_default(f, layer=layer):
        return linear(layer(f))

    return {
        "closure": lambda f: linear(layer(f)),
        "global": lambda f: linear(norm(f)),
        "default": with_default,
        "partial": functools.partial(lambda one, f: linear(one(f)), layer),
        "keyword": functools.partial(with_default, layer=layer),
        "method": nn.Sequential(layer, linear).forward,
    }


@pytest.mark.parametrize("call", [ats.predict, functools.partial(ats.anytime, budget=9, lead=1.0)])
@pytest.mark.parametrize("kind", heads(norm))
def test_a_heads_modules_are_found_where_a_function_has_them(kind, call):
    """Its running statistics do not move, not even before an error."""
    norm.reset_running_stats()
    norm.train()
    with pytest.raises(ValueError, match=r"head(\.0)? \(BatchNorm1d\) is in training mode"):
        call(make_model(), heads(norm)[kind], VIEW, IMAGE)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))
    norm.eval()
    call(make_model(), heads(norm)[kind], VIEW, IMAGE)
