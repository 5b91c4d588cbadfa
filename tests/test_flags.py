"""Numbers, flags and choices of other types are taken everywhere or refused by name, and limits are counted right."""

import numpy as np
import pytest
import torch
from torch import nn

import ats
import ats_kernels
from tests.helpers import seeded

LOGITS = torch.randn(2, 4, 4, generator=seeded())
VIEW, IMAGE = LOGITS[:, None], torch.rand(2, 1, 16, 16, generator=seeded(1))
LOG_A = torch.tensor([[-2.0, -3.0]])
HEAD = nn.Linear(3, 2)


def make_model(attention=None, **options):
    torch.manual_seed(0)
    feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return ats.nn.AttentionSampling(attention or nn.Identity(), feature, 4, 4, receptive_field=0, **options).eval()


FLAGS = {
    "replace": lambda v: ats.sample_cells(LOGITS, 2, replace=v),
    "allow_fewer": lambda v: ats.sample_cells(LOGITS, 2, allow_fewer=v),
    "allow_fewer of a module": lambda v: ats.nn.SamplePatches(2, 4, allow_fewer=v),
    "validate": lambda v: ats.sample_cells(LOGITS, 2, validate=v),
    "control_variate": lambda v: ats.expectation(torch.ones(1, 2, 3), LOG_A, control_variate=v),
    "replace of weights": lambda v: ats.estimator_weights(LOG_A, replace=v),
    "replace of the op": lambda v: ats_kernels.sample(LOGITS.flatten(1), 2, replace=v),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag):
    for value in (True, False):
        FLAGS[flag](value)
    for value, mend in (("no", ""), (np.bool_(True), r"=bool\(True\) is one"), (1, r"=bool\(1\) is one"), ([], "")):
        with pytest.raises(TypeError, match=rf"{flag.split()[0]} must be True or False, got .*{mend}"):
            FLAGS[flag](value)


def test_choices_that_are_no_text():
    cells = ats.sample_cells(LOGITS, 2)
    for value in (np.array(["topk", "sample"]), ["topk"], None, torch.zeros(2)):
        with pytest.raises(ValueError, match="unknown selection"):
            ats.sample_cells(LOGITS, 2, selection=value)
        with pytest.raises(ValueError, match="unknown estimator"):
            ats.pool(torch.ones(2, 2, 3), cells, estimator=value)
        with pytest.raises(ValueError, match="unknown padding"):
            ats.sample_patches(IMAGE, LOGITS, 2, 4, padding=value)
    assert ats.sample_cells(LOGITS, 2, selection=np.str_("topk")).selection == "topk"


@pytest.mark.parametrize("name", ["tolerance", "lead"])
def test_limits_of_anytime(name):
    model, draw = make_model(), {"budget": 9, "generator": seeded()}
    expected = ats.anytime(model, HEAD, VIEW, IMAGE, **draw, **{name: 0.5})
    for value in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        found = ats.anytime(model, HEAD, VIEW, IMAGE, budget=9, generator=seeded(), **{name: value})
        assert torch.equal(found.logits, expected.logits)
    for value in ("a", np.array([1.0, 2.0]), True):
        with pytest.raises(TypeError, match=f"{name} must be a number, got"):
            ats.anytime(model, HEAD, VIEW, IMAGE, budget=9, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a finite number, got nan"):
        ats.anytime(model, HEAD, VIEW, IMAGE, budget=9, **{name: float("nan")})


def test_a_single_cell_is_the_full_model():
    model = make_model(nn.AdaptiveAvgPool2d(1))
    found = ats.anytime(model, HEAD, VIEW, IMAGE, budget=1000, tolerance=0.0)
    assert found.patches_used.tolist() == [1, 1]
    assert found.standard_error.tolist() == [[0.0, 0.0]] * 2
    torch.testing.assert_close(found.logits.float(), HEAD(model.full(VIEW, IMAGE)), rtol=1e-5, atol=1e-6)


def test_advice_of_the_op_can_be_followed():
    flat = LOGITS.flatten(1)
    few = flat.clone()
    few[1, 3:] = -torch.inf
    for logits, n in ((flat, 17), (few, 4)):
        with pytest.raises(ValueError, match=r"draw fewer$"):
            ats_kernels.sample(logits, n, method="topk")
        with pytest.raises(ValueError, match=r"draw fewer or use replace=True$"):
            ats_kernels.sample(logits, n)
        ats_kernels.sample(logits, n, replace=True)
        ats_kernels.sample(logits, n if logits is few else 16, replace=logits is few)
