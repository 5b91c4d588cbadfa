"""What the benchmark of nested attention compares: its images, the alternatives, and what it foretells."""

import pytest
import torch

import ats
from ats.sources import read_boxes
from bench import bench_nested, nested_steps, render
from bench.nested_steps import BEST, DEEP, FLAT, MIL, SAME, BestPatches
from bench.procedural import ProceduralImage
from bench.report import Group, Report
from tests.helpers import assert_close

CPU = torch.device("cpu")


def test_levels_of_a_procedural_image_are_its_means():
    image = ProceduralImage(2048)
    assert isinstance(image, ats.ImageSource)
    fine = image.read(0, 900, 1000, 256, 512)  # over the border of two blocks
    assert torch.equal(fine[:, :124, :24], image.read(0, 900, 1000, 124, 24))
    assert torch.equal(image.read(0, 1024, 0, 64, 64), image.read(0, 0, 1024, 64, 64))
    coarse = ats.area_downsample(image.read(0, 896, 1024, 256, 512).double()[None], (32, 64))[0]
    assert (coarse - image.read(3, 112, 128, 32, 64)).abs().max() <= 0.5 + 1e-6
    (part,) = read_boxes([(image, 10, 0, 0, 2, 2)])
    assert part.shape == (1, 2, 2)
    with pytest.raises(ValueError, match="multiple of 1024 pixels, got 1500"):
        ProceduralImage(1500)


def test_a_scan_keeps_the_best_of_all_patches():
    """In whatever chunks they come; and nothing of it is differentiated."""
    torch.manual_seed(0)
    model, image = BestPatches().train(), ProceduralImage(1024)
    kept = model.select(image)
    assert model.training
    model.eval()
    with torch.no_grad():
        every = torch.cat(list(model.rows(image)))
        logits = model.attention(model.feature(every)[None])[0]
    assert every.shape == (256, 1, 64, 64)
    assert_close(every[17, 0], image.read(0, 64, 64, 64, 64)[0].float() / 255)
    best = {tuple(patch.flatten().tolist()) for patch in every[logits.topk(nested_steps.N_PATCHES).indices]}
    assert {tuple(patch.flatten().tolist()) for patch in kept} == best
    assert not kept.requires_grad


@pytest.mark.parametrize("line", [SAME, DEEP, FLAT, MIL, BEST])
def test_every_line_takes_a_step(line):
    """With gradients to all networks that it has, at as many patches."""
    seen = []
    step = nested_steps.prepare(line, 1024, CPU)()
    (model,) = (cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    getattr(model, "sampling", model).feature.register_forward_hook(lambda module, got, out: seen.append(len(got[0])))
    step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert seen[-1] == (256 if line == MIL else 32)


def test_what_cannot_run_is_foretold_and_said_to_be():
    group = Group("Sizes", section="nested", per="sample", axis="pixels")
    for line in (MIL, BEST):
        for side, seconds in ((1024, 0.5), (2048, 2.0)):
            group.rounds[bench_nested.label(line, side)] = [seconds] * 3
            group.memory[bench_nested.label(line, side)] = 10_000_000
        group.not_run[bench_nested.label(line, 8192)] = "it takes too long"
    for name in [*group.rounds, *group.not_run]:
        line, _, side = name.rpartition(", ")
        group.points[name] = line, int(side.split()[0].replace(",", ""))
    bench_nested.foretell(group)
    assert group.foretold == {
        bench_nested.label(MIL, 8192): (32_000, 160_000_000),  # 16 times the pixels
        bench_nested.label(BEST, 8192): (32_000, 10_000_000),
    }
    text = render.markdown(Report(CPU, [group]).as_dict())
    (row,) = (line for line in text.splitlines() if line.startswith("| 8,192"))
    cells = "*about 32,000, foretold*", "*about 32,000, foretold*", "*about 160, foretold*", "*about 10, foretold*"
    assert row == f"| 8,192 | {' | '.join(cells)} |"
