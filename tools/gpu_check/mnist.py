"""Train Megapixel MNIST's `quick` for a given time, in a plain loop, with what torch and the package bring.

The recipe is the preset's, squeezed into the time there is: its share of smaller images, its learning rate and entropy
weight follow the time that has passed in place of the epochs. Digits are the bundled ones. So the error says that
training works on this device, not what the preset reaches.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ats._files import write_json
from ats.experiments.build import build_model
from ats.experiments.config import ExperimentConfig
from ats.experiments.experiment import ExperimentData
from ats.experiments.megapixel_mnist import PRESETS, MegapixelMNISTConfig, MegapixelMNISTData
from ats.experiments.schedule import bound_factor, entropy_weight, learning_rate_factor
from ats.models import EvidenceClassifier
from ats.models.classifier import SoftBound
from bench.measure import synchronise

IMAGES, TEST_IMAGES = 2000, 512
_FOR_TESTING = 0.85  # of the time is over then
_WINDOW = 10  # steps that are timed together
_PER_MILLE = 1000


def squeezed(images: int = IMAGES, test_images: int = TEST_IMAGES, image_size: int = 1500) -> ExperimentConfig:
    """The preset with bundled digits, and as many images of each size as are quickly made."""
    quick = PRESETS["quick"]
    assert isinstance(quick.data, MegapixelMNISTConfig)
    options = dataclasses.replace(
        quick.data,
        digits="bundled",
        train_images=images,
        test_images=test_images,
        image_size=image_size,
        small_epochs=1,
        medium_epochs=1,
    )
    return dataclasses.replace(quick, data=options)


def kind_of_images(progress: float) -> int:
    """0: small, 1: medium, 2: of full size, where the preset has any; as it has them by its epochs."""
    quick, options = PRESETS["quick"], PRESETS["quick"].data
    assert isinstance(options, MegapixelMNISTConfig)
    epoch = int(progress * quick.optim.epochs)
    return 0 if epoch < options.small_epochs else 1 if epoch < options.small_epochs + options.medium_epochs else 2


def train(
    config: ExperimentConfig,
    device: torch.device,
    seconds: float,
    write: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Train for `seconds`, the last of them testing; what was found, which is also written now and then.

    Args:
        config: as from `squeezed`.
        device: to train on.
        seconds: in all, with making the images.
        write: is given what has been found so far.
        clock: seconds.
    """
    start = clock()
    torch.manual_seed(config.seed)
    data: ExperimentData[MegapixelMNISTConfig] = MegapixelMNISTData(config)
    model = build_model(config).to(device).train()
    bounds = [layer for layer in model.modules() if isinstance(layer, SoftBound)]
    optim = config.optim
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay)
    count, batch = len(data.labels("train")), optim.batch_size
    found: dict[str, Any] = {"steps": 0, "images": 0, "ms a step": {}, "training error": None, "test error": None}
    windows: dict[int, list[float]] = {0: [], 1: [], 2: []}
    generator = torch.Generator().manual_seed(config.seed)
    while (progress := (clock() - start) / (_FOR_TESTING * seconds)) < 1 or not found["steps"]:
        kind = kind_of_images(min(progress, 0.999))
        data.examples("train", torch.zeros(1, dtype=torch.int64, device=device), kind)  # makes them, untimed
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        synchronise(device)
        began = clock()
        for _ in range(_WINDOW):
            at = int(_PER_MILLE * min(0.999, (clock() - start) / (_FOR_TESTING * seconds)))
            for group in optimizer.param_groups:
                group["lr"] = optim.learning_rate * learning_rate_factor(at, _PER_MILLE, optim)
            for bound in bounds:
                bound.widen(bound_factor(at, _PER_MILLE, optim))
            indices = torch.randint(count, (batch,), generator=generator).to(device)
            view, image, label = data.load("train", indices, kind)
            evidence: torch.Tensor | float = 0.0
            if isinstance(model, EvidenceClassifier):
                logits, sample, evidence = model.teach(view, image, label)
            else:
                logits, sample = model(view, image)
            wrong += (logits.argmax(-1) != label).sum()
            loss = F.cross_entropy(logits, label) - entropy_weight(at, _PER_MILLE, optim) * sample.entropy.mean()
            optimizer.zero_grad(set_to_none=True)
            (loss + evidence).backward()
            nn.utils.clip_grad_norm_(model.parameters(), optim.gradient_clip)
            optimizer.step()
        synchronise(device)
        windows[kind].append((clock() - began) / _WINDOW)
        found["steps"] += _WINDOW
        found["images"] += _WINDOW * batch
        found["training error"] = float(wrong) / (_WINDOW * batch)
        found["bound"] = max((float(bound.limit) for bound in bounds), default=None)
        found["finite"] = bool(torch.isfinite(loss))
        found["ms a step"] = {
            name: 1e3 * statistics.median(values[1:] or values)  # the first compiles
            for name, values in zip(("small", "medium", "full size"), windows.values(), strict=True)
            if values
        }
        write(found)
    found["test error"], found["tested on"] = error_on_test_images(
        model, data, device, late=lambda: clock() > start + seconds
    )
    write(found)
    return found


def error_on_test_images(
    model: nn.Module,
    data: ExperimentData[MegapixelMNISTConfig],
    device: torch.device,
    late: Callable[[], bool],
) -> tuple[float, int]:
    """The error on test images of full size, and on how many: as many as there is time for."""
    model.eval()
    wrong = seen = 0
    with torch.no_grad():
        for indices in torch.arange(len(data.labels("test"))).split(data.config.optim.batch_size):
            if seen and late():
                break
            view, image, label = data.load("test", indices.to(device))
            wrong += int((model(view, image)[0].argmax(-1) != label).sum())
            seen += len(label)
    return wrong / seen, seen


def main() -> int:
    """Train, and write what was found as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.mnist", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON to write")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, default=IMAGES, help="training images of each size")
    parser.add_argument("--image-size", type=int, default=1500, help="pixels a side")
    options = parser.parse_args()
    config = squeezed(options.images, min(TEST_IMAGES, options.images), options.image_size)
    found = train(config, torch.device(options.device), options.seconds, lambda found: write_json(options.file, found))
    print(found)
    return 0 if found["finite"] else 1


if __name__ == "__main__":
    sys.exit(main())
