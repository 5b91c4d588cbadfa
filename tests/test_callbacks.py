"""`ats.experiments.callbacks`: each warning on a case made to show it and on one made not to; training untouched."""

import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ats
from ats.diagnostics import CAUSES
from ats.experiments.callbacks import AttentionDiagnostics, AttentionWarning
from tests.helpers import seeded

GRID, CLASSES = 8, 4
NAMES = {"effective_patches", "covered_mass", "relative_entropy", "peak_mass", "border_mass", "relative_error"}


class Attention(nn.Module):
    """Logits of a fixed shape plus a little that is learned."""

    def __init__(self, shape: Tensor) -> None:
        super().__init__()
        self.register_buffer("shape", shape)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))

    def forward(self, view: Tensor) -> Tensor:
        return self.shape + 0.1 * self.layers(view)


class Task(L.LightningModule):
    """Classes by brightness, which every patch shows; `luck` replaces what a patch shows by noise."""

    def __init__(self, shape: Tensor, learns: bool = True, dropout: float = 0.1, method: str = "sample") -> None:
        super().__init__()
        feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        self.sampling = ats.nn.AttentionSampling(Attention(shape), feature, 4, 4, selection=method)
        self.head, self.learns = nn.Linear(16, CLASSES), learns

    def scores(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        view, image, _ = batch
        return self.head(self.sampling(view, image, generator=generator)[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.scores(batch), batch[2])
        return loss if self.learns else 0 * loss + math.log(CLASSES)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def gradient_loss(module: L.LightningModule, batch: Any, generator: torch.Generator) -> Tensor:
    assert isinstance(module, Task)
    return F.cross_entropy(module.scores(batch, generator), batch[2])


def fit(folder: Path, callback: AttentionDiagnostics | None, shape: Tensor, steps: int = 40, **options: Any) -> Task:
    torch.manual_seed(0)
    task = Task(shape, **options)
    label = torch.arange(320) % CLASSES
    image = label.view(-1, 1, 1, 1) + 0.3 * torch.rand(320, 1, 4 * GRID, 4 * GRID, generator=seeded())
    view = F.avg_pool2d(image, 4)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=CSVLogger(folder, name="csv"), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    trainer.fit(task, DataLoader(TensorDataset(view, image, label), batch_size=16))
    return task


def shape_of(name: str) -> Tensor:
    shape = torch.zeros(1, GRID, GRID)
    if name == "one cell":
        shape[0, 4, 4] = 12
    elif name == "a few cells":
        shape[0, 3:5, 3:5] = 12
    elif name == "border":
        shape[0, 0] = 4
    elif name == "some at the border":  # 62% on 44% of the cells
        shape[0, 0, :], shape[0, -1, :] = 1, 1
    return shape


def warned(folder: Path, callback: AttentionDiagnostics, shape: str, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, callback, shape_of(shape), **options)
    return [str(warning.message) for warning in caught if issubclass(warning.category, AttentionWarning)]


CHANCE = math.log(CLASSES)
CASES = {
    # name: (shape, options of the task, chance, cause that must be warned of or None)
    "healthy": ("flat", {}, CHANCE, None),
    "collapsed": ("one cell", {"learns": False}, None, "attention has collapsed: it lies on 1.0 cells"),
    "four cells are not one": ("a few cells", {"learns": False}, None, None),
    "one cell that is all the task needs": ("one cell", {}, CHANCE, None),
    "at the border": ("border", {}, CHANCE, r"of the attention lies on the border of the grid, which has 44% of its"),
    "somewhat at the border": ("some at the border", {}, CHANCE, None),
    "at chance": (
        "flat",
        {"learns": False},
        CHANCE,
        "step 18, for 20 steps: the loss is that of guessing (1.386, chance 1.386)",
    ),
    "at a loss of which chance is not known": ("flat", {"learns": False}, None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_each_cause_is_warned_of_once_and_only_where_it_is(name: str, tmp_path: Path) -> None:
    shape, options, chance, cause = CASES[name]
    messages = warned(tmp_path, AttentionDiagnostics(2, chance=chance, patience=10, plateau_steps=20), shape, **options)
    if cause is None:
        assert messages == []
    else:
        assert len(messages) == 1, "20 looks, one warning"
        assert cause in messages[0]


def test_a_cause_has_to_last(tmp_path: Path) -> None:
    """A single look at a bad batch is no reason to warn; neither are as many looks as patience less one."""
    assert warned(tmp_path, AttentionDiagnostics(2, patience=21), "border") == []
    assert len(warned(tmp_path, AttentionDiagnostics(2, patience=20), "border")) == 1


def test_a_resumed_run_does_not_warn_again(tmp_path: Path) -> None:
    first = AttentionDiagnostics(2)
    assert len(warned(tmp_path, first, "border")) == 1
    path = tmp_path / "state.pt"
    torch.save(first.state_dict(), path)
    second = AttentionDiagnostics(2)
    second.load_state_dict(torch.load(path, weights_only=True))
    assert warned(tmp_path, second, "border") == []
    assert set(CAUSES) == {"collapse", "edge", "overlap", "one class", "plateau"}


def test_training_is_not_touched(tmp_path: Path) -> None:
    """Weights, statistics and random numbers end as without it, bit by bit, with gradients measured at every step."""
    plain = fit(tmp_path / "plain", None, shape_of("flat"))
    after = torch.rand(3)
    watched = fit(tmp_path / "watched", AttentionDiagnostics(1, loss=gradient_loss), shape_of("flat"))
    assert torch.equal(torch.rand(3), after)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert all(not layer._forward_hooks for layer in watched.modules())
    assert watched.training


def test_what_is_logged(tmp_path: Path) -> None:
    """A row of each number at every tenth step, of the values that the functions give."""
    fit(tmp_path, AttentionDiagnostics(10, loss=gradient_loss, gradient_draws=8), shape_of("flat"))
    header, *rows = [line.split(",") for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()]
    assert set(header) == {"step"} | {f"attention/{name}" for name in NAMES | {"gradient_snr", "repeated_error"}}
    logged = [dict(zip(header, row, strict=True)) for row in rows]
    assert [int(row["step"]) for row in logged] == [0, 10, 20, 30]
    first = {name.removeprefix("attention/"): float(value) for name, value in logged[0].items()}
    assert first["relative_entropy"] > 0.99
    assert first["border_mass"] == pytest.approx(28 / 64, abs=0.03)
    assert first["covered_mass"] == pytest.approx(4 / 64, abs=0.01)
    assert 3.9 < first["effective_patches"] <= 4
    assert 0 < first["relative_error"] < 1
    assert first["gradient_snr"] > -1
    assert 0 < first["repeated_error"] < 1


def test_errors_told_from_one_draw_and_from_repeated_ones_agree(tmp_path: Path) -> None:
    """At step 90, when batch normalisation's statistics are those of the batches, and without dropout's own noise."""
    callback = AttentionDiagnostics(90, loss=gradient_loss, gradient_draws=20)
    fit(tmp_path, callback, shape_of("flat"), steps=91, dropout=0.0)
    header, *rows = [line.split(",") for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()]
    last = dict(zip(header, rows[-1], strict=True))
    assert last["step"] == "90"
    assert float(last["attention/repeated_error"]) == pytest.approx(float(last["attention/relative_error"]), rel=0.3)


def test_models_without_attention_sampling_are_left_alone(tmp_path: Path) -> None:
    task = L.LightningModule()
    callback = AttentionDiagnostics(1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    callback.on_train_batch_start(trainer, task, None, 0)
    callback.on_train_batch_end(trainer, task, {"loss": torch.ones(())}, None, 0)


def test_most_probable_cells_have_no_error_to_tell(tmp_path: Path) -> None:
    """Weighted by their attention, as they are pooled, and not as if they had been drawn."""
    fit(tmp_path, AttentionDiagnostics(10), shape_of("border"), method="topk")
    header, first, *_ = [line.split(",") for line in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()]
    assert set(header) == {"step"} | {f"attention/{name}" for name in NAMES - {"relative_error"}}
    values = dict(zip(header, first, strict=True))
    assert float(values["attention/effective_patches"]) == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("option", ["every", "patience", "plateau_steps", "gradient_draws"])
def test_impossible_options(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        AttentionDiagnostics(**{"every": 1} | {option: 0})
    with pytest.raises(TypeError, match=rf"{option} must be an int, got float: 2\.5"):
        AttentionDiagnostics(**{"every": 1} | {option: 2.5})  # type: ignore[arg-type]


def test_impossible_chance_and_one_draw() -> None:
    with pytest.raises(ValueError, match="gradient_draws must be at least 2"):
        AttentionDiagnostics(1, gradient_draws=1)
    with pytest.raises(ValueError, match=r"math\.log\(classes\), and must be positive, got -1"):
        AttentionDiagnostics(1, chance=-1.0)
