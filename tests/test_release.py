"""What a release is checked for; the building and installing itself is `make release-check`."""

import re
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ats
from tools.release_check import ReleaseError, check_changelog, check_contents, version

ROOT = Path(__file__).parent.parent
PYTHONS = "3.10", "3.11", "3.12", "3.13"


def test_the_version_is_read_without_importing() -> None:
    assert version() == ats.__version__


def test_a_release_is_dated_and_nothing_waits() -> None:
    check_changelog("# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2026-01-02\n\n- All.\n", "1.2.0")
    with pytest.raises(ReleaseError, match=r"no section '## 1.3.0 - YYYY-MM-DD'; date what is released"):
        check_changelog("## 1.3.0\n\n- All.\n", "1.3.0")
    with pytest.raises(ReleaseError, match=r"lines under Unreleased; move them to 1.2.0"):
        check_changelog("## Unreleased\n\n- More.\n\n## 1.2.0 - 2026-01-02\n", "1.2.0")


def test_what_an_archive_holds() -> None:
    good = ["ats/__init__.py", "ats/py.typed", "ats_kernels/py.typed", "ats/datasets/mnist_digits/LICENSE"]
    check_contents("wheel", [*good, "torch_ats-1.dist-info/METADATA"])
    with pytest.raises(ReleaseError, match=r"the wheel lacks ats/py.typed"):
        check_contents("wheel", [name for name in good if name != "ats/py.typed"])
    with pytest.raises(ReleaseError, match=r"the wheel has tests/test_a.py"):
        check_contents("wheel", [*good, "tests/test_a.py"])
    with pytest.raises(ReleaseError, match=r"the sdist lacks CHANGELOG.md"):
        check_contents("sdist", good)


def test_what_the_forge_reads_is_whole() -> None:
    """The workflow runs targets that there are, on the Pythons that the package is for; the citation parses."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == list(PYTHONS)
    tried = re.findall(r"^    (make \w+) ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert {"make demo", "make test"} == set(tried)
    assert set(tried) <= {step.get("run") for step in jobs["test"]["steps"] if "if" not in step}
    called = {step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "run" in step}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"test", "demo", "lint", "docs", "release-check"} <= called <= targets
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["year"] == 2019
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())


def test_one_list_of_pythons() -> None:
    """The package's metadata, the first page and the Makefile begin where the workflow's list does."""
    project = (ROOT / "pyproject.toml").read_text()
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert tuple(classified) == PYTHONS
    (required,) = re.findall(r'^requires-python = "(.+)"$', project, flags=re.MULTILINE)
    assert required == f">={PYTHONS[0]}"
    assert f"With Python ≥ {PYTHONS[0]} " in (ROOT / "README.md").read_text()
    oldest = re.search(r"version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert oldest is not None
    assert ".".join(oldest.groups()) == PYTHONS[0]


def pins(python: str) -> dict[str, list[str]]:
    """What constraints.txt asks for on a Python: each package's specifiers."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.9"}):
            found.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier))
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_is_exact_and_alone(python: str) -> None:
    for name, specifiers in pins(python).items():
        assert len(specifiers) == 1, f"{name} is pinned twice on Python {python}: {specifiers}"
        assert re.fullmatch(r"==[\w.]+", specifiers[0]), f"{name}{specifiers[0]}"


def test_every_package_that_is_needed_is_pinned() -> None:
    """On the Python that runs this; torch pins the packages of CUDA itself."""
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    waiting, seen = [Requirement("torch-ats[dev]")], set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {extra for of, extra in seen if of == name}:
            seen.add((name, extra))
            for line in requires(name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    needed_names = {name for name, _ in seen} - {"torch-ats"}
    assert "torch" in needed_names
    assert not {name for name in needed_names - set(pinned) if not name.startswith(("nvidia-", "cuda-"))}
