"""The callback tells attention that explains one class only, where it is told the classes."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ats
from ats.experiments.callbacks import AttentionDiagnostics, AttentionWarning
from tests.helpers import seeded


class Attention(nn.Module):
    """Sharp on views that are bright; so on all, where `both`."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both, self.scale = both, nn.Parameter(torch.ones(()))

    def forward(self, view: Tensor) -> Tensor:
        peak = torch.zeros_like(view[:, 0])
        peak[:, 3:6, 3:6] = 6.0
        bright = (view.mean((1, 2, 3)) > 0.5) | self.both
        return self.scale * peak * bright.view(-1, 1, 1)


class Task(L.LightningModule):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.sampling = ats.nn.AttentionSampling(Attention(both), nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.sampling(batch[0], batch[1])[0], batch[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("both", "told", "expected"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_one_class(tmp_path: Path, both: bool, told: bool, expected: int) -> None:
    torch.manual_seed(0)
    label = torch.arange(32) % 2
    view = label.view(-1, 1, 1, 1) * 0.8 + 0.1 * torch.rand(32, 1, 10, 10, generator=seeded())
    image = F.interpolate(view, scale_factor=4)
    callback = AttentionDiagnostics(1, patience=2, labels=(lambda batch: batch[2]) if told else None)
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Task(both), DataLoader(TensorDataset(view, image, label), batch_size=8))
    found = [str(one.message) for one in caught if issubclass(one.category, AttentionWarning)]
    about = [text for text in found if "explains one class only: on images of class 1" in text]
    assert len(about) == expected, found
