"""Pages of the site that lie outside docs/, and links that lead there.

MkDocs calls these functions by their names.
"""

import json
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path, and knows of no package around it

from tools.site.notebooks import as_page  # noqa: E402

BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "bench/results/*", "examples/*.py", "tests/*.py")
"""What pages of docs/ link to, relative to the project's folder; on the site it lies at the same place."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies beside docs/, and a page for each notebook, which itself can be downloaded."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".md" and "/" in name:  # a report: a text, not a page of its own
                continue
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        folder = path.parent.relative_to(ROOT / "docs").as_posix()
        page, pictures = as_page(json.loads(path.read_text()), path.stem)
        for name, content in {f"{path.stem}.md": page, **pictures}.items():
            files.append(File.generated(config, f"{folder}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ lead to where the site has it."""
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        target, anchor = found["target"], found["anchor"] or ""
        outside = here in ("CONTRIBUTING.md", "CHANGELOG.md")
        base = "" if outside else posixpath.join("docs", posixpath.dirname(here))
        path = posixpath.normpath(posixpath.join(base, target))
        on_site = path.removeprefix("docs/") if path.startswith("docs/") else path
        if on_site.endswith(".ipynb") and on_site != here.replace(".md", ".ipynb"):  # but its own page offers the file
            on_site = on_site.replace(".ipynb", ".md")
        return f"]({posixpath.relpath(on_site, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\]\((?!https?:|#|mailto:)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", moved, markdown)
