"""`ats.sample_patches` end to end: the cells drawn, where they lie, what is read there, and every error."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import ats
import ats_kernels
from tests.helpers import assert_close, seeded
from tests.small_draws import INF, expected_patches, make_image, make_logits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("replace", [False, True])
def test_patches_are_the_image_at_the_drawn_cells(replace, dtype):
    """Cells 10×10 pixels, patches 8×14: each is centred on its cell, and no image gets another's patches."""
    image, logits = make_image(dtype), make_logits()
    sample = ats.sample_patches(image, logits, 9, (8, 14), replace=replace, generator=seeded())
    rows, columns = sample.indices // 6, sample.indices % 6
    assert torch.equal(sample.offsets, torch.stack([10 * rows + 5 - 4, 10 * columns + 5 - 7], -1))
    assert_close(sample.patches, expected_patches(image, sample, (8, 14)))
    assert sample.patches.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    assert sample.indices.dtype == sample.offsets.dtype == torch.int64
    log_a = logits.double().flatten(1).log_softmax(-1)
    assert_close(sample.log_attention, log_a.gather(1, sample.indices))
    assert_close(sample.logsumexp, logits.double().flatten(1).logsumexp(-1))
    assert_close(sample.entropy, -(log_a.exp() * log_a).sum(-1))


def test_edge_padding_normalisation_and_dtype():
    image, logits = make_image(), make_logits()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    sample = ats.sample_patches(
        image, logits, 24, 20, padding="edge", mean=mean, std=std, dtype=torch.float64, generator=seeded()
    )
    shape = (1, 1, 3, 1, 1)
    expected = expected_patches(image, sample, (20, 20), "replicate")
    expected = (expected - torch.tensor(mean).double().view(shape)) / torch.tensor(std).double().view(shape)
    assert sample.patches.dtype == torch.float64
    assert_close(sample.patches, expected, torch.float32)


def test_equivalent_inputs_give_the_same_sample():
    """Logits with a channel, strided logits and a channels-last image change nothing."""
    image, logits = make_image(), make_logits()
    expected = ats.sample_patches(image, logits, 5, 7, generator=seeded())
    strided = torch.stack([logits, logits], -1)[..., 0]
    for other_image, other_logits in [
        (image, logits.unsqueeze(1)),
        (image, strided),
        (image.contiguous(memory_format=torch.channels_last), logits),
    ]:
        sample = ats.sample_patches(other_image, other_logits, 5, 7, generator=seeded())
        for field in dataclasses.fields(sample):
            got, want = getattr(sample, field.name), getattr(expected, field.name)
            assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want, field.name


def test_topk():
    """The most probable cells first, the same every time."""
    logits = make_logits()
    sample = ats.sample_patches(make_image(), logits, 5, 7, selection="topk")
    assert torch.equal(sample.indices, logits.flatten(1).topk(5).indices)
    assert_close(sample.patches, expected_patches(make_image(), sample, (7, 7)))


def test_receptive_field_moves_the_cells_inwards():
    """View 20×30 of 40×60, 4 view pixels lost, grid 16×26: the first cell centres at (2 + ½)·2 = 5 pixels."""
    logits = torch.full((2, 16, 26), -INF)
    logits[:, 0, 0], logits[:, 15, 25] = 1.0, 0.0
    image = make_image()
    sample = ats.sample_patches(image, logits, 2, 4, selection="topk", receptive_field=4, view_size=(20, 30))
    assert sample.offsets[0].tolist() == [[3, 3], [33, 53]]
    assert_close(sample.patches, expected_patches(image, sample, (4, 4)))


def test_gradients_reach_the_logits_and_a_float_image():
    """Pooled features and entropy to the logits; pixels that were read, and no others, to the image."""
    image, logits = make_image(torch.float64).requires_grad_(), make_logits().double().requires_grad_()
    sample = ats.sample_patches(image, logits, 3, 4, generator=seeded())
    (ats.expectation(sample.patches, sample.log_attention).sum() - 0.1 * sample.entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.ne(0).all(), "through the softmax every cell takes part"
    read = torch.zeros(2, 40, 60, dtype=torch.bool)
    for b in range(2):
        for y, x in sample.offsets[b].tolist():
            read[b, max(y, 0) : y + 4, max(x, 0) : x + 4] = True
    assert torch.equal(image.grad.ne(0), read.unsqueeze(1).expand(2, 3, 40, 60))


def test_unvalidated_rows_are_poisoned():
    """An image without a drawable cell makes its own estimate NaN, and not that of its neighbour."""
    logits = make_logits()
    logits[1] = -INF
    sample = ats.sample_patches(make_image(), logits, 3, 4, generator=seeded(), validate=False)
    pooled = ats.expectation(sample.patches, sample.log_attention)
    assert pooled[0].isfinite().all()
    assert pooled[1].isnan().all()
    assert (sample.indices[1] == -1).all()


def test_patch_sample_is_immutable():
    sample = ats.sample_patches(make_image(), make_logits(), 3, 4, generator=seeded())
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.patches = sample.patches + 1


def test_ops_are_those_of_the_kernels():
    for name in ("area_downsample", "estimator_weights", "expectation"):
        assert getattr(ats, name) is getattr(ats_kernels, name)


def test_the_old_name_of_selection():
    with pytest.warns(DeprecationWarning, match="method= is now selection="):
        old = ats.sample_patches(make_image(), make_logits(), 3, 4, method="topk")
    assert old.selection == "topk"
    with pytest.raises(TypeError, match="got both selection= and method=, which is its old name"):
        ats.sample_patches(make_image(), make_logits(), 3, 4, method="topk", selection="topk")


IMAGE, LOGITS = torch.zeros(2, 3, 40, 60), torch.zeros(2, 4, 6)


def logits_with(value, where):
    logits = LOGITS.clone()
    logits[where] = value
    return logits


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": [1]}, TypeError, "image must be a torch.Tensor, got list"),
        ({"image": IMAGE[0]}, ValueError, r"image must be \(B, C, H, W\), got 3 dimensions: \(3, 40, 60\)"),
        ({"image": IMAGE[:, :0]}, ValueError, r"image is empty: \(2, 0, 40, 60\)"),
        ({"image": IMAGE.bool()}, TypeError, "image has dtype torch.bool, expected one of uint8"),
        ({"image": IMAGE.to(torch.complex64)}, TypeError, "image has dtype torch.complex64, expected one of"),
        ({"image": torch.zeros(2, 480, 640, 3)}, ValueError, r"channels seem to come last; .*image.movedim\(-1, 1\)"),
        ({"image": IMAGE[:1]}, ValueError, "image has batch size 1 but logits have 2"),
        ({"image": IMAGE.to("meta")}, ValueError, "image is on meta but logits are on cpu; move the image"),
        ({"logits": "flat"}, TypeError, "logits must be a torch.Tensor, got str"),
        ({"logits": LOGITS.long()}, TypeError, "logits must be floating point, got torch.int64"),
        ({"logits": LOGITS.flatten(1)}, ValueError, r"logits must be \(B, gh, gw\) or \(B, 1, gh, gw\), got \(2, 24\)"),
        ({"logits": LOGITS.unsqueeze(1).repeat(1, 2, 1, 1)}, ValueError, r"\(B, 1, gh, gw\), got \(2, 2, 4, 6\)"),
        (
            {"image": LOGITS.unsqueeze(1), "logits": IMAGE},
            ValueError,
            r"logits \(2, 3, 40, 60\) .* are larger than the image, \(2, 1, 4, 6\): are the two swapped\?",
        ),
        (
            {"image": LOGITS.unsqueeze(1), "logits": IMAGE[:, :1].byte()},
            ValueError,
            r"logits \(2, 1, 40, 60\) of torch.uint8 are larger than the image.*The image comes first",
        ),
        ({"logits": LOGITS[:, :0]}, ValueError, r"at least one image and one cell, got \(2, 0, 6\)"),
        ({"logits": logits_with(float("nan"), (1, 0, 3))}, ValueError, "1 NaN value.*row 1, cell 3"),
        ({"logits": logits_with(INF, (0, 1, 0))}, ValueError, r"1 \+inf value.*row 0, cell 6"),
        ({"logits": logits_with(-INF, 1)}, ValueError, "row 1 are all −inf: every cell is masked"),
        (
            {"logits": logits_with(-INF, (1, slice(1, 4))), "n_patches": 7},
            ValueError,
            "n=7 .* row 1: only 6 of its 24",
        ),
        ({"n_patches": 0}, ValueError, "n(_patches)? must be at least 1, got 0"),
        ({"n_patches": 2.5}, TypeError, "n(_patches)? must be an int, got float: 2.5"),
        ({"n_patches": 25}, ValueError, "n=25 .* K=24; draw fewer, use replace=True, or pass allow_fewer=True"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"patch_size": (4, 0)}, ValueError, r"patch_size\[1\] must be at least 1, got 0"),
        ({"patch_size": (4, 4, 4)}, ValueError, r"patch_size must be an int or a pair.*got \(4, 4, 4\)"),
        ({"patch_size": "4"}, TypeError, "patch_size must be an int, got str"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator, got int: 0; make one from a seed"),
        ({"selection": "argmax"}, ValueError, "unknown selection 'argmax', expected one of 'sample', 'topk'"),
        ({"selection": "topk", "replace": True}, ValueError, "topk.*cannot be combined with replace=True"),
        ({"padding": "mirror"}, ValueError, "unknown padding 'mirror', expected one of 'zeros', 'edge'"),
        ({"mean": [0.5]}, ValueError, "mean has 1 values but the image has 3 channels"),
        ({"std": [1.0, 1.0]}, ValueError, "std has 2 values but the image has 3 channels"),
        ({"std": [1.0, 1.0, 0.0]}, ValueError, r"std must be positive, got \[1.0, 1.0, 0.0\]"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating point torch.dtype, got torch.int32"),
        ({"receptive_field": -1}, ValueError, "receptive_field must be at least 0, got -1"),
        ({"receptive_field": 1.5}, TypeError, "receptive_field must be an int.*got.*1.5"),
        ({"receptive_field": 8}, ValueError, r"receptive_field=8 .*pass view_size=\(h, w\)"),
        (
            {"receptive_field": 8, "view_size": (8, 12)},
            ValueError,
            r"receptive_field=8 leaves nothing of a view of \(8, 12\)",
        ),
        ({"view_size": (0, 12)}, ValueError, r"view_size\[0\] must be at least 1, got 0"),
        ({"view_size": (8, 61)}, ValueError, r"view_size \(8, 61\) is larger than the image, \(40, 60\).*swapped"),
    ],
)
def test_errors(changes, error, message):
    """Each says what came and what was expected, and comes from this call and not from deep within torch."""
    arguments = {"image": IMAGE, "logits": LOGITS, "n_patches": 3, "patch_size": 4} | changes
    with pytest.raises(error, match=message):
        ats.sample_patches(**arguments)


WITHOUT_TRITON = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
import ats_kernels
assert not any(name.split(".")[0] == "ats" for name in sys.modules), "ats_kernels imports ats"
import ats
sample = ats.sample_patches(torch.ones(1, 1, 9, 9), torch.zeros(1, 3, 3), 9, 3)
print(ats.expectation(sample.patches, sample.log_attention).sum().item())
"""


def test_works_without_triton_and_layers_point_one_way():
    """Machines without a GPU have no triton; and `ats_kernels` must stand alone."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(9.0)
