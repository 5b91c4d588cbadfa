"""What the benchmarks found: tables of times, targets beside what was measured, and the machine they ran on."""

import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.measure import Method, Timing, compare, graphed

RESULTS = Path(__file__).parent / "results"
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"  # glibc's; docs/kernels.md says what they do


@dataclass(frozen=True)
class Target:
    """One claim: `measured` must be at least, or at most, `limit`."""

    what: str
    at_least: bool
    limit: float
    measured: float
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

    def ratio(self, slow: str, fast: str) -> float:
        """How many times the median of `fast` is in that of `slow`."""
        return self.timings[slow].median / self.timings[fast].median

    def at_least(self, limit: float, measured: float, what: str, unit: str = "×") -> None:
        """Add the target that `measured` is `limit` or more."""
        self.targets.append(Target(what, True, limit, measured, unit))

    def at_most(self, limit: float, measured: float, what: str, unit: str = "×") -> None:
        """Add the target that `measured` is `limit` or less."""
        self.targets.append(Target(what, False, limit, measured, unit))

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
                )
                for target in self.targets
            ]
            lines += [*_table(("target", "wanted", "measured", "met"), targets), ""]
        return "\n".join(lines + [line for note in self.notes for line in (note, "")])


@dataclass
class Report:
    """All groups of one run."""

    device: torch.device
    groups: list[Group] = field(default_factory=list)

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
        return {"machine": machine(self.device), "groups": groups}

    def markdown(self) -> str:
        """For people."""
        targets = [target for group in self.groups for target in group.targets]
        met = sum(target.met for target in targets)
        lines = [f"# {machine_name(self.device)}", ""]
        lines += _table(("", ""), list(machine(self.device).items()))
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
        "threads": str(torch.get_num_threads()),
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


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
