"""What the benchmarks found, as JSON: times, memory, targets beside what was measured, and the machine they ran on."""

import json
import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ats._files import write_whole
from bench import rehearsal
from bench.measure import SLOW_ROUNDS, Method, Rounds, Timing, compare, copy_rate, graphed, synchronise, timing

RESULTS = Path(__file__).parent / "results"
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"  # glibc's; docs/performance.md says what they do
COMPILE_SECONDS = 60.0  # of a run, on everything that is compiled


@dataclass(frozen=True)
class Measured:
    """A figure made of medians, and the same made of the quickest rounds, which a busy machine disturbs less."""

    median: float
    best: float

    def __mul__(self, factor: float) -> "Measured":
        return Measured(self.median * factor, self.best * factor)


@dataclass(frozen=True)
class Target:
    """One claim: `measured` must be at least, or at most, `limit`."""

    what: str
    at_least: bool
    limit: float
    measured: float
    best: float | None  # by the quickest rounds, of times
    unit: str  # "×", "ms" or "%"
    headline: bool = False  # what the report shows first, and should be the same in every run

    @property
    def met(self) -> bool:
        """Whether the claim holds."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass
class Group:
    """Methods that were measured against each other, ours first."""

    name: str
    rounds: Rounds = field(default_factory=dict)  # seconds a call, or a sample
    section: str = "ops"
    per: str = "call"
    floor_bytes: int | None = None  # that must move in a call, however it is done
    memory: dict[str, int] = field(default_factory=dict)  # peak bytes a sample
    published: dict[str, tuple[float, int]] = field(default_factory=dict)  # seconds and bytes a sample
    axis: str = ""  # what the methods' sizes are of
    points: dict[str, tuple[str, float]] = field(default_factory=dict)  # line and size of each method
    not_run: dict[str, str] = field(default_factory=dict)  # and why
    foretold: dict[str, tuple[float, float]] = field(default_factory=dict)  # ms and bytes of what was not run
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def timings(self) -> dict[str, Timing]:
        """The rounds in short."""
        return {name: timing(seconds) for name, seconds in self.rounds.items()}

    def time(self, name: str) -> Measured:
        """Milliseconds a call."""
        short = timing(self.rounds[name])
        return Measured(short.median, short.best)

    def ratio(self, slow: str, fast: str) -> Measured:
        """How many times the time of `fast` is in that of `slow`."""
        slower, faster = self.time(slow), self.time(fast)
        return Measured(slower.median / faster.median, slower.best / faster.best)

    def at_least(
        self, limit: float, measured: Measured | float, what: str, unit: str = "×", *, headline: bool = False
    ) -> None:
        """Add the target that `measured` is `limit` or more."""
        self._add(True, limit, measured, what, unit, headline)

    def at_most(
        self, limit: float, measured: Measured | float, what: str, unit: str = "×", *, headline: bool = False
    ) -> None:
        """Add the target that `measured` is `limit` or less."""
        self._add(False, limit, measured, what, unit, headline)

    def _add(
        self, at_least: bool, limit: float, measured: Measured | float, what: str, unit: str, headline: bool
    ) -> None:
        if isinstance(measured, Measured):
            self.targets.append(Target(what, at_least, limit, measured.median, measured.best, unit, headline))
        else:
            self.targets.append(Target(what, at_least, limit, measured, None, unit, headline))

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file: the rounds' quantiles in place of the rounds, which pytest-benchmark keeps."""
        values = asdict(self) | {"timings": {name: asdict(time) for name, time in self.timings.items()}}
        del values["rounds"]
        return values | {"targets": [asdict(target) | {"met": target.met} for target in self.targets]}


@dataclass
class Report:
    """All groups of one run."""

    device: torch.device
    groups: list[Group] = field(default_factory=list)
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before the first measurement
    section: str = "ops"  # of the groups that are added now
    bytes_per_second: float | None = None  # of a large copy
    seconds: float | None = None  # that the whole run took
    part: str = ""  # which part of all benchmarks it is, where it is not whole
    compiling: float = 0.0  # seconds spent on it so far
    compile_seconds: float = COMPILE_SECONDS
    failures: dict[str, str] = field(default_factory=dict)  # what failed, and the message
    skipped: dict[str, str] = field(default_factory=dict)  # what was left out, and why

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured, or stood in for."""
        return rehearsal.on_gpu(self.device)

    def facts(self) -> dict[str, str]:
        """What the times depend on."""
        cores = os.cpu_count() or 1
        busy = "; busy: look at the best rounds as well" if self.load > 0.5 * cores else ""
        facts = {**machine(self.device), "load before": f"{self.load:.1f} on {cores} cores{busy}"}
        if self.bytes_per_second:
            facts["large copy"] = f"{self.bytes_per_second / 1e9:.1f} GB/s, read and written"
        if self.part:
            facts["not a whole run"] = self.part
        if self.seconds:
            facts["time"] = f"{self.seconds:.0f} s, {self.compiling:.0f} s of them compiling"
        return facts

    def compare(
        self,
        name: str,
        methods: dict[str, Method],
        compiled: dict[str, Method] | None = None,
        *,
        copies: int = 1,
        seconds: float = 1.5,
        floor_bytes: int | None = None,
        per: str = "call",
        samples: int = 1,
        steps: bool = False,
        slow_rounds: int = SLOW_ROUNDS,
    ) -> Group:
        """Time methods against each other, ours first.

        Args:
            name: of the group.
            methods: by name. On a GPU they run from CUDA graphs, of one for each input, unless they are `steps`.
            compiled: more methods, which `torch.compile` has yet to compile when they are first called.
            copies: inputs that the methods take in turn.
            seconds: in all, about.
            floor_bytes: that must move in a call, however it is done.
            per: what the times are divided into.
            samples: of those, in a call.
            steps: the methods are training steps, with the host's part; they settle before they are timed.
            slow_rounds: at least, of a method that takes half a second or more.
        """
        group = Group(name, section=self.section, per=per, floor_bytes=floor_bytes)
        for label, method in (compiled or {}).items():
            found = self.compiled(method)
            if isinstance(found, str):
                group.not_run[label] = found
            else:
                methods = methods | {label: found}
        if self.on_gpu and not steps:
            methods = {name: self._graphed(name, method, copies, group) for name, method in methods.items()}
        if floor_bytes is not None:
            self.copy_rate()
        rounds = compare(methods, self.device, seconds, settle=steps, slow_rounds=slow_rounds)
        group.rounds = {name: [value / samples for value in rounds[name]] for name in methods}
        for name, values in group.rounds.items():
            if len(values) == 1:
                group.notes.append(f"{name} was called once, unwarmed: it takes longer than a run has time to repeat.")
        self.groups.append(group)
        return group

    def copy_rate(self) -> float:
        """Bytes a second that a large copy moves on this device: what floors are made of."""
        if self.bytes_per_second is None:
            self.bytes_per_second = copy_rate(self.device)
        return self.bytes_per_second

    def times_floor(self, time: Measured, moved: int) -> Measured:
        """How many times as long as a large copy of that many bytes, read and written, a call takes."""
        return time * (self.copy_rate() / (1e3 * moved))

    def compiled(self, method: Method) -> Method | str:
        """A method that calls what `torch.compile` makes, after it has compiled; or why there is none."""
        if self.compiling >= self.compile_seconds:
            return f"the {self.compile_seconds:g} s that this run has for compiling are spent"
        start = time.perf_counter()
        try:
            method(0)
        except Exception as error:  # whatever a compiler's absence leads to
            return f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            self.compiling += time.perf_counter() - start
        return method

    def _graphed(self, name: str, method: Method, copies: int, group: Group) -> Method:
        try:
            return graphed(method, copies)
        except RuntimeError as error:  # what synchronises cannot be captured
            group.notes.append(f"{name} is timed without a CUDA graph: {str(error).splitlines()[0]}")
            synchronise(self.device)
            return method

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "title": machine_name(self.device),
            "machine": self.facts(),
            "bytes_per_second": self.bytes_per_second,
            "groups": [group.as_dict() for group in self.groups],
            "failures": self.failures,
            "skipped": self.skipped,
        }

    def write(self, path: Path) -> None:
        """Write `path`.json."""
        write_whole(Path(f"{path}.json"), (json.dumps(self.as_dict(), indent=1) + "\n").encode())


def default_path(device: torch.device) -> Path:
    """bench/results/<machine>, without a suffix; of a GPU <machine>-bench, beside what `make gpu-check` found."""
    return RESULTS / f"{slug(machine_name(device))}{'-bench' if device.type == 'cuda' else ''}"


def slug(name: str) -> str:
    """A machine's name as a file's, without what says nothing: "Intel(R) Xeon(R) Processor" is intel-xeon."""
    said = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", said).strip("-")


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: *(.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def machine(device: torch.device) -> dict[str, str]:
    """What the times depend on: versions, threads, the allocator's settings."""
    facts = {
        "machine": machine_name(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "threads": f"{torch.get_num_threads()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        "allocator": " ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ) or "default",
    }
    if device.type == "cuda":
        facts["CUDA or HIP"] = torch.version.cuda or torch.version.hip or "unknown"
        facts["driver"] = driver_version()
    return facts


def driver_version() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0] or "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
