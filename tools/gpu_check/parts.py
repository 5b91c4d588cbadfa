"""The parts of the check, in their order: what each runs, its share of the time, and how what it left is read."""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools.gpu_check.marked import files_with
from tools.gpu_check.processes import Command, Ended
from tools.gpu_check.record import CUT, FAILED, PASSED, Outcome

ROOT = Path(__file__).parents[2]
SANITIZER_FAILED = 99
_MEMORY_A_PROCESS = 4 * 2**30  # bytes of the GPU
_AROUND_TRAINING = 15.0  # seconds: it starts, makes images, and its last steps and test batch may take longer
_REHEARSED_TRAINING = 10.0
_TOOLKITS = "CUDA_HOME", "CUDA_PATH"


@dataclass(frozen=True)
class Setting:
    """Where the check runs."""

    rehearsal: str = ""  # or "all", or "first" of each kind: on the CPU, kernels in Triton's interpreter
    memory: int = 0  # bytes, of the GPU
    bytes_per_second: float | None = None
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    sanitizer: str | None = field(default_factory=lambda: find_sanitizer())

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cpu" if self.rehearsal else "cuda"

    @property
    def watching(self) -> list[str] | None:
        """The sanitizer, or what stands in for it, or None where there is none."""
        if self.rehearsal:
            return [sys.executable, "-m", "tools.gpu_check.no_sanitizer"]
        return [self.sanitizer] if self.sanitizer else None

    @property
    def processes(self) -> int:
        """That share the tests: each is busy compiling on a core, and takes some of the GPU's memory."""
        room = max(1, self.memory // _MEMORY_A_PROCESS) if self.memory else 8
        return max(1, min(8, self.cores, room))

    @property
    def environment(self) -> Mapping[str, str]:
        """What tests run under: interpreted or not, whatever this process was told."""
        return {"TRITON_INTERPRET": "1" if self.rehearsal else "0", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Args:
        name, title: short, and as the report has it.
        log: that its output goes to.
        share: of the time, relative to the others that are still to come; what it leaves is theirs.
        least: seconds; with less it is not run.
        commands: to run at the same time in a folder, with so many seconds; or why it cannot be run.
        read: fill in an outcome from what lies in the folder, while they run and when they have ended.
        required: the check fails unless it passes.
        most: seconds.
        lacks: what a rehearsal of it cannot show.
    """

    name: str
    title: str
    log: str
    share: float
    least: float
    commands: Callable[[Path, float], list[Command] | str]
    read: Callable[[Path, Outcome, Ended | None], None]
    required: bool = False
    most: float = float("inf")
    lacks: str = ""


_TESTS_LACK = (
    "Rehearsed in Triton's interpreter: nothing was compiled, and one case ran of each file of kernel tests. "
    "Tests marked `gpu` did not run: streams, graphs and peaks of memory are a GPU's."
)
_BENCH_LACKS = (
    "Rehearsed on the CPU with small sizes: captured graphs were stood in for by plain calls, and no kernel of Triton "
    "ran. No time, rate, memory or target in it is a GPU's."
)
_SANITIZERS_LACK = (
    "Rehearsed without compute-sanitizer, which watches compiled kernels on an NVIDIA GPU only: its subset of the "
    "tests ran in Triton's interpreter, and nothing was looked for."
)
_LACKS = {
    "tests": _TESTS_LACK,
    "ops": _BENCH_LACKS,
    "memcheck": _SANITIZERS_LACK,
    "benchmark": _BENCH_LACKS,
    "racecheck": _SANITIZERS_LACK,
    "tables": f"{_BENCH_LACKS} Memory is what the allocators of a CPU gave.",
    "training": "Rehearsed on the CPU with small images: neither the times nor the errors are those of a GPU.",
    "synccheck": _SANITIZERS_LACK,
}


def parts(setting: Setting) -> list[Part]:
    """All of them."""
    share = _tests(setting)
    found = [
        Part("tests", "Tests", "tests", 33, 20, share, read_tests, required=True),
        Part("ops", "Ops against their floors", "bench", 17, 20, _bench(setting, ["bench_ops"], 0), read_bench),
        Part("memcheck", "memcheck, on a subset", "sanitizers", 12, 20, _sanitize(setting, "memcheck"), read_tests),
        Part("benchmark", "The other benchmarks", "bench", 12, 20, _bench(setting, _others(), 20), read_bench),
        Part("racecheck", "racecheck, on a subset", "sanitizers", 8, 20, _sanitize(setting, "racecheck"), read_tests),
        Part("tables", "Tables", "bench", 8, 15, _bench(setting, ["bench_tables"], 0), read_bench),
        Part("training", "Megapixel MNIST, quick", "training", 7, 20, _training(setting), read_training, most=125),
        Part("synccheck", "synccheck, on a subset", "sanitizers", 3, 20, _sanitize(setting, "synccheck"), read_tests),
    ]
    return [replace(part, lacks=_LACKS[part.name]) for part in found] if setting.rehearsal else found


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in a CUDA toolkit."""
    folders = [Path(os.environ[name], "bin") for name in _TOOLKITS if name in os.environ]
    folders.append(Path("/usr/local/cuda/bin"))
    found = (shutil.which("compute-sanitizer", path=str(folder)) for folder in folders)
    return shutil.which("compute-sanitizer") or next((program for program in found if program), None)


# Tests, also under a sanitizer


def share_of_tests(folder: Path, place: float, *more: str, files: Sequence[Path] | None = None) -> list[str]:
    """A process of pytest that takes tests of `files`, by default those that need a GPU, from a queue in `folder`."""
    listed = [str(path) for path in files or files_with(ROOT / "tests")]
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "-p", "no:cov"]
    ours = ["-p", "tools.gpu_check.worker", f"--queue={folder}", f"--place={place:.4f}", *more]
    options = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", "-o", "addopts=--strict-markers"]
    return [sys.executable, "-m", "pytest", *quiet, *options, *ours, *listed]


def _tests(setting: Setting) -> Callable[[Path, float], list[Command] | str]:
    def commands(folder: Path, seconds: float) -> list[Command] | str:
        places = [index / setting.processes for index in range(setting.processes)]
        few = ["--few=a-file"] if setting.rehearsal else []
        return [Command(share_of_tests(folder, place, *few), setting.environment, restarts=True) for place in places]

    return commands


def _sanitize(setting: Setting, tool: str) -> Callable[[Path, float], list[Command] | str]:
    def commands(folder: Path, seconds: float) -> list[Command] | str:
        watching = setting.watching
        if watching is None:
            return "compute-sanitizer is not installed, not on PATH and not in CUDA_HOME"
        # Probes of the API that fail without harm are no errors of a kernel.
        options = [f"--tool={tool}", "--report-api-errors=no", f"--error-exitcode={SANITIZER_FAILED}"]
        environment = dict(setting.environment)
        if tool == "memcheck":  # the caching allocator would hide reads and writes past a tensor's end
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        few = {"": "a-test", "all": "a-file", "first": "first"}[setting.rehearsal]
        number = 1 if few == "first" else min(4, setting.processes)
        places = [index / number for index in range(number)]
        files = files_with(ROOT / "tests")[: 1 if few == "first" else None]
        shares = [share_of_tests(folder, place, f"--few={few}", files=files) for place in places]
        return [Command([*watching, *options, *share], environment) for share in shares]

    return commands


def read_tests(folder: Path, outcome: Outcome, ended: Ended | None) -> None:
    """Count what the processes wrote down of each test."""
    collected: set[str] = set()
    started: set[str] = set()
    became: dict[str, str] = {}
    messages: dict[str, str] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                note = json.loads(line)
            except ValueError:  # the last of a process that was killed
                continue
            test = note["test"]
            if note["what"] == "collected":
                collected.add(test)
            elif note["what"] == "started":
                started.add(test)
            elif became.get(test) != "failed":  # its setup, call and teardown count apart
                became[test] = note["what"]
                if note["what"] == "failed":
                    messages[test] = note["message"]
    unfinished = sorted(started - became.keys())
    if ended is not None and not ended.cut:
        for test in unfinished:
            became[test], messages[test] = "failed", "its process died in it"
    counts = Counter(became.values())
    never = len(collected) - len(collected & (became.keys() | started))
    outcome.failures = dict(sorted(messages.items()))
    outcome.summary = ", ".join(f"{counts[what]} {what}" for what in ("passed", "failed", "skipped"))
    outcome.notes = []
    if ended is None:
        return
    if ended.cut:
        if unfinished:
            outcome.notes.append(f"Running when it was ended: {', '.join(unfinished)}.")
        outcome.summary += f", {never + len(unfinished)} of {len(collected)} not finished"
    elif never:
        outcome.summary += f", {never} of {len(collected)} never started"
    bad = sorted({status for status in ended.statuses if status})
    if SANITIZER_FAILED in bad:
        outcome.summary += "; the sanitizer found errors"
    strange = [status for status in bad if status not in (1, SANITIZER_FAILED)]
    if strange:
        listed = ", ".join(map(str, strange))
        outcome.notes.append(f"Processes ended with status {listed}; a negative one is a signal's.")
    if messages or bad:
        outcome.status = FAILED
    elif ended.cut:
        outcome.status = CUT
    else:
        outcome.status = PASSED if counts["passed"] and not never else FAILED


# Benchmarks


def _others() -> list[str]:
    """All but those that are parts of their own; first what is quickest and says most."""
    first = ["bench_whole", "bench_estimators", "bench_diagnostics", "bench_training_step", "bench_scaling"]
    found = sorted(path.stem for path in (ROOT / "bench").glob("bench_*.py"))
    own = ["bench_ops", "bench_tables"]
    return [name for name in first if name in found] + [name for name in found if name not in (*first, *own)]


def _bench(setting: Setting, names: list[str], compile_seconds: float) -> Callable[[Path, float], list[Command] | str]:
    def commands(folder: Path, seconds: float) -> list[Command] | str:
        arguments = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
        arguments += [f"bench/{name}.py" for name in names]
        arguments += [
            f"--device={setting.device}",
            f"--output={folder / 'bench'}",
            f"--compile-seconds={compile_seconds}",
        ]
        if setting.rehearsal:
            arguments.append(f"--rehearse={setting.rehearsal}")
        if setting.bytes_per_second:
            arguments.append(f"--copy-rate={setting.bytes_per_second:.0f}")
        return [Command(arguments, {"TRITON_INTERPRET": "0"})]

    return commands


def read_bench(folder: Path, outcome: Outcome, ended: Ended | None) -> None:
    """Take over the groups that have been measured so far, and say what was not."""
    record = _json(folder / "bench.json")
    outcome.groups = record.get("groups", [])
    outcome.failures = record.get("failures", {})
    outcome.notes = [f"Not run: {name}: {reason}" for name, reason in record.get("skipped", {}).items()]
    targets = [target for group in outcome.groups for target in group["targets"]]
    outcome.summary = f"{len(outcome.groups)} groups, "
    if outcome.lacks:  # a rehearsal's
        outcome.summary += f"{len(targets)} targets, which a rehearsal cannot tell of"
    else:
        outcome.summary += f"{sum(target['met'] for target in targets)} of {len(targets)} targets met"
    if outcome.failures:
        outcome.summary += f", {len(outcome.failures)} benchmarks failed"
    _judge(outcome, ended, bool(outcome.groups))


# Training


def _training(setting: Setting) -> Callable[[Path, float], list[Command] | str]:
    def commands(folder: Path, seconds: float) -> list[Command] | str:
        time = max(1.0, seconds - _AROUND_TRAINING)
        if setting.rehearsal:
            time = min(time, _REHEARSED_TRAINING)
        arguments = [sys.executable, "-m", "tools.gpu_check.mnist", str(folder / "training.json")]
        arguments += [f"--seconds={time:.0f}", f"--device={setting.device}"]
        if setting.rehearsal:
            arguments += ["--images=32", "--image-size=330"]
        return [Command(arguments, {"TRITON_INTERPRET": "0"})]

    return commands


def read_training(folder: Path, outcome: Outcome, ended: Ended | None) -> None:
    """Step times and errors."""
    found = _json(folder / "training.json")
    if found:
        times = ", ".join(f"{name} {value:.1f}" for name, value in found["ms a step"].items())
        outcome.summary = (
            f"{found['steps']} steps; ms a step: {times}; training error {100 * found['training error']:.1f}%"
        )
        if found["test error"] is not None:
            outcome.summary += f", test error {100 * found['test error']:.1f}% of {found['tested on']} images"
        outcome.summary += "; digits: the bundled ones, no network needed"
        if not found["finite"]:
            outcome.failures = {"training": "the loss is not finite"}
    else:
        outcome.summary = "no step was done"
    _judge(outcome, ended, bool(found))


def _judge(outcome: Outcome, ended: Ended | None, any_found: bool) -> None:
    if ended is None:
        return
    bad = [status for status in ended.statuses if status]
    if bad:
        outcome.summary += f"; exit status {bad[0]}"
    if bad or outcome.failures or (not any_found and not ended.cut):
        outcome.status = FAILED
    else:
        outcome.status = CUT if ended.cut else PASSED


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() else {}
