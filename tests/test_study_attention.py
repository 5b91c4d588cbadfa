"""`ats study attention`: every figure against another way to come to it, on small maps, known signals and tiny runs."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ats.datasets.image_dataset import Finding, Region
from ats.datasets.synthetic.write import write_colon_cancer, write_german
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig
from ats.experiments.evaluation import held_out_data
from ats.experiments.localisation import localise
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.experiments.study.attention import (
    AttentionOptions,
    among_best,
    auc,
    map_figures,
    rank,
    set_patches,
)
from ats.experiments.study.attention_gradient import batch_gradients, gradient_signal
from ats.experiments.study.attention_oracle import draw_cells, oracle_errors
from ats.experiments.study.attention_report import markdown, measure
from ats.experiments.trained import load
from ats.experiments.training import train
from ats.models import ATSClassifier
from ats.nn import AttentionSampling
from tests.enumeration import enumerate_draws
from tests.helpers import seeded
from tests.test_evaluation import fresh
from tests.test_gigapixel_experiment import DATA as GIGAPIXEL
from tests.test_training import tiny

FEW = AttentionOptions(images=4, draws=3, batches=2)
FEW_OPTIONS = "--images", "4", "--draws", "3", "--batches", "2"


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_ties_against_every_pair_and_every_order(seed: int) -> None:
    scores = torch.randint(4, (6,), generator=seeded(seed)).double()
    positive = torch.zeros(6, dtype=torch.bool)
    positive[torch.randperm(6, generator=seeded(seed))[:2]] = True
    pairs = itertools.product(scores[positive].tolist(), scores[~positive].tolist())
    expected = [1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs]
    assert auc(scores, positive) == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    for n in (1, 3, 9):
        counts = []
        for order in itertools.permutations(range(6)):  # the sort is stable: equal scores stay in this order
            best = sorted(order, key=lambda cell: -float(scores[cell]))[:n]
            counts.append(sum(bool(positive[cell]) for cell in best))
        assert among_best(scores, positive, n) == pytest.approx(sum(counts) / len(counts))


def test_a_map_that_can_be_counted_by_hand() -> None:
    """Five cells, the last masked; two targets, one in cells 0 and 1; noise in cells 1 and 2, and in cell 0 alone."""
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0], dtype=torch.float64)
    inside = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    found = rank(weights, inside, torch.tensor([True, True, False, False]), 2)
    assert found["auc"] == pytest.approx(2 / 3)  # 0.4 and 0.3 above 0.2, and 0.1 below
    assert found["auc_of_targets"] == 1  # targets 0.4 and 0.3; noise 0.2, not 0.4; the other shows with a target only
    assert found["mass"] == pytest.approx(0.8)
    assert found["uniform_mass"] == 0.75
    assert (found["best_on_target"], found["targets"], found["targets_among_best"]) == (2, 2, 2)
    entropy = -sum(p * math.log(p) for p in (0.1, 0.4, 0.2, 0.3))
    assert found["entropy"] == pytest.approx(entropy)
    assert found["relative_entropy"] == pytest.approx(entropy / math.log(4))
    alone = rank(weights, inside[:, :1], torch.tensor([True]), 2)
    assert math.isnan(alone["auc_of_targets"])
    assert math.isnan(alone["targets_among_best"])


class Fixed(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, view: Tensor) -> Tensor:
        return self.logits.expand(len(view), 1, 1, -1)


@pytest.mark.parametrize("nothing", [0, None])
def test_the_oracles_error_is_that_of_every_draw_by_its_probability(nothing: int | None) -> None:
    """Two of five cells: 0 shows class 1, 1 class 2, 2 both, 3 noise, 4 nothing; the label is 1, of three classes.

    What is said is worked out draw by draw from the ordered estimator's weights. A thousand draws of a model find it
    within 4.5 standard errors: a false alarm in 140,000.
    """
    attention = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64)
    inside = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    says = [1, 2, None]
    draws, probability = enumerate_draws(attention, 2)
    expected, weights = [], []
    for first, second in draws.tolist():
        left = 1 - float(attention[first])
        own = (1 + float(attention[first])) / 2, left / 2
        weights.append(own)
        scores = [0.0, 0.0, 0.0]
        for cell, weight in zip((first, second), own, strict=True):
            for finding, one in enumerate(says):
                if one is not None and inside[cell, finding]:
                    scores[one] += weight
        best = [c for c in range(3) if abs(scores[c] - max(scores)) < 1e-9]
        if max(scores) == 0 and nothing is not None:
            best = [nothing]
        expected.append(1 - (1 in best) / len(best))
    found = oracle_errors(inside[draws], torch.tensor(weights), says, 1, 3, nothing)
    assert found.tolist() == pytest.approx(expected)
    exact = float(probability @ torch.tensor(expected, dtype=torch.float64))
    assert 0.2 < exact < 0.8

    sampling = AttentionSampling(Fixed(attention.log().float()), nn.Flatten(), 2, 2)
    model = ATSClassifier(sampling, 4, 3)
    seen, share = draw_cells(model, attention.float(), inside, 1000, seeded(), masked=False)
    assert seen.shape == (1000, 2, 3)
    errors = oracle_errors(seen, share, says, 1, 3, nothing)
    assert abs(float(errors.mean()) - exact) < 4.5 * float(errors.std()) / 1000**0.5


def test_signal_and_noise_of_gradients_that_are_made_of_them() -> None:
    """With many batches the known ratio; with few, of pure noise, 0 on average and as spread as it says.

    All tolerances are at least three standard errors, of one seed.
    """
    mean, batch, draw = torch.tensor([0.3, -0.4, 0.0, 0.0]), 0.5, 1.0
    generator = seeded(3)

    def gradients(batches: int, signal: float) -> list[Tensor]:
        noise = batch * torch.randn(batches, 1, 4, generator=generator)
        noise = noise + draw * torch.randn(batches, 3, 4, generator=generator)
        return list(signal * mean + noise)

    many = gradient_signal(gradients(4000, 1.0))
    assert many is not None
    variance = 4 * (batch**2 + draw**2)
    assert many.ratio == pytest.approx(0.25 / variance, rel=0.3)  # 0.05
    assert many.of_draws == pytest.approx(draw**2 / (batch**2 + draw**2), rel=0.05)
    few = [gradient_signal(gradients(6, 0.0)) for _ in range(1000)]
    ratios = torch.tensor([one.ratio for one in few if one is not None])
    by_chance = torch.tensor([one.by_chance for one in few if one is not None])
    assert len(ratios) == 1000
    spread = float(by_chance.square().mean().sqrt())
    assert abs(float(ratios.mean())) < 4 * spread / 1000**0.5
    assert float(ratios.std()) == pytest.approx(spread, rel=0.15)
    assert gradient_signal([torch.ones(2, 4)] * 3) is None
    with pytest.raises(ValueError, match="at least 2 batches of 2 draws, got 1 of 2"):
        gradient_signal([torch.ones(2, 4)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny(tmp_path_factory.mktemp("attention") / "run")
    return train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=1, draws=2)))


def test_the_command_measures_a_run(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "attention", str(checkpoint.parent.parent), *FEW_OPTIONS]
    assert run([*command, "--output", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "found.json").read_text())
    figures = record["runs"][0]["figures"]
    assert (figures["images"], figures["images_with_targets"], figures["n_patches"]) == (4, 4, 10)
    assert (figures["targets"], figures["bound"], figures["unknown"]) == (5, 5, {})
    assert 0 <= figures["targets_among_best"] <= 5
    assert 0 < figures["derivative"] <= 1
    assert f"| {figures['oracle_error']:.3f} |" in text
    # Found in other ways: the mass by `localise` of what are targets here, the gradient copy by copy.
    trained = load(checkpoint)
    data = held_out_data(trained, 4, None)
    data.targets = lambda index: tuple(f.region for f in data.findings(index) if f.region.target)  # type: ignore
    other = localise(trained, data)
    assert figures["mass"] == pytest.approx(other.mass)
    assert figures["uniform_mass"] == pytest.approx(other.uniform_mass)
    copies = torch.stack(list(batch_gradients(trained, data, batches=2, copies=2, seed=0))).double()
    first, second = copies.mean(1)
    signal, noise = first @ second, copies.var(1).sum(-1).mean()
    variance = copies.mean(1).var(0).sum() + noise / 2
    assert figures["signal_to_noise"] == pytest.approx(float(signal / variance), rel=1e-3)
    assert figures["noise_of_draws"] == pytest.approx(min(1.0, float(noise / variance)), rel=1e-3)

    page = [*command, "--n-patches", "4", "--output", str(tmp_path / "found.md")]
    assert run(page) == 0
    assert (tmp_path / "found.md").read_text() == capsys.readouterr().out.rstrip() + "\n"
    assert "| patches a draw, N | 4 |" in (tmp_path / "found.md").read_text()
    assert run(page) == 1
    assert "is there already" in capsys.readouterr().err
    assert run([*command, "--output", "found.txt"]) == 1
    assert "must be a file that ends in .json or .md" in capsys.readouterr().err


def test_images_of_digits_know_what_is_on_them(checkpoint: Path) -> None:
    data = experiment_data(load(checkpoint).config)
    image = data.examples("test", torch.tensor([2]))[0][0, 0]
    digits = [finding for finding in data.findings(2) if finding.region.target]
    noise = [finding for finding in data.findings(2) if not finding.region.target]
    assert (len(digits), len(noise)) == (5, 2)
    assert sum(finding.says == int(data.labels("test")[2]) for finding in digits) == 3
    assert {finding.says for finding in noise} == {None}
    for finding in (*digits, *noise):
        box = finding.region
        assert int(image[int(box.top) : int(box.bottom), int(box.left) : int(box.right)].amax()) > 100


def colon(folder: Path, method: str) -> ExperimentConfig:
    paper = EXPERIMENTS["colon-cancer"].presets["paper"]
    data = dataclasses.replace(paper.data, folder=folder, folds=3)
    return dataclasses.replace(paper, data=data, model=dataclasses.replace(paper.model, method=method))


def test_other_data_and_other_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uniform sampling ranks nothing; Deep MIL draws nothing; a CNN looks nowhere."""
    write_colon_cancer(tmp_path / "colon", 12, size=100)
    config = colon(tmp_path / "colon", "uniform")
    uniform = measure(fresh(config), experiment_data(config), FEW)
    assert (uniform.auc, uniform.auc_of_targets) == (0.5, 0.5)
    assert uniform.mass == pytest.approx(uniform.uniform_mass)
    assert uniform.relative_entropy == pytest.approx(1)
    assert set(uniform.unknown) == {"bound", "signal_to_noise"}
    assert "all, on target | – |" in markdown(["uniform"], [uniform])
    assert uniform.oracle_error is not None
    config = colon(tmp_path / "colon", "mil")
    mil = measure(fresh(config), experiment_data(config), FEW)
    assert mil.auc is not None
    assert mil.oracle_error is None
    assert set(mil.unknown) == {"bound", "oracle_error", "signal_to_noise"}
    config = colon(tmp_path / "colon", "cnn")
    assert run(["study", "attention", str(untrained(config, tmp_path / "cnn"))]) == 1
    assert "has no attention" in capsys.readouterr().err


def untrained(config: ExperimentConfig, folder: Path) -> Path:
    optim = dataclasses.replace(config.optim, updates=1, batch_size=2)
    trainer = dataclasses.replace(config.trainer, accelerator="cpu")
    model = dataclasses.replace(config.model, cnn_channels=16, cnn_scale=0.5)
    return train(dataclasses.replace(config, output=folder, optim=optim, trainer=trainer, model=model))


def test_signs_speak_for_their_limits(tmp_path: Path) -> None:
    write_german(tmp_path / "signs", 8, 4, size=(160, 240), sign_size=(12, 30), limits=(30, 50, 70))
    quick = EXPERIMENTS["speed-limits"].presets["quick"]
    config = dataclasses.replace(quick, data=dataclasses.replace(quick.data, folder=tmp_path / "signs"))
    data = experiment_data(config)
    for index, label in enumerate(data.labels("test").tolist()):
        targets = [finding for finding in data.findings(index) if finding.region.target]
        assert {finding.says for finding in targets} == ({label} if label else set())
    data.split("test")
    box = Region(0, 0, 9, 9, "speed-limit-120", target=False)
    assert data.says(box, 1) is None  # type: ignore[attr-defined]
    assert data.says(dataclasses.replace(box, kind="speed-limit-70"), 1) == 3  # type: ignore[attr-defined]


def test_nested_attention_is_ranked_at_its_first_level() -> None:
    demo = EXPERIMENTS["gigapixel-mnist"].presets["demo"]
    model = dataclasses.replace(demo.model, levels=("128:3:2", "8:2:4"))
    config = dataclasses.replace(demo, data=GIGAPIXEL, model=model)
    trained, data = fresh(config), experiment_data(config)
    assert set_patches(trained.model, None, 1) == 6
    figures = map_figures(trained, data, dataclasses.replace(FEW, images=2), 6)
    assert figures.targets == 5
    assert figures.auc_of_targets is not None
    assert figures.oracle_error is not None
    with pytest.raises(ValueError, match="this model draws as its levels say"):
        set_patches(trained.model, 5, 1)
    findings = data.findings(0)
    assert sum(isinstance(one, Finding) and one.region.target for one in findings) == 5
    assert sum(not one.region.target for one in findings) == GIGAPIXEL.n_places - 5


def test_own_images_have_no_ground_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests import test_images_experiment as images

    config = images.tiny(images.write_images(tmp_path, images.TWO), tmp_path / "run", epochs=1)
    train(config)
    assert run(["study", "attention", str(config.run_folder)]) == 1
    assert "is not known of images" in " ".join(capsys.readouterr().err.split())
    assert run(["study", "attention"]) == 1
    assert "name at least one run's folder" in capsys.readouterr().err
    for wrong in ("--copies 1", "--batches 1", "--draws 0"):
        assert run(["study", "attention", str(config.run_folder), *wrong.split()]) == 1
        assert "must be" in capsys.readouterr().err
