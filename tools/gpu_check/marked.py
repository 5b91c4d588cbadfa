"""Which test files hold tests that need a GPU, read from their text: importing the others may need more packages."""

import ast
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

MARKS = "gpu", "interpreter"


@lru_cache
def files_with(folder: Path, marks: tuple[str, ...] = MARKS) -> tuple[Path, ...]:
    """The test files in `folder` that have one of the marks, or import what has one from a module beside them."""
    sources = {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}
    # Most files have none, and are not worth parsing.
    marked = {stem for stem, source in sources.items() if _names(source, marks) and marks_in(source) & set(marks)}
    while True:
        more = {
            stem
            for stem, source in sources.items()
            if stem not in marked and _names(source, marked) and modules_in(source, folder.name) & marked
        }
        if not more:
            break
        marked |= more
    return tuple(folder / f"{stem}.py" for stem in sources if stem in marked and stem.startswith("test_"))


def marks_in(source: str) -> set[str]:
    """The names that stand behind `pytest.mark` in a file."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark"
    }


def modules_in(source: str, package: str) -> set[str]:
    """The modules of a package that a file imports names of, or themselves."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"{package}."):
            found.add(str(node.module)[len(package) + 1 :])
        elif isinstance(node, ast.Import):
            found |= {alias.name[len(package) + 1 :] for alias in node.names if alias.name.startswith(f"{package}.")}
    return found


def _names(source: str, words: Iterable[str]) -> bool:
    return any(word in source for word in words)
