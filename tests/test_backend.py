"""Which implementation runs, and that asking for one that cannot run is an error that says how to mend it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from ats_kernels import backend as choice
from ats_kernels import sample
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
    with pytest.raises(ValueError, match=r"ATS_BACKEND='cuda', expected one of 'reference', .* or unset it"):
        backend_for(on("cpu"))


@pytest.mark.parametrize("way", ["cpu", "numba"])
def test_the_ways_of_the_cpu_path_leave_other_devices_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(choice, "_HAS_TRITON", True)
    monkeypatch.setenv("ATS_BACKEND", way)
    assert [backend_for(on(device)) for device in ("cpu", "cuda", "mps")] == ["cpu", "triton", "reference"]
    assert choice.loops_run() == (way == "numba")


def test_numba_that_does_not_import_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, or a version that refuses NumPy's: the same draws, unless loops were asked for."""
    generator = torch.Generator()
    loops = sample(torch.ones(1, 900), 5, generator=generator.manual_seed(1))
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "ats_kernels.loops", raising=False)
    choice._imports_numba.cache_clear()
    try:
        assert not choice.loops_run()
        assert torch.equal(sample(torch.ones(1, 900), 5, generator=generator.manual_seed(1)).indices, loops.indices)
        monkeypatch.setenv("ATS_BACKEND", "numba")
        with pytest.raises(ValueError, match=r"numba does not import; pip install 'torch-ats\[cpu\]', or unset it"):
            backend_for(on("cpu"))
    finally:
        choice._imports_numba.cache_clear()


def test_numba_is_imported_by_the_first_draw_only() -> None:
    """Importing it takes half a second that a command which draws nothing need not wait for."""
    code = (
        "import sys, torch, ats; print('numba' in sys.modules); ats.estimator_weights(torch.zeros(1, 1));"
        "print('numba' in sys.modules)"
    )
    printed = {}
    for way in ("cpu", "numba"):
        environment = {**os.environ, "ATS_BACKEND": way}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        printed[way] = run.stdout.split()
    assert printed == {"cpu": ["False", "False"], "numba": ["False", "True"]}


def test_a_place_that_cannot_be_written_to_keeps_nothing_and_runs(tmp_path: Path) -> None:
    """A read-only installation without a home: compiled anew in each process, with the same result."""
    package = tmp_path / "ats_kernels"
    shutil.copytree(Path(choice.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "file"
    file.touch()
    code = (
        "import torch, ats_kernels; from ats_kernels.pooling import loops;"
        "print(ats_kernels.estimator_weights(torch.zeros(1, 1)).item(), ats_kernels.__file__)"
    )
    for folder in package.rglob("*"):
        if folder.is_dir():
            (folder / "__pycache__").touch()  # no folder can be made there, not even by root
    (package / "__pycache__").touch()
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "HOME": str(file),
        "XDG_CACHE_HOME": str(file),
        "ATS_BACKEND": "numba",
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1.0", str(package / "__init__.py")]


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
