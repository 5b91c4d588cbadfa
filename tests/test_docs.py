"""What the README prints works as printed, and pages lead where they say."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readmes_example_runs() -> None:
    """The first thing a user copies: it must run, and leave gradients in both networks."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line]) == 10
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    for network in ("attention", "feature"):
        gradients = [p.grad for p in names[network].parameters()]  # type: ignore[attr-defined]
        assert gradients
        assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_links_and_pictures_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        assert "@@" not in page.read_text(), f"{page.name} has a placeholder"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def pages() -> list[Path]:
    return [path for path in ROOT.rglob("*.md") if not {".venv", "runs", "build"} & set(path.relative_to(ROOT).parts)]


def test_no_line_is_longer_than_a_reader_likes() -> None:
    """Of all pages, those that commands wrote among them; tables, pictures and links keep their lines."""
    kept = ("|", "![", "http", "[")
    long = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in pages()
        for number, line in enumerate(page.read_text().splitlines(), start=1)
        if len(line) > 100 and not line.lstrip().startswith(kept)
    ]
    assert not long


def test_a_source_distribution_has_all_that_its_tests_need() -> None:
    """Every top-level folder of the project that git knows is in it, and the readme shows without a clone."""
    listed = set(re.findall(r"^graft (\w+)$", (ROOT / "MANIFEST.in").read_text(), flags=re.MULTILINE))
    folders = {path.name for path in ROOT.iterdir() if any(path.glob("*.py")) or path.name == "docs"}
    assert folders - listed == {"ats", "ats_kernels"}
    readme = (ROOT / "docs" / "package.md").read_text()
    assert "![" not in readme
    assert not re.findall(r"\]\((?!https?:)", readme)
