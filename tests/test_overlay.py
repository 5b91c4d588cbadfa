"""Pictures of attention: weights lie where their patches do, and the command draws any image."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ats.datasets.image_dataset import Region
from ats.datasets.synthetic.write import write_colon_cancer
from ats.experiments.commands.command_line import run
from ats.experiments.localisation import attention_map
from ats.experiments.plotting.overlay import Attention, draw_comparison, weight_map
from ats.experiments.training import train
from ats.models import MILClassifier
from tests.helpers import seeded
from tests.test_image_experiments import small_colon


def test_a_pixel_has_the_weight_of_all_patches_that_show_it() -> None:
    offsets = torch.tensor([[0, 0], [1, 2], [-2, -3], [7, 9], [4, 20], [-9, 0]])
    weights = torch.rand(6, generator=seeded())
    pixels = weight_map(Attention(weights, offsets, (4, 5)), (9, 12))
    for y in range(9):
        for x in range(12):
            inside = [(top <= y < top + 4) and (left <= x < left + 5) for top, left in offsets.tolist()]
            assert float(pixels[y, x]) == pytest.approx(float(weights[torch.tensor(inside)].sum()), abs=1e-6)


def test_methods_of_a_row_share_one_scale(tmp_path: Path) -> None:
    """Attention that is spread must look darker than attention that is not, or the comparison would lie."""
    image = torch.full((3, 60, 60), 200, dtype=torch.uint8)
    peaked = Attention(torch.tensor([1.0, 0.0]), torch.tensor([[0, 0], [30, 30]]), (30, 30))
    spread = Attention(torch.tensor([0.2, 0.2]), torch.tensor([[0, 0], [30, 30]]), (30, 30))
    path = tmp_path / "comparison.png"
    truth = [Region(5, 5, 20, 20, "sign"), Region(40, 40, 40, 40, "epithelial")]
    draw_comparison([image], [truth], {"peaked": [peaked], "spread": [spread]}, path, labels=["a"], source="synthetic")
    with Image.open(path) as picture:
        grey = torch.from_numpy(np.array(picture.convert("L")))
    third = grey.shape[1] // 3
    assert int((grey[:, third : 2 * third] == 200).sum()) > 1000  # the image's own grey, where all of the weight is
    assert int((grey[:, 2 * third :] == 200).sum()) < 200
    assert int((grey[:, 2 * third :] == 40).sum()) > 1000  # a fifth of it


@pytest.mark.parametrize("method", ["ats", "mil"])
def test_the_command_draws_an_image_of_any_size(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_colon_cancer(tmp_path / "data", 12, size=100)
    config = small_colon(tmp_path / "data", tmp_path / "run")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, method=method),
        optim=dataclasses.replace(config.optim, epochs=1),
    )
    train(config)
    Image.new("RGB", (180, 130), (120, 60, 140)).save(tmp_path / "mine.png")
    picture = tmp_path / "attention.png"
    command = ["attention", str(tmp_path / "run"), str(tmp_path / "mine.png"), "--output", str(picture)]
    assert run(command) == 0
    assert 'epithelial nucleus" with probability' in capsys.readouterr().out
    with Image.open(picture) as drawn:
        assert drawn.width > 1000
        assert len(drawn.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 100
    if method == "ats":
        other = [*command[:-1], str(tmp_path / "other.png")]
        assert run([*other, "--n-patches", "9999"]) == 1
        assert "choose fewer with --n-patches, or a larger image" in " ".join(capsys.readouterr().err.split())
    assert run(["attention", str(tmp_path / "run"), str(tmp_path / "nothing.png"), "--output", "x.png"]) == 1
    assert "nothing.png is missing; check the path" in capsys.readouterr().err
    assert run(command) == 1  # nothing is overwritten
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no image")
    assert run(["attention", str(tmp_path / "run"), str(tmp_path / "text.png")]) == 1
    assert "text.png" in capsys.readouterr().err


def test_maps_of_deep_mil_are_of_its_grid() -> None:
    torch.manual_seed(0)
    feature = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = MILClassifier(feature, 3, 2, patch_size=9, grid_step=9).eval()
    image = torch.randint(256, (1, 3, 30, 40), dtype=torch.uint8, generator=seeded())
    weights, offsets, size = attention_map(model, image, image)
    pixels = weight_map(Attention(weights[0], offsets, size), (30, 40))
    assert bool((pixels > 0).all())  # a grid without gaps
