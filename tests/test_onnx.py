"""What cannot be exported to ONNX says so before PyTorch prints a graph."""

import io

import pytest
import torch
from torch import nn

import ats


class Model(nn.Module):
    def __init__(self, selection: str) -> None:
        super().__init__()
        feature = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        self.sampling = ats.nn.AttentionSampling(nn.Identity(), feature, 3, 4, selection=selection)

    def forward(self, view: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.sampling(view, image)[0]


class View(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return ats.area_downsample(image, 6)


IMAGE = torch.rand(1, 1, 24, 20)


@pytest.mark.parametrize("selection", ["sample", "topk"])
def test_a_draw(selection: str) -> None:
    with pytest.raises(ValueError, match="the draw of attention sampling cannot be exported to ONNX; export the atten"):
        torch.onnx.export(Model(selection).eval(), (torch.rand(1, 1, 6, 5), IMAGE), io.BytesIO(), dynamo=False)


def test_a_view() -> None:
    with pytest.raises(ValueError, match=r"a view of \(6, 6\) pixels, which do not divide the image's, cannot be exp"):
        torch.onnx.export(View(), (IMAGE,), io.BytesIO(), dynamo=False)
