"""The site: every public name has its place, and the Python on its first pages runs as printed."""

import re
from pathlib import Path

import pytest

import ats
import ats_kernels

ROOT = Path(__file__).parent.parent
REFERENCE = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md")))


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def test_every_public_name_is_in_the_reference() -> None:
    documented = set(re.findall(r"^::: (\S+)$", REFERENCE, flags=re.MULTILINE))
    public = {f"ats.{name}" for name in ats.__all__ if name != "__version__"}
    assert documented == public | {f"ats_kernels.{name}" for name in ats_kernels.__all__}


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    pages = {path.relative_to(ROOT / "docs").with_suffix(".md").as_posix() for path in found}
    shown = {page for page in pages if not page.startswith("results/")} - {"package.md"}
    assert listed == shown | {"CONTRIBUTING.md", "CHANGELOG.md"}


@pytest.mark.parametrize("page", ["quickstart.md", "own-loop.md", "lightning.md", "exporting.md", "gigapixel-mnist.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page's blocks, one after the other, as a reader would."""
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(found):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_what_the_page_for_users_of_others_names_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    from ats.experiments.commands.command_line import run

    assert run(["train", "megapixel-mnist", "--help"]) == 0
    options = capsys.readouterr().out
    named = re.findall(r"`(--[\w.-]+)`", (ROOT / "docs" / "moving.md").read_text().partition("PyTorch port")[2])
    ours = [option for option in named if "." in option or option == "--output"]
    assert len(ours) >= 8
    assert [option for option in ours if f"{option} " not in options] == []
