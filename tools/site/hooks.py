"""Pages of the site that lie outside docs/, and links that lead there.

MkDocs calls these functions by their names.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "bench/results/*", "examples/*.py", "tests/*.py")
"""What pages of docs/ link to, relative to the project's folder; on the site it lies at the same place."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies beside docs/."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".md" and "/" in name:  # a report: a text, not a page of its own
                continue
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(path)))
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
        return f"]({posixpath.relpath(on_site, posixpath.dirname(here) or '.')}{anchor})"

    return re.sub(r"\]\((?!https?:|#|mailto:)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", moved, markdown)
