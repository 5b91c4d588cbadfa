"""The tutorials run from their first cell to their last, and what is kept of them is of such a run."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers import alone

nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel, of the extra dev, are not installed")

from tools import notebooks  # noqa: E402
from tools.site.notebooks import as_page  # noqa: E402

ROOT = Path(__file__).parent.parent
NAMES = ("how-sure", "megapixel-mnist", "own-images", "slide-to-qupath")


def test_all_tutorials_are_run() -> None:
    assert {path.stem for path in notebooks.FOLDER.glob("*.ipynb")} == set(NAMES)


def printed(text: str, pattern: str) -> list[float]:
    found = [float(number) for number in re.findall(pattern, text)]
    assert found, f"nothing like {pattern} in:\n{text}"
    return found


def check_result(name: str, text: str) -> None:
    """What a reader should see: errors far below chance, and estimates that agree with what they estimate."""
    if name == "megapixel-mnist":
        assert printed(text, r"16 patches: test error ([\d.]+)")[0] < 0.5  # guessing: 0.9
    elif name == "how-sure":
        assert printed(text, r"error of the full model: ([\d.]+)")[0] < 0.45
        assert min(printed(text, r"intervals hold ([\d.]+)")[3:]) > 0.8
        assert printed(text, r"same class as all patches: ([\d.]+)")[0] > 0.9
    elif name == "own-images":
        assert printed(text, r"(\d+) of 20 new images right")[0] >= 16
    else:
        (value,), (error,) = printed(text, r"by 20 patches: ([\d.]+)"), printed(text, r"± ([\d.]+)")
        assert abs(printed(text, r"brown, by all \d+ patches: ([\d.]+)")[0] - value) < 4 * error
        assert printed(text, r"outlined spots: ([\d.]+)")[0] > 2 * printed(text, r"share of the tissue: ([\d.]+)")[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs_and_shows_what_is_kept(name: str, tmp_path: Path) -> None:
    path = notebooks.FOLDER / f"{name}.ipynb"
    ran, kept = notebooks.executed(path, tmp_path, alone()), nbformat.read(path, as_version=4)
    for found in (ran, kept):
        check_result(name, notebooks.text(found))
        outputs = [output for cell in found.cells for output in cell.get("outputs", [])]
        assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert notebooks.pictures(ran) == notebooks.pictures(kept) >= 2
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]  # all in order, in one run


def test_tutorials_are_small_and_their_links_lead_somewhere() -> None:
    paths = sorted(notebooks.FOLDER.glob("*.ipynb"))
    assert sum(path.stat().st_size for path in paths) < 900_000
    for path in paths:
        cells = json.loads(path.read_text())["cells"]
        assert cells[0]["source"][0].startswith("# ")
        for cell in cells:
            text = "".join(cell["source"])
            width = 100 if cell["cell_type"] == "markdown" else 110
            assert max(map(len, text.splitlines())) <= width, (path.name, text)
            for target in re.findall(r"\]\((?!https?:)([^)#]+)", text) if cell["cell_type"] == "markdown" else ():
                assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"


def test_a_notebook_as_a_page() -> None:
    picture = {"output_type": "display_data", "data": {"image/png": "aGVsbG8="}, "metadata": {}}
    said = {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]}
    result = {"output_type": "execute_result", "data": {"text/plain": ["3"]}, "metadata": {}}
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "About it."]},
        {"cell_type": "code", "source": ["print('one')\n", "x"], "outputs": [said, picture, result]},
        {"cell_type": "markdown", "source": ["## More"]},
        {"cell_type": "code", "source": ["!ats train images \\\n", "    --seed 1"], "outputs": [picture]},
    ]
    page, pictures = as_page({"cells": cells}, "tour")
    assert page.startswith("# Title\n\n*A [notebook](tour.ipynb) that")
    assert "\n\nAbout it.\n\n```python\nprint('one')\nx\n```\n\n```text\none\ntwo\n```\n\n![Title](tour-1.png)" in page
    assert "```text\n3\n```" in page
    assert page.endswith("```sh\nats train images \\\n    --seed 1\n```\n\n![More](tour-2.png)\n")
    assert pictures == {"tour-1.png": b"hello", "tour-2.png": b"hello"}
