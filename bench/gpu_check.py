"""Everything that needs a GPU, in one command: `make gpu-check`.

Runs the tests marked `gpu` and the kernels' tests (compiled, not interpreted), compute-sanitizer over the latter where
it is installed, and the benchmarks, and writes bench/results/<GPU>.json and .md. Exits with 1 where a test or the
sanitizer failed or there is no GPU; a missed target is reported and fails nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import render
from bench.report import default_path

ROOT = Path(__file__).parent.parent
TESTS = "gpu or interpreter"
SANITIZED = "interpreter"  # small problems that run every kernel
SANITIZERS = "memcheck", "racecheck", "synccheck"


@dataclass(frozen=True)
class Check:
    """One command: whether it passed, and what there is to say."""

    name: str
    passed: bool
    summary: str
    output: str = ""  # of a check that failed


def missing() -> str | None:
    """What keeps the GPU from being used, or None where it can be."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        reason = f"torch {torch.__version__} is a build without CUDA or ROCm; install one from pytorch.org"
    elif torch.version.cuda is not None and shutil.which("nvidia-smi") is None:
        reason = "nvidia-smi is not found: no NVIDIA driver is installed"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        reason = "CUDA_VISIBLE_DEVICES is empty and hides every GPU"
    else:
        reason = f"torch {torch.__version__} finds no device that its driver gives it"
    return f"torch.cuda.is_available() is False: {reason}"


def run_tests(marks: str, name: str, wrapper: tuple[str, ...] = ()) -> Check:
    """Run the tests with these marks, under `wrapper`, on the GPU."""
    environment = {variable: value for variable, value in os.environ.items() if variable != "TRITON_INTERPRET"}
    if wrapper:  # the caching allocator would hide reads and writes past a tensor's end
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        command = [*wrapper, sys.executable, "-m", "pytest", "-m", marks, "tests", f"--junit-xml={junit}"]
        print("$", *command, flush=True)
        run = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        print(run.stdout, flush=True)
        if not junit.exists():
            return Check(name, False, f"exit status {run.returncode} before any test ran", run.stdout)
        suite = next(ElementTree.parse(junit).iter("testsuite")).attrib
    ran, skipped, failed = int(suite["tests"]), int(suite["skipped"]), int(suite["failures"]) + int(suite["errors"])
    passed = run.returncode == 0 and ran > skipped
    summary = f"{ran - skipped - failed} passed, {failed} failed, {skipped} skipped"
    return Check(name, passed, summary, "" if passed else run.stdout)


def sanitize() -> list[Check]:
    """Run the kernels' tests under each tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return [Check("compute-sanitizer", True, "NOT RUN: compute-sanitizer is not installed or not on PATH")]
    return [
        run_tests(SANITIZED, f"compute-sanitizer, {tool}", (program, f"--tool={tool}", "--error-exitcode=99"))
        for tool in SANITIZERS
    ]


def run_benchmarks(path: Path) -> Check:
    """Run bench/, which writes `path`.json and .md."""
    command = [sys.executable, "-m", "pytest", "bench", "--device=cuda", f"--output={path}"]
    print("$", *command, flush=True)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status or not Path(f"{path}.json").exists():
        return Check("benchmarks", False, f"exit status {status}")
    groups = json.loads(Path(f"{path}.json").read_text())["groups"]
    met = [target["met"] for group in groups for target in group["targets"]]
    return Check("benchmarks", True, f"{sum(met)} of {len(met)} targets met")


def write(path: Path, checks: list[Check]) -> None:
    """Put the checks into the report that the benchmarks wrote."""
    json_path = Path(f"{path}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = {"title": path.name, "machine": {}, "groups": []}
    report = json.loads(json_path.read_text()) if json_path.exists() else empty
    report["checks"] = [asdict(check) for check in checks]
    json_path.write_text(json.dumps(report, indent=1) + "\n")
    render.write(json_path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="Check everything that needs a GPU.")
    parser.add_argument("--output", type=Path, help="write <output>.json and .md; bench/results/<GPU> by default")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"NOTHING WAS CHECKED: there is no GPU to check on.\n{reason}", file=sys.stderr)
        return 1
    path = (options.output or default_path(torch.device("cuda"))).resolve()
    for suffix in (".json", ".md"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)  # what a former run found
    benchmarks = run_benchmarks(path)
    checks = [run_tests(TESTS, "tests on the GPU"), *sanitize(), benchmarks]
    write(path, checks)
    for check in checks:
        print(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.summary}")
    print(f"written to {path}.json and .md")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
