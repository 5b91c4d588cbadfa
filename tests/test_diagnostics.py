"""`ats.diagnostics`: every number against one worked out by hand or by a plain loop."""

import math

import pytest
import torch

import ats
from ats import diagnostics
from tests.helpers import assert_close, seeded


def test_effective_sample_size() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert_close(diagnostics.effective_sample_size(weights), torch.tensor([4.0, 1.0, 2.0]))


def test_covered_mass_counts_a_cell_once() -> None:
    attention = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    indices = torch.tensor([[2, 0, 2, 0], [0, 1, 2, 1]])
    assert_close(diagnostics.covered_mass(attention.gather(1, indices).log(), indices), torch.tensor([0.7, 1.0]))


def test_relative_entropy() -> None:
    entropy = torch.tensor([0.0, math.log(5), math.log(10)])
    assert_close(diagnostics.relative_entropy(entropy, 10), torch.tensor([0.0, math.log(5) / math.log(10), 1.0]))
    assert diagnostics.relative_entropy(torch.zeros(2), 1).tolist() == [1, 1]


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (3, 3), (4, 7)])
def test_the_border_by_a_loop(grid: tuple[int, int]) -> None:
    logits = torch.randn(3, *grid, dtype=torch.float64, generator=seeded())
    attention = logits.flatten(1).softmax(-1).view(logits.shape)
    mass, count = torch.zeros(3, dtype=torch.float64), 0
    for y in range(grid[0]):
        for x in range(grid[1]):
            if y in (0, grid[0] - 1) or x in (0, grid[1] - 1):
                mass, count = mass + attention[:, y, x], count + 1
    assert_close(diagnostics.border_mass(logits), mass)
    assert_close(diagnostics.border_mass(logits.unsqueeze(1)), mass)
    assert diagnostics.border_share(grid) == pytest.approx(count / (grid[0] * grid[1]))
    assert_close(diagnostics.peak_mass(logits), attention.flatten(1).max(-1).values)


def test_signal_to_noise_of_a_known_signal() -> None:
    """Mean μ with unit noise in P components: ‖μ‖² / P, over 4,000 sets of 5 copies within 5 standard errors."""
    mean = torch.tensor([2.0, -1.0, 0.0, 0.0])
    copies = mean + torch.randn(4000, 5, 4, generator=seeded())
    rates = torch.stack([diagnostics.signal_to_noise(one) for one in copies])
    # E[1 / s²] of 16 degrees of freedom is 16/14, which the ratio of an unbiased numerator carries.
    expected = (5 / 4 + 1 / 5) * 16 / 14 - 1 / 5
    assert abs(rates.mean() - expected) < 5 * rates.std() / 4000**0.5
    noise = torch.stack([diagnostics.signal_to_noise(one - mean) for one in copies])
    assert abs(noise.mean() - (16 / 14 - 1) / 5) < 5 * noise.std() / 4000**0.5


def test_repeated_error_by_hand_and_as_told_from_one_draw() -> None:
    """(1, 0) and (3, 4): mean (2, 2), variance 2 + 8. And over 4,000 draws what `ats.estimate` expects.

    The spread of 4,000 normal numbers is within 5% of the truth in all but 1e-5 of cases.
    """
    pooled = torch.tensor([[[1.0, 0.0], [5.0, 5.0]], [[3.0, 4.0], [5.0, 5.0]]])
    assert_close(diagnostics.repeated_error(pooled), torch.tensor([10**0.5 / 8**0.5, 0.0]))
    assert_close(diagnostics.repeated_error(torch.tensor([[1.0], [3.0]])), torch.tensor([2**0.5 / 2]))

    logits = torch.randn(1, 5, 5, dtype=torch.float64, generator=seeded()).expand(4000, -1, -1)
    cells = torch.rand(1, 1, 5, 5, dtype=torch.float64, generator=seeded(1)).expand(4000, -1, -1, -1)
    sample = ats.sample_patches(cells, logits, 4, 1, generator=seeded(2))
    features = sample.patches.flatten(2)  # (4000, 4, 1)
    told = ats.estimate(features, sample.log_attention).variance.mean().sqrt()
    pooled = ats.expectation(features, sample.log_attention).unsqueeze(1)
    assert diagnostics.repeated_error(pooled).item() == pytest.approx(float(told / pooled.mean()), rel=0.05)


def test_repeated_gradients_draw_anew_and_leave_grad_alone() -> None:
    weight, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    weight.grad = torch.full((3,), 7.0)
    generator = seeded()
    with torch.no_grad():
        rows = diagnostics.repeated_gradients(
            lambda: (weight * torch.rand(3, generator=generator)).sum(), [weight, unused], 4
        )
    assert_close(rows[:, :3], torch.rand(4, 3, generator=seeded()))
    assert rows[:, 3:].tolist() == [[0, 0]] * 4
    assert weight.grad.tolist() == [7, 7, 7]
    assert unused.grad is None


def test_nothing_is_differentiable() -> None:
    """A diagnostic that kept the graph would keep the step's memory."""
    logits = torch.randn(2, 4, 4, requires_grad=True)
    sample = ats.sample_patches(torch.rand(2, 1, 16, 16), logits, 3, 4)
    for value in (
        diagnostics.covered_mass(sample.log_attention, sample.indices),
        diagnostics.relative_entropy(sample.entropy, 16),
        diagnostics.border_mass(logits),
        diagnostics.peak_mass(logits),
        diagnostics.effective_sample_size(sample.log_attention),
        diagnostics.signal_to_noise(logits),
        diagnostics.repeated_error(logits),
        *ats.estimate(sample.patches, sample.log_attention),
    ):
        assert not value.requires_grad


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"logits must be \(B, gh, gw\)"):
        diagnostics.border_mass(torch.zeros(2, 9))
    with pytest.raises(TypeError, match="logits must be floating point"):
        diagnostics.peak_mass(torch.zeros(2, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2 copies"):
        diagnostics.signal_to_noise(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"at least 2 draws, \(R, B, …\), got \(1, 4, 2\)"):
        diagnostics.repeated_error(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"weights must be \(B, N\), got \(3,\)"):
        diagnostics.effective_sample_size(torch.ones(3))
    log_attention, indices = torch.full((2, 3), -1.0), torch.zeros(2, 3, dtype=torch.int64)
    for wrong in (indices[:, :2], indices.float()):
        with pytest.raises(ValueError, match="pass both of one PatchSample"):
            diagnostics.covered_mass(log_attention, wrong)
    with pytest.raises(ValueError, match=r"above 0, up to 0\.3679"):
        diagnostics.covered_mass(log_attention.exp(), indices)
    with pytest.raises(ValueError, match=r"grid_size\[0\] must be at least 1, got 0"):
        diagnostics.border_share((0, 3))
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"loss must give a scalar, got \(2,\)"):
        diagnostics.repeated_gradients(lambda: 2 * weight, [weight], 2)
    for parameters in ([], [weight, torch.ones(2)]):
        with pytest.raises(ValueError, match="at least one tensor, all of which require gradients"):
            diagnostics.repeated_gradients(lambda: weight.sum(), parameters, 2)
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        diagnostics.repeated_gradients(lambda: torch.zeros(()), [], 1)
    with pytest.raises(ValueError, match="cells must be at least 1"):
        diagnostics.relative_entropy(torch.zeros(2), 0)


def test_warning_signs():
    """Each on logits made to show it, none on flat attention of a model that learns."""
    flat, peaked, edge = (torch.zeros(2, 9, 9) for _ in range(3))
    peaked[:, 4, 4] = 50
    edge[:, 0] = 20
    assert diagnostics.warning_signs(flat, loss=1.0, chance=2.3) == {}
    assert set(diagnostics.warning_signs(peaked, loss=2.0, chance=2.3)) == {"collapse"}
    assert diagnostics.warning_signs(peaked, loss=0.1, chance=2.3) == {}  # a single cell may be all that it takes
    assert "on 1.0 cells" in diagnostics.warning_signs(peaked)["collapse"]
    assert "100% of the attention" in diagnostics.warning_signs(edge.unsqueeze(1))["edge"]
    assert "2.300, chance 2.300" in diagnostics.warning_signs(flat, loss=2.3, chance=2.3)["plateau"]
    with pytest.raises(ValueError, match="must be positive, got -1"):
        diagnostics.warning_signs(flat, chance=-1)


def test_overlapping_draws_are_told() -> None:
    """Sixteen neighbouring cells whose patches are four cells wide cover a fifth of sixteen patches."""
    logits = torch.full((2, 32, 32), -9.0)
    logits[:, 14:18, 14:18] = 0.0
    image = torch.zeros(2, 1, 128, 128)
    overlapping = ats.sample_patches(image, logits, 16, 16, selection="topk")
    union = (3 * 4 + 16) ** 2  # cells 4 pixels apart, patches of 16
    assert diagnostics.distinct_area(overlapping).tolist() == pytest.approx(2 * [union / (16 * 256)])
    assert "19% of their area, so that 16" in diagnostics.warning_signs(logits, sample=overlapping)["overlap"]
    apart = ats.sample_patches(image, logits, 16, 4, selection="topk")
    assert diagnostics.distinct_area(apart).tolist() == [1, 1]
    assert "overlap" not in diagnostics.warning_signs(logits, sample=apart)
    assert "overlap" not in diagnostics.warning_signs(logits)


def test_distinct_area_is_that_of_pixels_painted_one_by_one() -> None:
    """Random draws, with and without replacement, masked and not, near the border; a cell drawn again counts once."""
    logits = 3 * torch.randn(6, 8, 10, generator=seeded(1))
    mask = torch.rand(6, 8, 10, generator=seeded(2)) < 0.1
    mask[:, 0, 0] = True
    for options in ({}, {"replace": True}, {"mask": mask}):
        sample = ats.sample_patches(torch.zeros(6, 1, 40, 50), logits, 9, (11, 7), generator=seeded(), **options)
        for number, one in enumerate(sample):
            drawn = {
                (y, x) for y, x, i in zip(*one.offsets[0].T.tolist(), one.indices[0].tolist(), strict=True) if i >= 0
            }
            painted = torch.zeros(80, 80)
            for y, x in drawn:
                painted[y + 20 : y + 31, x + 20 : x + 27] = 1
            assert float(diagnostics.distinct_area(sample)[number]) == pytest.approx(
                float(painted.sum()) / len(drawn) / 77
            )


def test_attention_that_explains_one_class_only_is_told() -> None:
    """A model that looks at something in images of class 1, and at everything alike in those of class 0."""
    logits = torch.zeros(6, 10, 10)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    logits[labels == 1, 3:5, 4:6] = 8.0
    spread = diagnostics.class_spread(logits, labels)
    assert spread[0] == pytest.approx(1)
    assert spread[1] == pytest.approx(0.05, abs=0.02)
    text = diagnostics.warning_signs(logits, labels=labels)["one class"]
    assert "on images of class 1 it lies on 4% of the cells" in text
    assert "those of class 0 on 100%" in text
    both = logits.clone()
    both[labels == 0, 7:9, 1:3] = 8.0
    for fine in (both, torch.zeros(6, 10, 10)):
        assert "one class" not in diagnostics.warning_signs(fine, labels=labels)
    assert "one class" not in diagnostics.warning_signs(logits, labels=torch.ones(6, dtype=torch.int64))
    assert "one class" not in diagnostics.warning_signs(logits)
    masked = logits.masked_fill(torch.arange(100).view(10, 10) % 2 == 0, -torch.inf)
    assert "one class" in diagnostics.warning_signs(masked, labels=labels), "it is live cells that count"
    with pytest.raises(ValueError, match=r"classes \(B,\) of 6 images, got \(5,\)"):
        diagnostics.class_spread(logits, labels[:5])
