"""Nested sampling given what does not fit: messages say what came and how to mend it, and mending by them works."""

import math

import pytest
import torch
from torch import nn

import ats
from ats.nn import Zoom
from tests.nested_models import bytes_of, cells_of, draw_image, model_of, small_model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Zoom(cells_of(4), 1 / 128, 2), ValueError, "pixels of the image .* pass 128"),
        (lambda: Zoom(cells_of(4), 2.5, 2), TypeError, "scale must be an int"),
        (lambda: Zoom(cells_of(4), 8, 0), ValueError, "n must be at least 1"),
        (lambda: Zoom(cells_of(4), 8, 1, context=-1), ValueError, "context must be at least 0"),
        (lambda: model_of(), TypeError, "sequence of ats.nn.Zoom"),
        (lambda: model_of(Zoom(cells_of(4), 8, 1), Zoom(cells_of(4), 8, 1)), ValueError, "scales must fall"),
        (lambda: model_of(Zoom(cells_of(4), 8, 1), Zoom(cells_of(4), 3, 1)), ValueError, "multiple of the next"),
        (lambda: model_of(Zoom(cells_of(4), 8, 1, context=4)), ValueError, "whole images, which have nothing around"),
        (lambda: model_of(Zoom(cells_of(4), 8, 1), padding="wrap"), ValueError, "unknown padding"),
        (lambda: model_of(Zoom(cells_of(4), 8, 1), replace=True, estimator="unordered"), ValueError, "unordered"),
    ],
)
def test_mistakes_in_the_making(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("zooms", "message"),
    [
        ((Zoom(cells_of(4), 8, 1), Zoom(cells_of(3), 4, 1)), "no multiple of its cells"),
        ((Zoom(cells_of(4), 8, 1), Zoom(cells_of(4), 4, 1, context=2, receptive_field="auto")), "pass context=4"),
        ((Zoom(cells_of(4), 8, 1), Zoom(nn.Conv2d(3, 1, 5), 4, 1, receptive_field=4)), "pass context=2"),
    ],
)
def test_networks_that_do_not_fit_their_regions(zooms, message):
    with pytest.raises(ValueError, match=message):
        model_of(*zooms)(None, bytes_of(1, 64, 64))


def test_advice_on_context_works():
    for network in (nn.Conv2d(3, 1, 5), cells_of(4), nn.Conv2d(3, 1, 7, 4, 3)):
        for context in range(6):
            try:
                model = model_of(Zoom(cells_of(4), 8, 1), Zoom(network, 4, 1, context=context, receptive_field="auto"))
                model(None, bytes_of(1, 64, 64))
            except ValueError as error:
                advised = int(str(error).rpartition("context=")[2])
                zoom = Zoom(network, 4, 1, context=advised, receptive_field="auto")
                model_of(Zoom(cells_of(4), 8, 1), zoom)(None, bytes_of(1, 64, 64))


def test_mistakes_in_what_is_shown():
    model, image = small_model((2, 2)), draw_image(2)
    for images, error, message in [
        (image[0], ValueError, "image must be"),
        ([], ValueError, "empty sequence"),
        ([image[0], "x.svs"], TypeError, "must be a tensor .* got str"),
        ([image[0], image[1].expand(2, -1, -1)], ValueError, "must agree in channels"),
        (ats.sources.from_arrays([image[0]]), TypeError, "a batch of it is"),
    ]:
        with pytest.raises(error, match=message):
            model(None, images)
    with pytest.raises(ValueError, match="2 but logits have 1"):
        model(torch.zeros(1, 1, 1, 9).double(), image)
    with pytest.raises(ValueError, match="mask must be"):
        model(None, image, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        model(None, image, mask=torch.ones(1, 3))
    model.levels[1].n = 4
    with pytest.raises(ValueError, match="cannot draw n=4 cells from K=3"):
        model(None, image)
    odd = model_of(Zoom(nn.Conv2d(1, 1, (1, 3), (1, 3), bias=False), 5, 1), Zoom(cells_of(1, 1), 1, 1), channels=1)
    assert math.isfinite(float(odd(None, torch.rand(1, 1, 10, 30))[0].sum().detach()))
