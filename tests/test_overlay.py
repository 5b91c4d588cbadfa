"""Pictures of attention: weights lie where their patches do, and the command draws any image."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from ats.datasets.image_dataset import Region
from ats.datasets.synthetic.write import write_colon_cancer
from ats.experiments.commands.command_line import run
from ats.experiments.localisation import attention_map
from ats.experiments.plotting.overlay import Attention, best_patches, draw_comparison, heaviest, weight_map
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


def test_methods_share_one_scale(tmp_path: Path) -> None:
    """Attention that is spread must look darker than attention that is not, or the comparison would lie; nothing of the
    frame is black."""
    image = torch.full((3, 60, 60), 200, dtype=torch.uint8)
    places = torch.tensor([[0, 0], [30, 30]])
    peaked, spread = (Attention(torch.tensor(weights), places, (30, 30)) for weights in ([1.0, 0.0], [0.2, 0.2]))
    path = tmp_path / "comparison.png"
    truth = [Region(5, 5, 20, 20, "sign"), Region(40, 40, 40, 40, "epithelial")]
    draw_comparison([image], [truth], {"peaked": [peaked], "spread": [spread]}, path, labels=["a"], source="synthetic")
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).int()

    def shown(weight: float) -> list[int]:
        """In which columns there are many pixels of the colour that a weight has: the root of it, over dimmed grey."""
        colour = 255 * 0.6 * torch.tensor(colormaps["inferno"](weight**0.5)[:3]) + 0.4 * 200
        near = ((pixels - colour).abs() < 3).all(-1).sum(0)
        columns = (near > 50).nonzero().flatten()
        return [int(columns.min()), int(columns.max())] if len(columns) > 50 else []

    whole, nothing, fifth = shown(1.0), shown(0.0), shown(0.2)
    assert whole[1] < fifth[0]  # the peak is left of all that is spread
    assert nothing[0] > 0
    assert nothing[1] - nothing[0] > pixels.shape[1] // 3  # of both panels


def test_the_patches_of_most_attention_are_no_neighbours() -> None:
    """Cells 4 pixels apart, patches of 8: one that shows the middle of a chosen one is passed over."""
    offsets = torch.tensor([[0, left] for left in range(0, 40, 4)])
    weights = torch.tensor([0.05, 0.3, 0.2, 0.1, 0.02, 0.0, 0.08, 0.09, 0.08, 0.08])
    attention = Attention(weights, offsets, (8, 8))
    assert heaviest(attention) == [1, 3, 7]
    assert heaviest(attention, 9) == [1, 3, 7, 9]  # and no cell without attention
    image = torch.arange(40).expand(1, 6, 40).to(torch.uint8)
    best = best_patches(image, attention)
    assert [seen.corner for seen in best] == [(0, 4), (0, 12), (0, 28)]
    assert torch.equal(best[1].pixels[0, :6], image[0, :, 12:20])
    assert not best[1].pixels[0, 6:].any()  # below the image


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
