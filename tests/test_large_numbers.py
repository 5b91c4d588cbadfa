"""Numbers that fit no integer of 64 bits, or no memory, are a line or do what they can."""

import pytest
import torch
from torch import nn

import ats
import ats_kernels
from ats.experiments.commands.command_line import run

SEEDS = {
    "evaluate": ["evaluate", "nowhere"],
    "attention": ["attention", "nowhere", "no.png"],
    "demo": ["demo"],
    "study": ["study", "variance"],
}


@pytest.mark.parametrize("command", SEEDS)
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_of_more_than_64_bits(command: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SEEDS[command], "--seed", str(seed)]) == 1
    assert f"--seed must be a number of 64 bits, got {seed}" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**32, 2**70])
def test_seeds_that_a_training_cannot_have(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "megapixel-mnist", "--preset", "demo", "--seed", str(seed)]) != 0
    said = " ".join(word for word in "".join(capsys.readouterr()).split() if word != "│")  # in a box
    assert f"seed must be below 2**32, got {seed}" in said


def test_more_patches_than_there_are_read_all() -> None:
    torch.manual_seed(0)
    feature, head = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), nn.Linear(3, 2)
    model = ats.nn.AttentionSampling(nn.Identity(), feature, 4, 4).eval()
    view, image = torch.randn(2, 1, 6, 5), torch.rand(2, 1, 24, 20)
    full = head(model.full(view, image)).double()
    for selection in ("sample", "topk"):
        found = ats.predict(model, head, view, image, n_patches=10**12, selection=selection)
        assert found.patches_used.tolist() == [30, 30]
        torch.testing.assert_close(found.logits, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [2**31, 2**62, 2**70])
def test_draws_beyond_32_bits(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n must be below 2\*\*31, got {n}"):
        ats_kernels.sample(torch.zeros(1, 9), n, replace=True)
    with pytest.raises(ValueError, match=rf"n must be below 2\*\*31, got {n}"):
        ats.sample_cells(torch.zeros(1, 3, 3), n, replace=True)
