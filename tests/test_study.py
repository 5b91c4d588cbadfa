"""The studies: their formulas against independent ones, their figures against exact ones, their files and errors."""

import dataclasses
import json

import pytest
import torch

import ats
from ats.experiments.commands.command_line import run
from ats.experiments.study import training, training_report
from ats.experiments.study.methods import METHODS, estimate, released_coefficients
from ats.experiments.study.training import TrainingOptions, pool
from ats.experiments.study.training_report import study_training
from ats.experiments.study.variance import QUICK, VarianceOptions, make_problem, measure
from tests.enumeration import ordered_draws
from tests.helpers import assert_close, seeded
from tests.test_expectation import log_space, released, score_function

TINY = TrainingOptions(
    formulas=("ordered", "released"), n_patches=(3,), seeds=1, steps=25, batch_size=2, image_size=120, test_images=5
)


@pytest.mark.parametrize("sharpness", [0.5, 4.0])
@pytest.mark.parametrize(
    ("name", "surrogate"),
    [("replace", log_space), ("ordered", log_space), ("score", score_function), ("released", released)],
)
def test_gradients_are_those_of_the_surrogates(name, surrogate, sharpness):
    """Closed forms against what autograd makes of the formulas as the paper and the released code state them."""
    problem = make_problem(6, 4, sharpness, seeded(1))
    method, values = METHODS[name], problem.features @ problem.direction
    draws = ordered_draws(6, 3, replace=method.replace)
    pooled, gradients = estimate(method, problem.log_attention, problem.features, problem.direction, draws)
    rows = problem.log_attention.expand(len(draws), -1).clone().requires_grad_()
    estimates = surrogate(rows.log_softmax(-1), draws, values, method.replace)
    (expected,) = torch.autograd.grad(estimates.sum(), rows)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-11)
    if surrogate is log_space:
        assert_close(pooled @ problem.direction, estimates.detach())


def test_enumeration_finds_who_is_biased_and_who_varies_less():
    options = VarianceOptions(sharpness=(0.0, 2.0), n_patches=(), enumerated_n_patches=(3,), enumerated_cells=5)
    for rows in measure(options):
        by_method = {row.method: row for row in rows}
        for name, row in by_method.items():
            assert row.pooled["bias"] < 1e-12
            assert (row.gradient["bias"] > 0.1) == (name == "released"), name
            assert row.gradient["bias_noise"] == 0
        noise = {name: row.gradient["noise"] for name, row in by_method.items()}
        assert noise["unordered"] < noise["ordered"] < min(noise["replace"], noise["score"])
        assert by_method["unordered"].pooled["noise"] < by_method["ordered"].pooled["noise"]
        assert 1 < by_method["ordered"].effective_cells < 5.01


def test_monte_carlo_finds_what_enumeration_does():
    """The same five cells both ways: noise within 5%, over five standard errors; the bias within four of its own."""
    options = VarianceOptions(
        sharpness=(1.0,),
        n_patches=(3,),
        cells=5,
        enumerated_n_patches=(3,),
        enumerated_cells=5,
        draws=12_000,
        problems=1,
    )
    for exact, estimated in zip(*measure(options), strict=True):
        assert (exact.how, estimated.how) == ("enumerated", "sampled")
        assert estimated.effective_cells == exact.effective_cells
        for kind in ("pooled", "gradient"):
            want, got = getattr(exact, kind), getattr(estimated, kind)
            assert got["noise"] == pytest.approx(want["noise"], rel=0.05)
            assert got["bias"] == pytest.approx(want["bias"], abs=4 * got["bias_noise"])
            assert got["along"] == pytest.approx(want["along"], abs=4 * got["bias_noise"])


def test_variance_command_writes_and_replaces_only_its_own(tmp_path, capsys):
    command = ["study", "variance", "--quick", "--output", str(tmp_path)]
    assert run(command) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "variance.json").read_text())
    assert len(record["rows"]) == len(METHODS) * len(QUICK.sharpness) * 4
    assert (tmp_path / "results" / "variance.md").read_text().strip() in shown
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "results" / "variance.json").read_bytes()
    assert run(command) == 0
    assert (tmp_path / "results" / "variance.json").read_bytes() == before, "the same seed must give the same figures"
    assert run([*command, "--seed", "1"]) == 1
    assert "is not what `ats study variance` wrote with these options" in capsys.readouterr().err
    assert (tmp_path / "results" / "variance.json").read_bytes() == before
    (tmp_path / "results" / "variance.json").unlink()
    assert run(command) == 1
    assert "name another folder with --output, or remove it" in capsys.readouterr().err
    (tmp_path / "results" / "variance.json").write_text('{"command": "mine"}')
    assert run(command) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bias"], 1, "unknown study 'bias', expected one of variance, training, inference"),
        (["variance", "--seed", "-1"], 1, "seed must be at least 0, got -1"),
        (["training", "--formulas", "best"], 1, "unknown formula 'best', expected some of ordered, released"),
        (["training", "--steps", "3"], 1, "steps at least 25, got 3 and 3"),
        (["training", "--n-patches", "65"], 1, "n_patches 65 is more than the attention's 64 cells"),
        ([], 0, ""),
    ],
)
def test_command_errors(arguments, status, message, capsys):
    assert run(["study", *arguments]) == status
    assert message in capsys.readouterr().err


def test_released_pooling_trains_with_the_released_gradient():
    features = torch.rand(2, 4, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
    log_attention = torch.randn(2, 6, dtype=torch.float64, generator=seeded(1)).log_softmax(-1)[:, :4].requires_grad_()
    direction = torch.randn(2, 3, dtype=torch.float64, generator=seeded(2))
    results = []
    for formula in ("released", "ordered"):
        pooled = pool(formula, features, log_attention)
        results.append((pooled, *torch.autograd.grad((pooled * direction).sum(), (features, log_attention))))
    (pooled, to_features, to_attention), (expected, expected_to_features, _) = results
    assert_close(pooled, expected)
    assert_close(to_features, expected_to_features)
    inner = torch.einsum("bnd,bd->bn", features, direction)
    assert_close(to_attention, released_coefficients(log_attention, inner).detach())


def test_training_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """Each training is kept as it ends; one that is there is not done again, and the result is the same."""
    state = torch.random.get_rng_state()
    whole = study_training(TINY, tmp_path / "whole")
    assert torch.equal(torch.random.get_rng_state(), state), "a study must not disturb the caller's random numbers"
    assert len(whole) == 2
    assert whole[0].curve != whole[1].curve, "another gradient must train otherwise"
    assert all(0 <= run.mass_drawn <= 1 + 1e-5 and run.effective_cells <= 64.01 for run in whole)

    trained, really_train = [], training_report.train
    limit = [1]

    def stopping(options, *job):
        if len(trained) == limit[0]:
            raise KeyboardInterrupt
        trained.append(job[:3])
        return really_train(options, *job)

    monkeypatch.setattr(training_report, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        study_training(TINY, tmp_path / "parts")
    limit[0] = 2
    assert study_training(TINY, tmp_path / "parts") == whole
    assert len(trained) == len(set(trained)) == 2
    for name in ("results/training.json", "results/training.md", "training.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="wrote with these options"):
        study_training(dataclasses.replace(TINY, steps=30), tmp_path / "parts")
    assert "| 3 | released code | " in capsys.readouterr().out


def test_every_formula_has_a_label_and_pools():
    features, log_attention = torch.rand(1, 3, 2), torch.full((1, 3), -2.0)
    for formula in training.FORMULAS:
        estimator = METHODS[formula].estimator
        weights = ats.estimator_weights(log_attention, estimator=estimator)
        assert_close(pool(formula, features, log_attention), torch.einsum("bn,bnd->bd", weights, features))
