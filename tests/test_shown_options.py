"""The help of `ats train` shows the options of the method that was chosen, and all of them can be given."""

import dataclasses
import re

import pytest

from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.shown_options import shown_for

OF_ONE = {
    "--model.n-patches": {"ats", "uniform"},
    "--model.control-variate": {"ats"},
    "--model.patch-size": {"ats", "uniform", "mil", "gated-mil"},
    "--model.grid-step": {"mil", "gated-mil"},
    "--model.cnn-scale": {"cnn"},
    "--optim.draws": {"ats", "uniform"},
    "--optim.learning-rate": {"ats", "uniform", "mil", "gated-mil", "cnn"},
    "--data.folds": {"ats", "uniform", "mil", "gated-mil", "cnn"},
}


@pytest.mark.parametrize("method", ["ats", "uniform", "mil", "gated-mil", "cnn"])
def test_help_shows_what_means_something_with_a_method(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "colon-cancer", "--model.method", method, "--help"]) == 0
    shown = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert {option for option in OF_ONE if option in shown} == {
        option for option, methods in OF_ONE.items() if method in methods
    }


def test_defaults_and_descriptions_stay(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "colon-cancer", "--preset", "quick", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    quick = EXPERIMENTS["colon-cancer"].presets["quick"]
    assert "Patches drawn from an image." in text
    assert f"(default: {quick.optim.learning_rate})" in text


def test_what_is_shown_is_otherwise_the_same() -> None:
    config = EXPERIMENTS["megapixel-mnist"].presets["quick"]
    shown = shown_for("cnn", config)
    assert isinstance(shown, ExperimentConfig)
    assert isinstance(shown.model, ModelConfig)
    for part in ("model", "optim", "data", "trainer", "diagnostics"):
        assert dataclasses.asdict(getattr(shown, part)) == dataclasses.asdict(getattr(config, part))


def test_options_of_other_methods_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """A script may give them all; one that cannot be is told by name, shown or not."""
    assert run(["train", "colon-cancer", "--model.method", "ats", "--model.cnn-channels", "8"]) != 0
    assert "model.cnn_channels must be at least 16, got 8" in " ".join(capsys.readouterr().err.split())
