"""The examples run, and learn, with sizes that take seconds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import alone
from tests.timm_standin import StandIn

FOLDER = Path(__file__).parent.parent / "examples"
TRAINED = ("plain_pytorch", "multi_label", "frozen_encoder", "lightning_module", "timm_backbone")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TRAINED)
def test_an_example_says_what_it_shows_in_one_sitting(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 125
    top = text.split('"""')[1]
    assert f"\npython examples/{name}.py" in top
    assert re.search(r"Prints .* error", top, flags=re.DOTALL)
    assert re.search(r"after about \d+ seconds", " ".join(top.split()))
    assert not re.search(r"(?:from|import) [\w.]*\b_|ats\._", text)


def test_every_example_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*TRAINED, "slide_shortcuts"}


def test_plain_pytorch_learns(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "100", "--batch", "16", "--side", "120", "--noise", "0", "--patches", "6"]
    error = example("plain_pytorch").main(sizes)
    assert error < 0.6
    assert f"error on 500 unseen images: {error:.3f}" in capsys.readouterr().out


def test_multi_label_learns() -> None:
    assert example("multi_label").main(["--steps", "100", "--batch", "8", "--side", "120"]) < 0.3


def test_a_frozen_encoder_stays_as_it_is_and_the_rest_learns(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("frozen_encoder")
    error = module.main(["--steps", "100", "--side", "512", "--width", "16", "--patches", "4"])
    assert error < 0.2
    assert re.search(r"an image: \d+ ms by 4 patches, \d+ ms to encode it whole", capsys.readouterr().out)
    model = module.Model(4, 2)
    image, _ = module.scenes(module.torch.zeros(3, 512, 512, dtype=module.torch.uint8), 2)
    model(image)[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert model.attention[0].weight.grad.abs().sum() > 0


@pytest.mark.skipif(sys.platform == "win32", reason="processes of gloo")
def test_a_lightning_module_learns_on_two_processes() -> None:
    pytest.importorskip("lightning", reason="lightning, of the extra experiments, is not installed")
    sizes = ["--processes", "2", "--epochs", "1", "--images", "800", "--side", "120"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "lightning_module.py"), *sizes],
        env=alone(OMP_NUM_THREADS="1"), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.findall(r"error on 200 unseen images: (\S+);", done.stdout)
    assert len(found) == 1  # of rank 0 alone
    assert float(found[0]) < 0.4
    assert "processes: 2" in done.stdout


def test_a_network_of_timms_learns() -> None:
    pytest.importorskip("timm", reason="timm, of the extra of that name, is not installed: it brings torchvision")
    assert example("timm_backbone").main(["--steps", "50", "--side", "120"]) < 0.7


def test_the_example_with_timm_runs_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in, which has timm's signatures: one of these changing shows only above."""
    monkeypatch.setitem(sys.modules, "timm", StandIn())
    assert example("timm_backbone").main(["--model", "resnet10", "--steps", "100", "--side", "120"]) < 0.7
