"""The attention score: exact on maps and boxes made by hand, and the same for attention sampling and Deep MIL."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ats.datasets.image_dataset import Region
from ats.datasets.synthetic.write import write_colon_cancer
from ats.experiments.colon_cancer import ColonCancerConfig
from ats.experiments.config import ExperimentConfig
from ats.experiments.localisation import attention_map, localise, on_target
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.models import ATSClassifier
from tests.test_evaluation import fresh


def point(y: float, x: float) -> Region:
    return Region(y, x, y, x, "epithelial")


def test_a_patch_is_on_target_if_it_shows_a_centre() -> None:
    offsets = torch.tensor([[0, 0], [0, 10], [10, 0], [-5, -5]])
    targets = [point(3.5, 9.9), Region(8, 0, 20, 8, "sign")]  # the box's centre is (14, 4)
    assert on_target(offsets, (10, 10), targets).tolist() == [True, False, True, False]
    assert on_target(offsets, (10, 10), [point(3.5, 10.0)]).tolist() == [False, True, False, False]
    assert on_target(offsets, (10, 10), []).tolist() == [False] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "colon-cancer"
    write_colon_cancer(folder, 12, size=100)
    return folder


def config_of(folder: Path, method: str) -> ExperimentConfig:
    paper = EXPERIMENTS["colon-cancer"].presets["paper"]
    return dataclasses.replace(
        paper,
        data=ColonCancerConfig(folder=folder, folds=3),
        model=dataclasses.replace(paper.model, method=method),
    )


class Oracle(nn.Module):
    """Attention on given cells alone."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: Tensor | None = None

    def forward(self, view: Tensor) -> Tensor:
        logits = torch.full((1, 20 * 20), -20.0)
        assert self.cells is not None
        logits[0, self.cells] = 0.0
        return logits.view(1, 1, 20, 20)


def test_perfect_uniform_and_wrong_attention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, "uniform")
    task, data = fresh(config), experiment_data(config)
    assert isinstance(task.model, ATSClassifier)
    uniform = localise(task, data, n_draws=20)
    assert uniform.images == int(data.labels("test").sum())
    assert uniform.times_uniform == pytest.approx(1)
    assert uniform.mass == pytest.approx(uniform.uniform_mass)
    assert uniform.average_precision == pytest.approx(uniform.uniform_mass, abs=1e-6)  # a map of ties ranks nothing

    # What is on target is known before the model looks, image by image.
    oracle = Oracle()
    task.model.sampling.attention = oracle
    load = data.load

    def shown(name: str, indices: Tensor, epoch: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        view, image, label = load(name, indices, epoch)
        oracle.cells = torch.zeros(400, dtype=torch.bool)
        _, offsets, size = attention_map(task.model, view, image)
        oracle.cells = on_target(offsets, size, data.split(name).examples[int(indices)].targets) ^ wrong
        return view, image, label

    monkeypatch.setattr(data, "load", shown)
    wrong = False
    perfect = localise(task, data, n_draws=20)
    assert perfect.mass > 0.999
    assert (perfect.hit_rate, perfect.draws_on_target) == (1, 1)
    assert perfect.average_precision == pytest.approx(1)
    assert perfect.times_uniform == pytest.approx(1 / perfect.uniform_mass, rel=1e-3)
    wrong = True
    worst = localise(task, data, n_draws=20)
    assert worst.mass < 1e-3
    assert (worst.hit_rate, worst.draws_on_target) == (0, 0)
    assert worst.average_precision < perfect.uniform_mass + 0.1


def test_deep_mil_is_scored_on_its_own_grid(folder: Path) -> None:
    config = config_of(folder, "gated-mil")
    torch.manual_seed(0)
    task, data = fresh(config), experiment_data(config)
    view, image, _ = data.load("test", torch.tensor([1]))
    attention, offsets, size = attention_map(task.model, view, image)
    assert (attention.shape, offsets.shape, size) == ((1, 100), (100, 2), (27, 27))
    assert float(attention.sum()) == pytest.approx(1, abs=1e-5)
    found = localise(task, data)
    assert 0 < found.mass < 1
    assert found.times_uniform == pytest.approx(1, abs=0.2)  # fresh weights look everywhere


def test_a_cnn_has_no_attention(folder: Path) -> None:
    config = config_of(folder, "cnn")
    with pytest.raises(ValueError, match="CNNClassifier has no attention"):
        localise(fresh(config), experiment_data(config))
