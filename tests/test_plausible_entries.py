"""Quantities that cannot be meant, at every entry that takes them."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ats
from ats import diagnostics
from ats_kernels import area_downsample, extract_patches, plausible
from tests.helpers import seeded

HEAD = nn.Linear(3, 2)


def make_model(attention):
    torch.manual_seed(0)
    feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return ats.nn.AttentionSampling(attention, feature, 4, 4, receptive_field=0).eval()


class Softmaxed(nn.Module):
    def forward(self, view):
        return view.flatten(1).softmax(-1).view(len(view), 6, 5)


IMAGE = torch.rand(2, 1, 24, 20, generator=seeded())
VIEW = torch.randn(2, 1, 6, 5, generator=seeded(1))
MASK = torch.rand(6, 5, generator=seeded(2)) > 0.3
LOGITS = VIEW[:, 0]

TAKES_LOGITS = {
    "sample_cells": lambda z: ats.sample_cells(z, 3),
    "masked": lambda z: ats.sample_cells(z, 3, mask=MASK),
    "heatmap": lambda z: ats.heatmap(z, (24, 20)),
    "heatmap masked": lambda z: ats.heatmap(z, (24, 20), mask=MASK),
    "warning_signs": lambda z: diagnostics.warning_signs(z),
    "border_mass": lambda z: diagnostics.border_mass(z),
    "peak_mass": lambda z: diagnostics.peak_mass(z),
    "class_spread": lambda z: diagnostics.class_spread(z, torch.tensor([0, 1])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("call", TAKES_LOGITS)
def test_attention_is_no_logits(call, dtype):
    attention = LOGITS.flatten(1).softmax(-1).view_as(LOGITS).to(dtype)
    with pytest.raises(ValueError, match=r"add up to 1 in every row, as attention after a softmax.*logits.log\(\)"):
        TAKES_LOGITS[call](attention)
    TAKES_LOGITS[call](attention.log())


@pytest.mark.parametrize("call", ["forward", "masked", "full", "full masked", "predict", "topk", "anytime"])
def test_a_network_that_ends_in_a_softmax_is_told(call):
    calls = {
        "forward": lambda model: model(VIEW, IMAGE),
        "masked": lambda model: model(VIEW, IMAGE, mask=MASK),
        "full": lambda model: model.full(VIEW, IMAGE),
        "full masked": lambda model: model.full(VIEW, IMAGE, mask=MASK),
        "predict": lambda model: ats.predict(model, HEAD, VIEW, IMAGE),
        "topk": lambda model: ats.predict(model, HEAD, VIEW, IMAGE, selection="topk"),
        "anytime": lambda model: ats.anytime(model, HEAD, VIEW, IMAGE, budget=8, lead=1.0, mask=MASK),
    }
    with pytest.raises(ValueError, match="as attention after a softmax does"):
        calls[call](make_model(Softmaxed()))
    calls[call](make_model(nn.Identity()))


def test_no_entry_takes_a_list_of_scores_for_a_map():
    cells = ats.sample_cells(torch.randn(2, 1, 64, generator=seeded()), 3)
    model, sampler = make_model(nn.Identity()), ats.nn.SamplePatches(3, 4)
    for call in (
        lambda: ats.read_patches(IMAGE, cells, 4),
        lambda: sampler.read(IMAGE, cells),
        lambda: model.read_sample(IMAGE, cells, (6, 5)),
    ):
        with pytest.raises(ValueError, match=r"a grid of \(1, 64\) cells.*logits.reshape\(B, gh, gw\)"):
            call()


UNIT = {"mean": [0.5], "std": [0.25]}


@pytest.mark.parametrize("op", ["patches", "view", "model"])
@pytest.mark.parametrize("kind", ["uint16", "int16", "float32 beyond bytes"])
def test_deep_images_with_statistics_of_bytes_are_warned_of(monkeypatch, op, kind):
    def run(image, **given):
        if op == "view":
            area_downsample(image, 4, **given)
        elif op == "patches":
            extract_patches(image, torch.zeros(2, 1, 2, dtype=torch.int64), 9, **given)
        else:
            ats.sample_patches(image, torch.zeros(2, 6, 5), 3, 4, **given)

    monkeypatch.setattr(plausible, "_warned", set())
    deep = torch.from_numpy(np.random.default_rng(0).integers(0, 30_000, (2, 1, 24, 20)))
    image = deep.to(getattr(torch, kind.partition(" ")[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(image, mean=[15_000.0], std=[9_000.0])
        run(image)
        run((deep % 2).to(image.dtype), **UNIT)  # a mask, say
        glaring = torch.rand(2, 1, 24, 20, generator=seeded())
        glaring[:, :, 1, 1] = 50_000.0  # a few pixels beyond what a float image in [0, 1] has
        run(glaring, **UNIT)
    expected = "floating-point numbers up to" if "float" in kind else rf"torch.{kind} numbers up to .*own units"
    with pytest.warns(UserWarning, match=expected):
        run(image, **UNIT)
