"""What batches of images of different sizes may not be, and what is said of it."""

import pytest
import torch
from torch import nn

import ats
from ats.batches import check_view
from tests.ragged import make_images, make_model, stored, views_of

VIEWS = views_of(make_images())


@pytest.mark.parametrize(
    ("view", "image", "error", "message"),
    [
        (VIEWS, [], ValueError, "image is an empty sequence"),
        ([], make_images(), ValueError, "there are 0 views but 4 images"),
        (VIEWS[:3], make_images(), ValueError, "there are 3 views but 4 images"),
        (torch.zeros(2, 3, 4, 4), make_images(), ValueError, "there are 2 views but 4 images"),
        (VIEWS, [*make_images()[:3], make_images(channels=1)[3]], ValueError, "image 0 has 3 channels.*image 3 1 of"),
        (
            VIEWS,
            [*make_images()[:2], *stored(make_images(torch.int16))[2:]],
            ValueError,
            "uint8, image 2 3 of torch.int",
        ),
        (VIEWS, [image[None] for image in make_images()], ValueError, r"must be \(C, H, W\).*image\[0\]\[0\]"),
        (VIEWS, [image.numpy() for image in make_images()], TypeError, r"ImageSource, got ndarray; convert it with"),
        (VIEWS, ["a.svs", "b.svs"], TypeError, r"image\[0\] must be .* got str; open it with ats.open_image"),
        (VIEWS, stored(make_images())[0], TypeError, r"a single image source, array; a batch of it is \[image\]"),
        (stored(make_images()), stored(make_images()), TypeError, r"view\[0\] is an image source; .* ats.read_view"),
        ([v[None] for v in VIEWS], make_images(), ValueError, r"each view of a sequence must be.*view\[0\]\[0\]"),
        ([*VIEWS[:3], VIEWS[3][:1]], make_images(), ValueError, "views of one batch must agree in channels"),
        (VIEWS[::-1], stored(make_images()), ValueError, r"view\[0\] of \(9, 20\) has not the shape of its own image"),
        (make_images(), VIEWS, ValueError, "of image 0 is larger than the image.*swapped"),
    ],
    ids=range(15),
)
def test_what_does_not_go_together_is_told(view, image, error, message):
    model = make_model()
    head = nn.Linear(7, 3).double()
    for call in (
        lambda: model(view, image),
        lambda: model.full(view, image),
        lambda: ats.predict(model, head, view, image),
        lambda: ats.anytime(model, head, view, image, budget=4, tolerance=1.0),
    ):
        with pytest.raises(error, match=message):
            call()


def test_views_of_one_shape_for_images_of_any_are_in_order():
    """Square views of oblong images are squeezed, which is none of anybody's business."""
    images = make_images(sizes=[(64, 64), (64, 96), (96, 64)])
    views = [torch.rand(3, *size, dtype=torch.float64) for size in [(16, 16), (16, 16), (12, 12)]]
    assert make_model()(views, images)[2].grid_size == (7, 7)


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_views_rounded_to_a_multiple_are_in_order(multiple):
    """Of sizes that are much alike each can have the shape that another would have: it still is the image's own."""
    sizes = [(height, width) for height in range(1056, 1104, 8) for width in range(1056, 1104, 8)]
    images = [torch.zeros(1, 1, 1).expand(3, *size) for size in sizes]
    views = [
        torch.zeros(1, 1, 1).expand(3, *(multiple * round(side / 16 / multiple) for side in size)) for size in sizes
    ]
    check_view(views, images, 2)
    check_view(views, images, ats.Placement(0, multiple))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [torch.zeros(2, 2)]}, "image has batch size 4 but logits have 1"),
        ({"logits": [torch.zeros(2, 2), *[torch.zeros(2, 3)] * 2, torch.zeros(2)]}, r"\(2,\) for logits\[3\]"),
        ({"logits": [torch.zeros(2, 2), *[torch.zeros(2, 3).half()] * 3]}, r"logits\[1\] torch.float16"),
        ({"grid_sizes": [(2, 2)] * 3}, "grid_sizes has 3 sizes for 4 images"),
        ({"grid_sizes": [(2, 4)] * 4}, r"grid_sizes\[0\] \(2, 4\) is larger than the grid of the logits, \(3, 3\)"),
        ({"grid_sizes": (2, 2)}, "grid_sizes must be cells"),
        ({"mask": [torch.ones(3, 3) > 0] * 3}, "there are 3 masks but 4 images"),
        ({"mask": [torch.ones(3, 2) > 0] * 4}, r"mask\[0\] must be \(3, 3\).*ats.mask_cells"),
        ({"view_size": [(4, 4)] * 3, "receptive_field": 1}, "view_size has 3 sizes for 4 images|image_size has 4"),
        ({"receptive_field": 1}, "pass view_size"),
        ({"view_size": [(4, 4), (9, 90), (4, 4), (4, 4)]}, r"\(9, 90\) of image 1 is larger than the image"),
    ],
    ids=range(11),
)
def test_what_functions_are_told(change, message):
    arguments = {
        "image": stored(make_images()),
        "logits": torch.zeros(4, 3, 3),
        "n_patches": 2,
        "patch_size": 3,
    } | change
    with pytest.raises(ValueError, match=message):
        ats.sample_patches(**arguments)


def test_a_source_that_gives_something_else_is_named():
    class Lying:
        name, channels, dtype, mpp, fingerprint = "lying.tif", 3, torch.uint8, None, None
        levels = (ats.sources.Level(40, 40),)

        def read(self, level, top, left, height, width):
            return torch.zeros(3, height, width)  # floats, which would not be scaled

    with pytest.raises(ValueError, match=r"lying.tif gave \(3, 4, 4\) of torch.float32 .* of torch.uint8"):
        ats.sample_patches([Lying()], torch.zeros(1, 3, 3), 2, 4)


def test_pixels_that_are_nan_are_blamed():
    images = make_images(torch.float32)
    views = views_of(images)
    views[2][0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"view\[2\]\[None\] holds 1 NaN"):
        make_model()(views, images)
