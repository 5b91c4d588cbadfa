"""Who is at fault where no draw fails: pixels that only the features see, and dtypes that a network does not take."""

import pytest
import torch
from torch import nn

import ats
from ats_kernels import area_downsample
from tests.helpers import seeded

IMAGE = torch.rand(2, 1, 24, 20, generator=seeded())
VIEW = area_downsample(IMAGE, (6, 5))


def make_model(*first):
    torch.manual_seed(0)
    feature = nn.Sequential(*first, nn.Flatten(), nn.Linear(16, 3))
    return ats.nn.AttentionSampling(nn.Conv2d(1, 1, 1), feature, 30, 4)


class Replaces(nn.Module):
    def forward(self, x):
        return x.nan_to_num(0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", ["training", "full"])
def test_pixels_that_only_features_see(call, value):
    """The view is clean. All cells are read, so that the pixel is."""
    bad = IMAGE.clone()
    bad[1, 0, 11, 7] = value
    run = {"training": lambda model: model(VIEW, bad)[0], "full": lambda model: model.eval().full(VIEW, bad)}[call]
    with pytest.raises(ValueError, match=rf"image holds 1 NaN.*\({value}\) in image 1, channel 0, row 11, column 7"):
        run(make_model())
    assert run(make_model(Replaces())).isfinite().all()  # a network may make something of them
    model = make_model()
    nn.init.constant_(model.feature[-1].bias, float("nan"))
    bad[1, 0, 11, 7] = 0.0
    assert run(model).isnan().all()  # which a scaler of gradients may count on


def test_full_names_what_cannot_be_attended_to():
    model = make_model().eval()
    view = VIEW.clone()
    view[1, 0, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"view holds 1 NaN.*in image 1, channel 0, row 2, column 3"):
        model.full(view, IMAGE)
    mask = torch.ones(2, 6, 5, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="logits of row 1 are all −inf: every cell is masked"):
        model.full(VIEW, IMAGE, mask=mask)


def test_dtypes_that_a_network_does_not_take():
    model = make_model().eval()
    with pytest.raises(TypeError, match=r"feature network's weights are torch.float32, but patches are torch.float64"):
        model(VIEW, IMAGE.double())
    bytes_ = (VIEW * 255).to(torch.uint8)
    with pytest.raises(TypeError, match=r"attention network.*but the view is torch.uint8; pass view.to\(torch.float32"):
        model(bytes_, IMAGE)
    model.sampler.dtype = torch.float32  # as the advice is
    pooled = model(bytes_.to(torch.float32), IMAGE.double(), generator=seeded())[0]
    assert torch.equal(pooled, model(bytes_.float(), IMAGE, generator=seeded())[0])
