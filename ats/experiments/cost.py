"""What one sample costs in training: seconds and peak memory, at batch size 1, forward and backward.

Always at the published sizes and with the published networks, whatever a run was shrunk to. The image lies in main
memory as bytes; making the view, reading the patches and moving both to the device are part of the cost.

Memory on a GPU is the peak of PyTorch's allocator. On a CPU it is how far the resident set of a fresh process rises
above what it was before the image and the model were made; this module, run as a program, is that process.
"""

import ctypes
import dataclasses
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ats.experiments.config import ExperimentConfig, ModelConfig, from_dict, to_dict
from ats.experiments.networks import build_model, normalisation, view_size
from ats.experiments.presets import PRESETS
from ats.functional import area_downsample

IMAGE_SIZES = {"megapixel-mnist": (1500, 1500), "colon-cancer": (500, 500), "speed-limits": (960, 1280)}
"""Published, in pixels (height, width)."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds a sample: the median of `steps` steps, and their quartiles."""

    median: float
    lower: float
    upper: float
    steps: int


def published(experiment: str, model: ModelConfig) -> ExperimentConfig:
    """The published configuration of an experiment with a model's method, number of patches and CNN scale."""
    paper = PRESETS[experiment]["paper"]
    chosen = dataclasses.replace(
        paper.model, method=model.method, n_patches=model.n_patches, cnn_scale=model.cnn_scale, grid_chunk=0
    )
    return dataclasses.replace(paper, model=chosen)


def training_step(
    config: ExperimentConfig, device: torch.device | str = "cpu", image_size: tuple[int, int] | None = None
) -> Step:
    """A function that runs one sample forward and backward, from an image in main memory.

    Args:
        config: the experiment and the model.
        device: of the model.
        image_size: pixels (H, W); as published where None.
    """
    device = torch.device(device)
    size = image_size or IMAGE_SIZES[config.experiment]
    pixels = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, config.data.channels, *size), dtype=torch.uint8, generator=pixels)
    if device.type == "cuda":
        image = image.pin_memory()
    label = torch.zeros(1, dtype=torch.int64, device=device)
    model = build_model(config).to(device).train()
    seen = view_size(config, size)
    mean, std = normalisation(config)

    def step() -> None:
        view = image if seen is None else area_downsample(image, seen, mean=mean, std=std).to(device, non_blocking=True)
        logits, sample = model(view, image)
        loss = F.cross_entropy(logits, label)
        if sample is not None:
            loss = loss - config.optim.entropy_weight * sample.entropy.mean()
        model.zero_grad(set_to_none=True)
        loss.backward()

    return step


def measure_seconds(
    configs: Mapping[str, ExperimentConfig],
    device: torch.device | str = "cpu",
    *,
    rounds: int = 7,
    warmup: int = 2,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Timing]:
    """Time the configurations' steps in turns, so that whatever else a machine does falls on all of them alike.

    Args:
        configs: by name.
        device: of the models.
        rounds: turns. In each a method runs once; several times if it takes less than a tenth of a second.
        warmup: steps of each that are not timed.
        image_size: as in `training_step`.
    """
    device = torch.device(device)
    steps = {name: training_step(config, device, image_size) for name, config in configs.items()}
    repeats = {}
    for name, step in steps.items():
        seconds = [_timed(step, device) for _ in range(max(1, warmup))]
        repeats[name] = max(1, min(5, int(0.1 / seconds[-1])))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name] += [_timed(step, device) for _ in range(repeats[name])]
    return {name: _timing(seconds) for name, seconds in taken.items()}


def measure_bytes(
    config: ExperimentConfig, device: torch.device | str = "cpu", *, image_size: tuple[int, int] | None = None
) -> int:
    """The peak memory of a sample, with the model, its gradients and, on a CPU, the image.

    Raises:
        RuntimeError: the process that measures failed, e.g. because memory ran out; says what it wrote.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step = training_step(config, device, image_size)
        step()
        step()  # the first one may try out algorithms
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    order = json.dumps({"config": to_dict(config), "image_size": image_size})
    process = [sys.executable, "-m", "ats.experiments.cost"]
    done = subprocess.run(process, input=order, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {config.model.label} ended with status {done.returncode}: {done.stderr[-500:]}")
    return int(done.stdout.splitlines()[-1])


def _timed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    lower, median, upper = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return Timing(float(median), float(lower), float(upper), len(seconds))


def _rise_of_resident_set(order: str) -> int:
    """Bytes by which this process's resident set rises, at its peak, in a training step."""
    values = json.loads(order)
    config = from_dict(values["config"])
    size = tuple(values["image_size"] or IMAGE_SIZES[config.experiment])
    # A small image first: code that is loaded and buffers that are made once are no cost of a sample.
    small = training_step(config, image_size=(max(64, size[0] // 10), max(64, size[1] // 10)))
    small()
    del small
    gc.collect()
    _return_freed_memory()
    before = _reset_peak()
    step = training_step(config, image_size=(size[0], size[1]))
    step()
    step()
    return _peak() - before


def _return_freed_memory() -> None:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: what was freed may be used again, and is then not counted
        return


def _reset_peak() -> int:
    """Bytes resident now, or the peak so far where the system does not let it be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


if __name__ == "__main__":
    print(_rise_of_resident_set(sys.stdin.read()))
