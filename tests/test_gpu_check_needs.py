"""What the GPU check runs and imports: the files that need a GPU, and no more than five packages."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.gpu_check.marked import files_with, marks_in
from tools.gpu_check.parts import ROOT

NEEDED = "torch", "triton", "numpy", "pytest", "pytest-benchmark"


def test_files_are_found_by_their_marks() -> None:
    assert marks_in("import pytest\nMARK = pytest.mark.gpu(1)\n@pytest.mark.section('x')\ndef test(): ...") == {
        "gpu", "section"
    }  # fmt: skip
    found = {path.name for path in files_with(ROOT / "tests")}
    naming = {
        path.name
        for path in (ROOT / "tests").glob("test_*.py")
        if any(f"pytest.mark.{mark}" in path.read_text() for mark in ("gpu", "interpreter"))
    }
    assert found >= naming - {"test_gpu_check_processes.py", Path(__file__).name}  # where it stands in strings
    assert {"test_sample_triton.py", "test_capture.py", "test_measure.py"} <= found


def test_marks_that_are_imported_count(tmp_path: Path) -> None:
    for name, source in {
        "devices.py": "import pytest\nBOTH = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]",
        "steps.py": "from tests.devices import BOTH",
        "test_near.py": "from tests import devices",
        "test_far.py": "import tests.steps as steps",
        "test_own.py": "import pytest\npytestmark = pytest.mark.interpreter",
        "test_none.py": "'devices, steps, pytest.mark.gpu'",
    }.items():
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / name).write_text(source)
    assert [path.stem for path in files_with(tmp_path / "tests")] == ["test_far", "test_near", "test_own"]


def requirements(*packages: str) -> set[str]:
    """Packages and all that these require."""
    found, waiting = set(), [normal(package) for package in packages]
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        try:
            required = importlib.metadata.requires(package) or ()
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        found.add(package)
        waiting += [
            normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
            for requirement in required
            if "extra ==" not in requirement
        ]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


ABSENT = """
import importlib.machinery, importlib.metadata, re, sys, sysconfig
packages, modules = set({packages!r}), set({modules!r})
installed = tuple({{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}})

class Allowed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = super().find_spec(name, path, target)
        places = [] if found is None else [found.origin or "", *(found.submodule_search_locations or ())]
        others = any(place.startswith(installed) for place in places) and name.partition(".")[0] not in modules
        return None if others else found

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Allowed
every = importlib.metadata.distributions
importlib.metadata.distributions = lambda **options: (
    found for found in every(**options) if re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower() in packages
)
"""


def without_other_packages(folder: Path) -> Path:
    """A folder to put on PYTHONPATH: of what is installed only the five packages, and what they require, is found."""
    packages = requirements(*NEEDED)
    installed = importlib.metadata.packages_distributions()
    modules = {module for module, names in installed.items() if packages & set(map(normal, names))}
    assert not {"lightning", "tyro", "matplotlib", "rich", "PIL", "numba"} & modules
    (folder / "sitecustomize.py").write_text(ABSENT.format(packages=sorted(packages), modules=sorted(modules)))
    return folder


def test_nothing_on_its_path_needs_more_than_five_packages(tmp_path: Path) -> None:
    """All files that hold tests for a GPU can be collected; test_gpu_check_rehearsal.py runs some."""
    files = [str(path) for path in files_with(ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": f"{without_other_packages(tmp_path)}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "bench", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert len(skipped) == 2
    assert "lightning is not installed, whose callback looks at the attention" in skipped[0]
    assert "bench_files.py" in skipped[1]  # which reads slides, on a CPU only
    for file in files:
        assert f"{Path(file).name}::" in done.stdout
    assert "bench_tables.py::" in done.stdout
