"""The kernels against their references in Triton's interpreter, in a process of their own: see conftest.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import INTERPRETED

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(INTERPRETED, reason="this process has TRITON_INTERPRET=1 and runs them itself")
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no kernel can run")
    command = [sys.executable, "-m", "pytest", "-m", "interpreter", "-p", "no:cacheprovider", "--no-header", "tests"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    if run.returncode:
        pytest.fail(f"TRITON_INTERPRET=1 {' '.join(command[1:])}\n{run.stdout}{run.stderr}", pytrace=False)
    print(run.stdout.splitlines()[-1])
