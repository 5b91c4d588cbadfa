"""The kernels against their references in Triton's interpreter, a process for each file of tests: see conftest.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import INTERPRETED
from tests.helpers import alone
from tools.gpu_check.marked import files_with

ROOT = Path(__file__).parent.parent
FILES = files_with(ROOT / "tests", ("interpreter",))


@pytest.mark.skipif(INTERPRETED, reason="this process has TRITON_INTERPRET=1 and runs them itself")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_"))
def test_kernels_in_the_interpreter(file: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no kernel can run")
    options = ["-m", "interpreter", "-p", "no:cacheprovider", "--no-header"]
    command = [sys.executable, "-m", "pytest", *options, str(file.relative_to(ROOT))]
    run = subprocess.run(
        command, cwd=ROOT, env=alone(TRITON_INTERPRET="1"), capture_output=True, text=True, check=False
    )
    if run.returncode:  # also where no test was found
        pytest.fail(f"TRITON_INTERPRET=1 {' '.join(command[1:])}\n{run.stdout}{run.stderr}", pytrace=False)
    print(run.stdout.splitlines()[-1])
