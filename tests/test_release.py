"""What a release is checked for; the building and installing itself is `make release-check`."""

import re
from pathlib import Path

import pytest
import yaml

import ats
from tools.release_check import ReleaseError, check_changelog, check_contents, version

ROOT = Path(__file__).parent.parent


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
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    called = {step["run"].split()[1] for job in jobs.values() for step in job["steps"] if "run" in step}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"test", "demo", "lint", "docs", "release-check"} <= called <= targets
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["year"] == 2019
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())
