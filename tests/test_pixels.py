"""NaN and infinite pixels: the error names the argument, the image and the pixel, and no network or mask."""

import pytest
import torch
from torch import nn

import ats
from ats_kernels import area_downsample
from ats_kernels.pixels import check_pixels
from tests.helpers import seeded

INF, NAN = float("inf"), float("nan")
HEAD = nn.Linear(3, 2)


def make_model(positions=False):
    torch.manual_seed(0)
    feature = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    return ats.nn.AttentionSampling(nn.Conv2d(1, 1, 1), feature, 4, 4, positions=positions).eval()


CALLS = {
    "forward": lambda model, view, image: model(view, image),
    "predict": lambda model, view, image: ats.predict(model, HEAD, view, image),
    "anytime": lambda model, view, image: ats.anytime(model, HEAD, view, image, budget=10, lead=1.0),
    "sample_patches": lambda model, view, image: ats.sample_patches(image, model.attention(view), 4, 4),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("call", CALLS)
def test_the_image_is_blamed(call, value):
    """From the image NaN and infinity reach the view, the attention and the logits."""
    image = torch.rand(3, 1, 24, 20, generator=seeded())
    image[2, 0, 13, 7:9] = value
    view = area_downsample(image, (6, 5))
    if value != NAN:  # the whole map: nothing else can be drawn
        view[2] = value
    with pytest.raises(ValueError, match=rf"image holds 2 NaN.*\({value}\) in image 2, channel 0, row 13, col.* 7"):
        CALLS[call](make_model(), view, image)


@pytest.mark.parametrize("call", ["forward", "predict", "anytime"])
def test_the_view_is_blamed(call):
    image = torch.rand(2, 1, 24, 20, generator=seeded())
    view = area_downsample(image, (6, 5))
    view[1, 0, 2, 3] = NAN
    with pytest.raises(ValueError, match=r"view holds 1 NaN.*in image 1, channel 0, row 2, column 3 of \(2, 1, 6, 5\)"):
        CALLS[call](make_model(), view, image)


@pytest.mark.parametrize("call", CALLS)
def test_a_network_is_blamed_where_it_is_at_fault(call):
    image = torch.rand(2, 1, 24, 20, generator=seeded())
    model = make_model()
    nn.init.constant_(model.attention.bias, NAN)
    with pytest.raises(ValueError, match=r"60 NaN value.*look for a diverged attention network"):
        CALLS[call](model, area_downsample(image, (6, 5)), image)


def test_patches_alone_are_blamed():
    """The view is clean, and the image's NaN shows in the features only."""
    image = torch.rand(2, 1, 24, 20, generator=seeded())
    view = area_downsample(image, (6, 5))
    image[1] = NAN
    with pytest.raises(ValueError, match="image holds 480 NaN or infinite"):
        ats.predict(make_model(), HEAD, view, image)


def test_the_advice_works():
    image = torch.tensor([1.0, NAN, INF, -INF]).view(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"image.nan_to_num\(0, 0, 0\)"):
        check_pixels("image", image)
    check_pixels("image", image.nan_to_num(0, 0, 0))
    check_pixels("image", torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("positions", [False, True])
def test_one_patch_in_training_has_no_variance(positions):
    """Batch normalisation of a single patch: our message, and what it says to do works."""

    class Feature(nn.Sequential):
        def forward(self, patches, positions=None):
            return super().forward(patches)

    feature = Feature(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    model = ats.nn.AttentionSampling(nn.Conv2d(1, 1, 1), feature, 1, 4, positions=positions)
    image = torch.rand(1, 1, 24, 20)
    view = area_downsample(image, (6, 5))
    with pytest.raises(ValueError, match=r"one image with n_patches=1 gives it a single patch.*\.eval\(\)"):
        model(view, image)
    model(view.expand(2, -1, -1, -1), image.expand(2, -1, -1, -1))
    model.sampler.n_patches = 2
    model(view, image)
    model.sampler.n_patches = 1
    feature[2].eval()
    model(view, image)


def test_other_errors_of_a_feature_network_pass():
    class Broken(nn.Module):
        def forward(self, patches):
            raise ValueError("broken")

    model = ats.nn.AttentionSampling(nn.Conv2d(1, 1, 1), Broken(), 1, 4)
    image = torch.rand(1, 1, 24, 20)
    with pytest.raises(ValueError, match=r"^broken$"):
        model(area_downsample(image, (6, 5)), image)
