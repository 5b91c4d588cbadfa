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


def modules_of(*packages: str) -> set[str]:
    """The top modules of packages and of all that these require."""
    known = {normal(name) for names in importlib.metadata.packages_distributions().values() for name in names}
    found, waiting = set(), [normal(package) for package in packages]
    while waiting:
        package = waiting.pop()
        if package in found or package not in known:
            continue
        found.add(package)
        for requirement in importlib.metadata.requires(package) or ():
            if "extra ==" not in requirement:
                waiting.append(normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]))
    return {
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if any(normal(name) in found for name in names)
    }


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


BLOCKED = """
import importlib.abc, sys
blocked = set({blocked!r})

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder())
import pytest
import tools.gpu_check.__main__, tools.gpu_check.device, tools.gpu_check.mnist, tools.gpu_check.worker
import bench.render
sys.exit(pytest.main([*sys.argv[1:], "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def test_nothing_on_its_path_needs_more_than_five_packages() -> None:
    installed = importlib.metadata.packages_distributions()
    blocked = sorted(set(installed) - modules_of(*NEEDED) - {"ats", "ats_kernels", "tests", "tools", "bench"})
    assert {"lightning", "tyro", "matplotlib", "rich", "PIL"} <= set(blocked)
    files = [str(path) for path in files_with(ROOT / "tests")]
    command = [sys.executable, "-c", BLOCKED.format(blocked=blocked), "-p", "pytest_benchmark.plugin"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "bench", *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert len(skipped) == 1
    assert "lightning is not installed, whose callback looks at the attention" in skipped[0]
    for file in files:
        assert f"{Path(file).name}::" in done.stdout
    assert "bench_tables.py::" in done.stdout
