"""What the benchmarks found: tables of times, targets beside what was measured, and the machine they ran on."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measure import Method, Timing, compare, graphed

RESULTS = Path(__file__).parent / "results"
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"  # glibc's; docs/kernels.md says what they do


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

    @property
    def met(self) -> bool:
        """Whether the claim holds."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass
class Group:
    """Methods that were timed against each other."""

    name: str
    timings: dict[str, Timing] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def time(self, name: str) -> Measured:
        """Milliseconds a call."""
        return Measured(self.timings[name].median, self.timings[name].best)

    def ratio(self, slow: str, fast: str) -> Measured:
        """How many times the time of `fast` is in that of `slow`."""
        slower, faster = self.time(slow), self.time(fast)
        return Measured(slower.median / faster.median, slower.best / faster.best)

    def at_least(self, limit: float, measured: Measured | float, what: str, unit: str = "×") -> None:
        """Add the target that `measured` is `limit` or more."""
        self._add(True, limit, measured, what, unit)

    def at_most(self, limit: float, measured: Measured | float, what: str, unit: str = "×") -> None:
        """Add the target that `measured` is `limit` or less."""
        self._add(False, limit, measured, what, unit)

    def _add(self, at_least: bool, limit: float, measured: Measured | float, what: str, unit: str) -> None:
        if isinstance(measured, Measured):
            self.targets.append(Target(what, at_least, limit, measured.median, measured.best, unit))
        else:
            self.targets.append(Target(what, at_least, limit, measured, None, unit))

    def markdown(self) -> str:
        """A heading, the times, the targets."""
        lines = [f"## {self.name}", ""]
        if self.timings:
            rows = [
                (name, f"{time.median:.4g}", f"{time.low:.4g} – {time.high:.4g}", f"{time.best:.4g}", f"{time.rounds}")
                for name, time in self.timings.items()
            ]
            lines += [*_table(("method", "median ms", "quartiles ms", "best ms", "rounds"), rows), ""]
        if self.targets:
            targets = [
                (
                    target.what,
                    f"{'≥' if target.at_least else '≤'} {target.limit:g} {target.unit}",
                    f"{target.measured:.3g} {target.unit}",
                    "yes" if target.met else "**no**",
                    "" if target.best is None else f"{target.best:.3g} {target.unit}",
                )
                for target in self.targets
            ]
            lines += [*_table(("target", "wanted", "measured", "met", "by the best rounds"), targets), ""]
        return "\n".join(lines + [line for note in self.notes for line in (note, "")])


@dataclass
class Report:
    """All groups of one run."""

    device: torch.device
    groups: list[Group] = field(default_factory=list)
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # before the first measurement

    def facts(self) -> dict[str, str]:
        """What the times depend on."""
        cores = os.cpu_count() or 1
        busy = "; busy: look at the best rounds as well" if self.load > 0.5 * cores else ""
        return {**machine(self.device), "load before": f"{self.load:.1f} on {cores} cores{busy}"}

    def compare(self, name: str, methods: dict[str, Method], *, copies: int = 1, seconds: float = 3.0) -> Group:
        """Time `methods` against each other: from CUDA graphs on a GPU (of one for each of `copies` inputs)."""
        group = Group(name)
        if self.device.type == "cuda":
            methods = {name: self._graphed(name, method, copies, group) for name, method in methods.items()}
        group.timings = compare(methods, self.device, seconds)
        self.groups.append(group)
        return group

    def _graphed(self, name: str, method: Method, copies: int, group: Group) -> Method:
        try:
            return graphed(method, copies)
        except RuntimeError as error:  # what synchronises cannot be captured
            group.notes.append(f"{name} is timed without a CUDA graph: {str(error).splitlines()[0]}")
            torch.cuda.synchronize(self.device)
            return method

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        groups = [
            asdict(group) | {"targets": [asdict(target) | {"met": target.met} for target in group.targets]}
            for group in self.groups
        ]
        return {"machine": self.facts(), "groups": groups}

    def markdown(self) -> str:
        """For people."""
        targets = [target for group in self.groups for target in group.targets]
        met = sum(target.met for target in targets)
        lines = [f"# {machine_name(self.device)}", ""]
        lines += _table(("", ""), list(self.facts().items()))
        lines += ["", f"{met} of {len(targets)} targets met.", ""]
        return "\n".join(lines + [group.markdown() for group in self.groups])

    def write(self, path: Path) -> None:
        """Write `path`.json and `path`.md."""
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        Path(f"{path}.md").write_text(self.markdown())


def default_path(device: torch.device) -> Path:
    """bench/results/<machine>, without a suffix."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", machine_name(device).lower()).strip("-")


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
    """Of NVIDIA's driver, or "unknown"."""
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


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
