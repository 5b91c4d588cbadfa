"""What one sample costs in training: seconds and peak memory, by default at batch size 1, forward and backward.

Always at the published sizes and with the published networks, whatever a run was shrunk to. The image lies in main
memory as bytes; making the view, reading the patches and moving both to the device are part of the cost.

Memory on a GPU is the peak of PyTorch's allocator. On a CPU it is how far the resident set of a fresh process rises
above what it was before the image and the model were made.
"""

import ctypes
import dataclasses
import gc
import itertools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.experiments.build import build_model, make_view, view_size
from ats.experiments.config import ExperimentConfig, ModelConfig
from ats.experiments.registry import EXPERIMENTS
from ats.models import EvidenceClassifier

_BLOCK = 2**24  # random bytes, repeated in images of more
_SLOW = 1.0  # seconds

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
    paper = EXPERIMENTS[experiment].presets["paper"]
    chosen = dataclasses.replace(
        paper.model, method=model.method, n_patches=model.n_patches, cnn_scale=model.cnn_scale, grid_chunk=0
    )
    return dataclasses.replace(paper, model=chosen)


def random_images(
    config: ExperimentConfig, image_size: tuple[int, int] | None = None, *, batch: int = 1, copies: int = 1
) -> list[Tensor]:
    """Batches (batch, C, H, W) of random bytes in main memory, the same whenever they are asked for.

    Args:
        config: the experiment.
        image_size: pixels (H, W); as published where None.
        batch: images a batch.
        copies: batches.
    """
    height, width = image_size or EXPERIMENTS[config.experiment].image_size
    pixels = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(copies):
        images = torch.empty(batch, config.data.channels, height, width, dtype=torch.uint8, device="cpu")
        block = torch.randint(256, (min(images.numel(), _BLOCK),), dtype=torch.uint8, generator=pixels, device="cpu")
        for part in images.view(-1).split(_BLOCK):
            part.copy_(block[: len(part)])
        batches.append(images)
    return batches


def training_step(
    config: ExperimentConfig,
    device: torch.device | str = "cpu",
    image_size: tuple[int, int] | None = None,
    *,
    images: Sequence[Tensor] | None = None,
    views: Sequence[Tensor] | None = None,
) -> Step:
    """A function that runs one batch forward and backward, from images in main memory.

    Models with the same feature network start with the same weights in it.

    Args:
        config: the experiment and the model.
        device: of the model.
        image_size: pixels (H, W); as published where None.
        images: batches that are taken in turn; one random image where None.
        views: of the batches, on the device; where None each step makes its own.
    """
    device = torch.device(device)
    if images is None:
        images = random_images(config, image_size)
    if device.type == "cuda":
        images = [batch if batch.is_pinned() else batch.pin_memory() for batch in images]
    label = torch.zeros(len(images[0]), dtype=torch.int64, device=device)
    model = _seeded_model(config).to(device).train()
    given: Sequence[Tensor | None] = [None] * len(images) if views is None else views
    turns = itertools.cycle(zip(images, given, strict=True))

    def step() -> None:
        image, view = next(turns)
        seen = view_on(device, config, image) if view is None else view
        if isinstance(model, EvidenceClassifier):
            logits, sample, loss = model.teach(seen, image, label)
            loss = loss + F.cross_entropy(logits, label)
        else:
            logits, sample = model(seen, image)
            loss = F.cross_entropy(logits, label)
        if sample is not None:
            loss = loss - config.optim.entropy_weight * sample.entropy.mean()
        model.zero_grad(set_to_none=True)
        loss.backward()

    return step


def view_on(device: torch.device | str, config: ExperimentConfig, image: Tensor) -> Tensor:
    """What a model on a device looks at of images in main memory: the view, there, or the images themselves."""
    view = make_view(config, image)
    return image if view is image else view.to(device, non_blocking=True)


def _seeded_model(config: ExperimentConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build_model(config)
        torch.manual_seed(0)  # the feature network comes after others in some of the models
        feature: nn.Module | None = getattr(getattr(model, "sampling", model), "feature", None)
        for module in () if feature is None else feature.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
    return model


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
    config: ExperimentConfig,
    device: torch.device | str = "cpu",
    *,
    image_size: tuple[int, int] | None = None,
    batch: int = 1,
    given: bool = False,
) -> int:
    """The peak memory of a step, with the model, its gradients and, on a CPU, the images.

    Args:
        config: the experiment and the model.
        device: of the model.
        image_size: as in `training_step`.
        batch: images.
        given: leave the images, which on a GPU never count, and the making of their view out of it.

    Raises:
        RuntimeError: the process that measures failed, e.g. because memory ran out; says what it wrote.
    """
    device = torch.device(device)
    size = image_size or EXPERIMENTS[config.experiment].image_size
    warm = None if given else (config, device, (max(64, size[0] // 10), max(64, size[1] // 10)), 1, False)
    return measure_rise(_prepare, (config, device, size, batch, given), device, warm=warm, what=config.model.label)


def measure_rise(
    prepare: Callable[..., Callable[[], Step]],
    arguments: tuple[Any, ...],
    device: torch.device | str = "cpu",
    *,
    warm: tuple[Any, ...] | None = None,
    what: str = "a step",
) -> int:
    """The peak memory of a step beyond what was there before it was made.

    Args:
        prepare: a function of a module, called with `arguments`: makes what does not count, and returns a function that
            makes what does, a step with its model, which is then run.
        arguments: of `prepare`, which pickle.
        device: of the model. On a CPU this happens in a fresh process, on a GPU in this one.
        warm: other arguments, of a step that is run once before: loaded code is no cost of a sample. None: the same.
        what: is measured, for the message.

    Raises:
        RuntimeError: the process that measures failed, e.g. because memory ran out; says what it wrote.
    """
    device = torch.device(device)
    if device.type == "cuda":
        make = prepare(*arguments)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step = make()
        step()
        step()  # the first one may try out algorithms
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Forked from a server that has imported all this and done nothing with it, where the system can fork.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rise, args=(sender, prepare, arguments, warm))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        answer = f"its process ended with status {process.exitcode}; -9 is what the system does where memory runs out"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"measuring {what} failed: {answer}")
    return int(answer)


def _prepare(
    config: ExperimentConfig, device: torch.device, size: tuple[int, int], batch: int, given: bool
) -> Callable[[], Step]:
    """What makes a step: from images, and views where they are given, that do not count; on a CPU images else do."""
    if device.type == "cpu" and not given:
        return lambda: training_step(config, images=random_images(config, size, batch=batch))
    images, views = random_images(config, size, batch=batch), None
    if given and device.type == "cuda":
        views = [view_on(device, config, image) for image in images]
    elif given:  # any values will do; making them would leave its traces in the allocator
        seen = view_size(config, size)
        views = None if seen is None else [torch.rand(batch, config.data.channels, *seen, device="cpu")]
    return lambda: training_step(config, device, images=images, views=views)


def _timed(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    lower, median, upper = torch.tensor(seconds, dtype=torch.float64, device="cpu").quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device="cpu")
    )
    return Timing(float(median), float(lower), float(upper), len(seconds))


def _send_rise(
    sender: Connection,
    prepare: Callable[..., Callable[[], Step]],
    arguments: tuple[Any, ...],
    warm: tuple[Any, ...] | None,
) -> None:
    try:
        sender.send(_rise_of_resident_set(prepare, arguments, warm))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _rise_of_resident_set(
    prepare: Callable[..., Callable[[], Step]], arguments: tuple[Any, ...], warm: tuple[Any, ...] | None
) -> int:
    """Bytes by which this process's resident set rises, at its peak, in a training step."""
    _return_what_is_freed()
    make = prepare(*arguments)
    # Once before, on something small if it is given: loaded code and what is made once are no cost of a sample.
    (make if warm is None else prepare(*warm))()()
    gc.collect()
    before = _reset_peak()
    step = make()
    if _timed(step, torch.device("cpu")) < _SLOW:
        step()  # with the gradients of the first; beside the maps of a slow step they are nothing
    return _peak() - before


def _return_what_is_freed() -> None:
    """Give every block of 64 KiB and more pages of its own: what is resident then follows what is alive.

    By itself glibc keeps larger and larger blocks the more of them were freed, and a peak depends on what ran before.
    """
    try:
        ctypes.CDLL("libc.so.6").mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD
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
