"""The warning that the patches of neighbouring cells are almost the same."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import ats
from ats.experiments.backbones import networks_of
from ats.experiments.build import view_size
from ats.experiments.commands.command_line import run
from ats.experiments.registry import EXPERIMENTS
from ats.grid import make_grid
from ats.nn import OverlapWarning
from ats.overlap import overlap_message
from ats.sources import from_arrays
from tests.test_images_experiment import TWO, write_images


def shown(cells: int, apart: int, patch: int, n: int) -> float:
    """Patches' area that patches of the first n cells of rows of √n cover, counted pixel by pixel."""
    grid, side = make_grid((cells, cells), (cells * apart, cells * apart), None, 0), round(n**0.5)
    block = torch.tensor([row * cells + column for row in range(side) for column in range(side)])
    seen = torch.zeros(2 * patch + side * apart, 2 * patch + side * apart)
    for top, left in (grid.offsets(block, (patch, patch)) + patch).tolist():
        seen[top : top + patch, left : left + patch] = 1
    return float(seen.sum()) / patch**2


def test_the_numbers_are_those_of_the_pixels() -> None:
    """A slide with a view of 1/16 and a patch of 224."""
    message = overlap_message(make_grid((64, 64), (1024, 1024), None, 0), (224, 224), 16)
    assert message is not None
    assert "a patch of 224×224 pixels spans 196 cells, which lie 16×16 pixels apart" in message
    assert f"16 patches around one place show {shown(64, 16, 224, 16):.1f} times what one does" in message
    assert "cells about 56×56 pixels apart" in message
    assert "patches of about 64×64 pixels" in message


@pytest.mark.parametrize(
    ("cells", "patch", "n"),
    [(64, 32, 16), (18, 224, 16), (64, 64, 16), (64, 224, 3), (64, 224, 20)],
    ids=["small patches", "cells as advised", "patches as advised", "few draws", "as many as one can read apart"],
)
def test_settings_that_are_well(cells: int, patch: int, n: int) -> None:
    """Following the advice ends the warning."""
    assert overlap_message(make_grid((cells, cells), (1024, 1024), None, 0), (patch, patch), n) is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_presets_do_not_warn(name: str) -> None:
    """The paper's settings have three to four cells a draw; ten are too many."""
    experiment = EXPERIMENTS[name]
    for preset in experiment.presets.values():
        networks, view = networks_of(preset), view_size(preset, experiment.image_size)
        assert view is not None
        cells = (view[0] - networks.lost) // networks.stride, (view[1] - networks.lost) // networks.stride
        patch = (preset.model.patch_size, preset.model.patch_size)
        assert overlap_message(make_grid(cells, experiment.image_size, view, networks.lost), patch, 5) is None


def sampling(attention: nn.Module | None = None) -> ats.nn.AttentionSampling:
    feature = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return ats.nn.AttentionSampling(attention or nn.Conv2d(1, 1, 1), feature, 4, 32, receptive_field=0)


def test_a_module_warns_once_in_training() -> None:
    image, view = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 32, 32)
    fine = sampling()
    again = copy.deepcopy(fine)
    with pytest.warns(OverlapWarning, match="spans 256 cells, which lie 2×2 pixels apart: 4 patches") as found:
        fine(view, image)
    (ours,) = (one for one in found if one.category is OverlapWarning)
    assert ours.filename == __file__, "the user's line"
    with pytest.warns(OverlapWarning):
        again(view[0][None], [from_arrays(image[0].numpy())])
    with pytest.warns(OverlapWarning):
        ats.nn.SamplePatches(4, 32)(image, torch.zeros(1, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine(view, image)
        sampling().eval()(view, image)
        sampling(nn.Identity())(view, image)  # nothing to learn: it does not look at one place
        sampling(nn.AvgPool2d(8))(view, image)
        sampling().full(view, image)


def test_it_is_said_as_a_training_begins(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = write_images(tmp_path, TWO)
    options = ["--preset", "quick", "--data.manifest", str(manifest), "--output", str(tmp_path / "run")]
    options += ["--model.patch-size", "32", "--model.n-patches", "4", "--model.view-scale", "0.9"]
    options += ["--optim.epochs", "1", "--trainer.accelerator", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", OverlapWarning)  # the module has nothing to add
        assert run(["train", "images", *options]) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "warning: " in line]
    assert len(told) == 1
    assert f"{manifest}, line " in told[0]
    assert "a patch of 32×32 pixels spans 215 cells" in told[0]
    assert "(--model.view-scale, --model.patch-size, --model.n-patches)" in told[0]
