"""The page on images of one's own: its commands, options and Python run as printed."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ats.experiments.commands.command_line import run
from ats.experiments.images import PRESETS

PAGE = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
SECTION = PAGE.partition("## Train on your own images")[2].partition("\n## ")[0]


def test_the_page_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With more images than its two lines list, PNG files in place of slides, and fewer steps than by default."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    header, first, second = re.findall(r"^    (\S+,\S+)$", SECTION, flags=re.MULTILINE)
    assert header == "path,label,group"
    lines = [header]
    for index in range(10):
        pixels = random.integers(0, 256, (64, 64 + index, 3), np.uint8)
        line = re.sub(r"\d{4}", f"{index:04d}", (first, second)[index % 2]).replace(".svs", ".png")
        path = Path(line.split(",")[0])
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        lines.append(re.sub(r"patient-\d", f"patient-{index // 2}", line))
    Path("labels.csv").write_text("\n".join(lines) + "\n")
    Path("new").mkdir()
    Image.fromarray(pixels).save("new/0003.png")
    commands = re.findall(r"^    ats (.*)$", SECTION, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["train", "evaluate", "predict", "attention"]
    for command in commands:
        words = command.replace("*.svs", "0003.png").replace(".svs", ".png").split()
        if words[0] == "train":
            words += ["--optim.epochs", "1", "--model.patch-size", "16", "--trainer.accelerator", "cpu"]
        assert run(words) == 0, capsys.readouterr().err
    assert Path("predictions.csv").read_text().startswith("path,label,probability_none,probability_tumour,")
    assert Path("attention.geojson").stat().st_size > 100
    (block,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    exec(compile("import ats\n" + block.replace(".svs", ".png"), "images.md", "exec"), {})
    assert Path("patches.geojson").exists()


def test_options_that_the_page_names_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "images", "--help"]) == 0
    known = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    named = set(re.findall(r"--(?:data|optim|model|trainer)\.[\w-]+", SECTION))
    assert len(named) > 8
    assert named <= known


def test_presets_are_those_of_the_table() -> None:
    table = re.findall(r"^\| (`--.*?) \| (\S.*?) \| (\S.*?) \|$", SECTION, flags=re.MULTILINE)
    found = 0
    for options, modern, quick in table:
        names = re.findall(r"`--(\w+)\.([\w-]+)`", options)
        for preset, values in (("modern", modern), ("quick", modern if quick == "same" else quick)):
            numbers = [float(value) for value in values.split(",")]
            own = [getattr(getattr(PRESETS[preset], part), name.replace("-", "_")) for part, name in names]
            assert own == numbers, (options, preset)
            found += 1
    assert found == 12
