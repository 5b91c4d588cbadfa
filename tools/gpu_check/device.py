"""What GPU there is, and how fast it copies: `python -m tools.gpu_check.device FILE` writes it as JSON."""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from ats._files import write_json
from bench.measure import copy_rate
from bench.report import machine, machine_name


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


def main() -> int:
    """Write the device's name, versions, memory and copy rate."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.device", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    reason = missing() if options.device == "cuda" else None
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    device = torch.device(options.device)
    facts = machine(device)
    memory = 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory
        facts["memory"] = f"{memory / 1e9:.1f} GB, {properties.L2_cache_size / 1e6:.0f} MB of L2"
        if torch.version.cuda is not None:
            facts["compute capability"] = f"{properties.major}.{properties.minor}"
    found = {"name": machine_name(device), "machine": facts, "memory": memory}
    write_json(options.file, found | {"bytes_per_second": None})  # the name is known, whatever becomes of the copies
    rate = copy_rate(device)
    facts["large copy"] = f"{rate / 1e9:,.1f} GB/s, read and written"
    write_json(options.file, found | {"bytes_per_second": rate})
    return 0


if __name__ == "__main__":
    sys.exit(main())
