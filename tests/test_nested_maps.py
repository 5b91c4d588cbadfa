"""What nested attention shows of itself: heatmaps, the picture of the zoom, boxes for QuPath, numbers of each level."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import ats
from ats.experiments.callbacks import measure_nested
from ats.experiments.plotting import zoom
from ats.experiments.plotting.zoom import draw_zoom
from ats.nested_maps import zoomed_heatmap
from ats.nn import NestedAttentionSampling, Zoom
from ats.sources import from_arrays
from tests.helpers import assert_close, seeded
from tests.nested_models import bytes_of, cells_of, draw_image, model_of, small_model


def nested(n: tuple[int, int] = (3, 2), **options) -> NestedAttentionSampling:
    """Regions of 16×16 pixels, cells of 8×8 in them."""
    torch.manual_seed(0)
    model = model_of(Zoom(cells_of(2), 8, n[0]), Zoom(cells_of(2), 4, n[1]), **options)
    for depth in (0, 1):
        nn.init.normal_(model.zoom(depth).attention.weight, std=4.0)
    return model


@torch.no_grad()
def drawn(model: NestedAttentionSampling, image: Tensor, seed: int = 0):
    return model(None, image, generator=seeded(seed))[2]


def test_attention_is_fine_where_it_looked_and_coarse_elsewhere():
    """Every pixel against slices of the image that go through the networks one by one."""
    model, image = nested(), bytes_of(2, 48, 64)
    sample = drawn(model, image)
    got = zoomed_heatmap(model, None, image, sample)
    pixels = image.float() / 255
    for number, picture in enumerate(got):
        outer = model.zoom(0).attention(F.avg_pool2d(pixels[number : number + 1], 8)).flatten().double().softmax(-1)
        want = outer.view(3, 4).repeat_interleave(16, 0).repeat_interleave(16, 1) / 256
        for cell, (top, left) in zip(
            sample.levels[0].indices[number].tolist(), sample.levels[0].offsets[number].tolist(), strict=True
        ):
            assert divmod(cell, 4) == (top // 16, left // 16)
            box = pixels[number : number + 1, :, top : top + 16, left : left + 16]
            inner = model.zoom(1).attention(F.avg_pool2d(box, 4)).double().flatten().softmax(-1).view(2, 2)
            fine = inner.repeat_interleave(8, 0).repeat_interleave(8, 1) / 64
            want[top : top + 16, left : left + 16] = outer[cell] * fine
        torch.testing.assert_close(picture, want.detach(), rtol=1e-5, atol=1e-12)
        small = zoomed_heatmap(model, None, image, sample, size=(3, 4))[number]
        torch.testing.assert_close(small.flatten(), outer.detach(), rtol=1e-5, atol=1e-12)


def test_a_region_drawn_again_and_draws_left_over_count_once():
    model, image = nested((8, 3), replace=True), bytes_of(1, 32, 32)
    again = drawn(model, image)
    assert len(again.levels[0].indices.unique()) < 8
    assert_close(zoomed_heatmap(model, None, image, again)[0].sum(), torch.ones(()).double())
    model.replace = False
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = False
    with torch.no_grad():
        sample = model(None, image, mask=mask, generator=seeded())[2]
    assert sample.levels[0].surplus.sum() == 5
    picture = zoomed_heatmap(model, None, image, sample, mask=mask)[0]
    assert_close(picture.sum(), torch.ones(()).double())
    assert picture[:16, :16].sum() == 0
    with pytest.raises(ValueError, match="what this model drew from these images: 2 levels and 2 images, got 2 and 1"):
        zoomed_heatmap(model, None, bytes_of(2, 32, 32), sample)


def test_the_heatmap_of_a_nested_sample_has_each_patch_at_its_weight():
    image = draw_image(2)
    sample = drawn(small_model((3, 2), estimator="unordered"), image)
    got = ats.heatmap(sample, (8, 72), estimator="unordered")
    want = torch.zeros_like(got)
    for row in sample.table("unordered"):
        for y in range(row["top"], row["top"] + row["height"]):
            for x in range(row["left"], row["left"] + row["width"]):
                if 0 <= y < 8 and 0 <= x < 72:
                    want[row["image"], y, x] += row["weight"] / 36
    assert_close(got, want)
    assert_close(ats.heatmap(sample, [(8, 72)] * 2, estimator="unordered")[1], want[1])


def test_patches_of_regions_are_written_for_qupath(tmp_path: Path):
    image = bytes_of(1, 48, 64)
    sample = drawn(nested(), image)
    ats.export.geojson(tmp_path / "patches.geojson", image, sample, estimator="unordered")
    features = json.loads((tmp_path / "patches.geojson").read_text())["features"]
    assert len(features) == 6
    assert sum(one["properties"]["measurements"]["weight"] for one in features) == pytest.approx(1)


@pytest.mark.parametrize("depth", [2, 3])
def test_the_picture_of_the_zoom(depth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    zooms = [Zoom(cells_of(2), 16, 5), Zoom(cells_of(2), 4, 3), Zoom(cells_of(2), 2, 2)]
    model, image = model_of(*zooms[-depth:]), bytes_of(1, 128, 192)
    source = image[0] if depth == 2 else from_arrays(image[0])
    sample = drawn(model, [source])
    attention = zoomed_heatmap(model, None, [source], sample)[0] if depth == 2 else None
    framed = []
    monkeypatch.setattr(zoom, "frame", lambda *arguments: framed.append(arguments[3]))
    draw_zoom(source, sample, tmp_path / "zoom.png", title="$x_$.png", attention=attention)
    regions = {str(row["draw"]) for row in sample.levels[0].table()}
    assert framed[: len(regions)] == sorted(regions)  # numbered as in tables, from 0
    width, height = Image.open(tmp_path / "zoom.png").size
    assert width == 286 * (3 if depth == 2 else 4)  # a column a region, four of them at most
    assert height == round(110 * (5.2 + 2.9 * depth))
    with pytest.raises(ValueError, match="of one image, got 2"):
        draw_zoom(image[0], drawn(model, bytes_of(2, 128, 192)), tmp_path / "c.png", title="")


def test_numbers_of_each_level():
    model = nested((3, 2), estimator="unordered")
    sample = drawn(model, bytes_of(2, 48, 64))
    outer, inner = ats.diagnostics.by_level(sample, estimator="unordered")
    for image in (0, 1):
        first, regions = sample.levels[0][image], sample.levels[1][3 * image : 3 * image + 3]
        assert_close(outer["covered_mass"][image].float(), first.log_attention.exp().sum())
        assert_close(outer["effective_draws"][image].float(), 1 / first.weights("unordered").square().sum())
        assert_close(inner["covered_mass"][image].float(), regions.log_attention.exp().sum(1).mean())
        assert_close(inner["relative_entropy"][image].float(), regions.entropy.mean() / torch.tensor(4.0).log())
    assert torch.equal(outer["distinct_area"], torch.ones(2).double())
    assert ((inner["distinct_area"] > 0.5) & (inner["distinct_area"] <= 1)).all()


def test_regions_that_were_not_drawn_do_not_count():
    model, image = nested((3, 2)), bytes_of(1, 32, 32)
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 1, 1] = True
    with torch.no_grad():
        sample = model(None, image, mask=mask, generator=seeded())[2]
    inner = ats.diagnostics.by_level(sample)[1]
    assert_close(inner["covered_mass"].float(), sample.levels[1][:1].log_attention.exp().sum(1))


def test_what_training_logs_and_warns_of():
    model, image = nested((3, 2), estimator="unordered"), bytes_of(4, 48, 64)
    features = []
    model.feature.register_forward_hook(lambda module, inputs, output: features.append(output))
    output = model(None, image, generator=seeded())
    found = measure_nested(model, output, features[0])
    assert found["level1_variance_share"] + found["level2_variance_share"] == pytest.approx(1)
    assert 0 < found["level2_relative_entropy"] < 1
    assert found["relative_error"] > 0
    _, logits, sample = output
    assert ats.diagnostics.warning_signs(logits, sample=sample) == {}
    sharp = model_of(Zoom(cells_of(2), 8, 3), Zoom(cells_of(1), 4, 2))  # of sixteen cells in a region one is seen
    nn.init.normal_(sharp.zoom(1).attention.weight, std=1e3)
    _, logits, sample = sharp(None, image, generator=seeded())
    assert set(ats.diagnostics.warning_signs(logits, sample=sample)) == {"collapse"}
    assert ats.diagnostics.warning_signs(logits, sample=sample, loss=0.1, chance=1.0) == {}
