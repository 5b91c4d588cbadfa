"""What users name: nothing of it is markup, ~ is their home, and nothing that is there is overwritten."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import ats
from ats.experiments.commands.command_line import run
from ats.experiments.config import ExperimentConfig
from ats.experiments.options import expanded, parse
from ats.experiments.plotting.overlay import save
from ats.experiments.study.commands import InferenceCommand
from ats.experiments.training import train
from tests.faults import tiny

NAMES = ["c[/x]", "[bold]", ":cat:", "$x_$", "a b", "\udcff"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names") / "run"
    train(tiny(folder))
    return folder


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_is_printed_as_it_is(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / name)
    shown = name.encode(errors="backslashreplace").decode()
    assert run(["evaluate", name, "--images", "2"]) == 0
    assert f"{shown}: 2 test images" in capfd.readouterr().out
    assert run(["evaluate", f"{name}/none"]) == 1
    assert f"no checkpoint at {shown}/none" in capfd.readouterr().err
    train(tiny(Path(name)))
    assert f"{shown} is complete: nothing to train." in capfd.readouterr().out


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_may_be_a_title(name: str, tmp_path: Path) -> None:
    """$x_$ would be a formula, and a wrong one."""
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.set_title(f"{name} $\\nonsense$")
    save(figure, tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_may_have_any_name(tmp_path: Path) -> None:
    config = tiny(tmp_path / "c[/x]\udcff")
    assert train(config).exists()


def test_home_is_found_where_no_shell_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny(Path("~/run"))
    assert config.run_folder == tmp_path / "run"
    folder = dataclasses.replace(config.data, folder=Path("~/data"))
    found = expanded(dataclasses.replace(config, data=folder))
    assert isinstance(found, ExperimentConfig)
    assert (found.output, found.data.folder) == (tmp_path / "run", tmp_path / "data")
    study = parse(InferenceCommand, "ats", ["~/a", "b", "--output=~/c"])
    assert study.checkpoints == (tmp_path / "a", Path("b"))
    assert study.output == tmp_path / "c"
    with pytest.raises(ValueError, match=r"~nobody-of-that-name/x: nobody has that home.*write \./~nobody"):
        expanded(Path("~nobody-of-that-name/x"))


def test_an_evaluation_overwrites_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "thesis.json"
    output.write_text("years of work")
    assert run(["evaluate", str(whole), "--output", str(output)]) == 1
    assert f"{output} is there already; name another file with --output" in capsys.readouterr().err
    assert output.read_text() == "years of work"


def test_the_version_needs_no_extras() -> None:
    """Of a package installed alone: PyTorch is there, what commands need is not."""
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] in ('lightning', 'tyro', 'rich', 'matplotlib', 'torchmetrics'):\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from ats.cli import main\n"
        "sys.argv = ['ats', '--version']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "sys.argv = ['ats', 'demo']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout == f"{ats.__version__}\n"
    assert done.returncode == 1
    assert "is not installed; the commands need: pip install 'torch-ats[experiments]'" in done.stderr
