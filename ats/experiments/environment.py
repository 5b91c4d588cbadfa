"""What a process runs on, for reports."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ats.version import __version__


def hardware() -> dict[str, Any]:
    """Processor, cores, threads of PyTorch, and GPUs."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str]:
    """Versions of this package and of what decides its speed and its results."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "lightning", "numpy")}
    return {"torch-ats": __version__, "python": platform.python_version()} | others


def describe(machine: dict[str, Any]) -> str:
    """`hardware` in words."""
    return ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
