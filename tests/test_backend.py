"""Which implementation runs, and that asking for one that cannot run is an error that says how to mend it."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from ats_kernels import backend as choice
from ats_kernels.backend import backend_for
from tests.conftest import INTERPRETED


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATS_BACKEND", raising=False)


def on(device: str) -> torch.Tensor:
    """Stands in for a tensor on a device that may not be there: only its device is asked for."""
    return cast("torch.Tensor", SimpleNamespace(device=torch.device(device)))


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "cpu"), ("cuda", "triton"), ("mps", "reference"), ("meta", "reference")]
)
def test_the_device_chooses(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_HAS_TRITON", True)
    assert backend_for(on(device)) == backend


@pytest.mark.parametrize(("device", "backend"), [("cpu", "cpu"), ("cuda", "reference")])
def test_without_triton_gpus_run_the_reference(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_HAS_TRITON", False)
    assert backend_for(on(device)) == backend


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reference_overrides_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATS_BACKEND", "reference")
    assert backend_for(on(device)) == "reference"


def test_triton_overrides_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_HAS_TRITON", True)
    monkeypatch.setenv("ATS_BACKEND", "triton")
    assert backend_for(on("cuda")) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_for(on("cpu")) == "triton"


def test_triton_on_a_cpu_tensor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_HAS_TRITON", True)
    monkeypatch.setenv("ATS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"ATS_BACKEND=triton on a CPU tensor needs .*set TRITON_INTERPRET=1"):
        backend_for(on("cpu"))


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_HAS_TRITON", False)
    monkeypatch.setenv("ATS_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"triton is not installed; pip install triton, or unset it"):
        backend_for(on("cuda"))


def test_an_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"ATS_BACKEND='cuda', expected 'reference' or 'triton', or unset it"):
        backend_for(on("cpu"))


def test_the_choice_is_traced_without_a_graph_break() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * {"cpu": 2, "triton": 3, "reference": 5}[backend_for(x)]

    assert scaled(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.interpreter
def test_kernels_run_where_the_device_fixture_says(device: torch.device) -> None:
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.interpret == INTERPRETED
    assert device.type == ("cpu" if INTERPRETED else "cuda")
