"""Nested attention on Gigapixel MNIST beside what could take its place: trains each, evaluates it, writes a table.

    python -m bench.gigapixel_mnist --output docs/results/gigapixel-mnist             # the preset demo
    python -m bench.gigapixel_mnist --compare --minutes 10 --output docs/results/gigapixel-mnist-flat

`--compare` trains nested attention and flat attention on a view of 1/8, which shows digits, for equally long at several
sizes. Runs are kept in --runs and go on where they stopped; complete ones are not trained again. Both write a .json and
a .md.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ats._files import write_json, write_whole
from ats.experiments.config import ExperimentConfig
from ats.experiments.environment import hardware
from ats.experiments.evaluation import evaluate
from ats.experiments.lightning_module import ClassificationTask
from ats.experiments.registry import EXPERIMENTS, experiment_data
from ats.experiments.trained import load
from ats.experiments.training import train

Make = Callable[[ExperimentConfig], ExperimentConfig]

FINE = "8:20:4"
"""Flat attention, as one level, on a view that shows digits."""


def _model(**changes: Any) -> Make:
    return lambda config: replace(config, model=replace(config.model, **changes))


METHODS: dict[str, Make] = {
    "nested": lambda config: config,
    "flat": _model(levels=()),
    "uniform": _model(levels=(), method="uniform"),
    "oracle": lambda config: replace(config, data=replace(config.data, oracle=True)),
    "flat at 1/8": _model(levels=(FINE,)),
}
"""What a method makes of a preset. All draw as many patches."""

SAID = {
    "nested": "attention on a view of 1/128 draws 10 regions, attention on each at 1/8 draws 2 patches",
    "flat": "attention on the view of 1/128 alone draws 20 patches",
    "uniform": "20 patches from anywhere",
    "oracle": "nested attention that is told where the places with digits are",
    "flat at 1/8": "attention on a view of 1/8 of the whole image draws 20 patches",
}


def _data(config: ExperimentConfig) -> Any:
    """The options of the data, which are Gigapixel MNIST's."""
    return config.data


def sized(config: ExperimentConfig, size: int) -> ExperimentConfig:
    """The same on images of another size."""
    return replace(config, data=dataclasses.replace(_data(config), image_size=size))


def shortened(config: ExperimentConfig, epochs: int) -> ExperimentConfig:
    """The same with fewer epochs, or more, its curriculum in proportion."""
    share, data = epochs / config.optim.epochs, _data(config)
    clear, rising = round(share * data.clear_epochs), round(share * data.rising_epochs)
    data = dataclasses.replace(data, clear_epochs=clear, rising_epochs=rising)
    return replace(config, data=data, optim=replace(config.optim, epochs=max(epochs, clear + rising + 1)))


def seconds_an_image(config: ExperimentConfig, steps: int = 4) -> float:
    """What training takes an image, reading it included, after a step to warm up."""
    task, data, epoch = ClassificationTask(config), experiment_data(config), config.optim.epochs
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-9)
    started = 0.0
    for step in range(steps + 1):
        if step == 1:
            started = time.perf_counter()
        indices = torch.arange(step * config.optim.batch_size, (step + 1) * config.optim.batch_size)
        view, image, label = data.load("train", indices % len(data.labels("train")), epoch)
        logits, sample = task.model(view, image)
        assert sample is not None
        (task.loss(logits, label) - 1e-3 * sample.entropy.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / (steps * config.optim.batch_size)


def rows_of(name: str, config: ExperimentConfig, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train a run, or find it trained; evaluate it on its test images, and as the options ask besides."""
    checkpoint = train(config)
    summary = json.loads((config.run_folder / "training.json").read_text())
    trained, data = load(checkpoint), _data(config)
    ways: list[tuple[int, tuple[int, ...] | None]] = [(data.image_size, None)]
    if name == "nested":
        ways += [(data.image_size, tuple(map(int, draws.split("x")))) for draws in options.draws]
        ways += [(size, None) for size in options.test_sizes]
    for size, draws in ways:
        tested = dataclasses.replace(trained, config=sized(config, size))
        found = evaluate(tested, n_patches=draws, repeats=options.repeats)
        yield {
            "method": name,
            "seed": config.seed,
            "image_size": data.image_size,
            "test_image_size": size,
            "place_noise": data.place_noise,
            "images_trained_on": summary["steps"] * config.optim.batch_size,
            "minutes": summary["seconds"] / 60,
            **{key: value for key, value in found.to_dict().items() if key not in ("data", "method")},
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: a line a method and size, means over seeds and, of several, from the least to the most."""
    lines = [
        "| | trained on | tested on | patches | seeds | error, one draw | five draws averaged | images | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, int, int, float], list[dict[str, Any]]] = {}
    for one in rows:
        key = one["method"], one["image_size"], one["test_image_size"], one["n_patches"]
        groups.setdefault(key, []).append(one)
    for (name, size, tested, n_patches), some in groups.items():
        errors, averaged = [one["error"] for one in some], [one["averaged_error"] for one in some]
        images = sum(one["images_trained_on"] for one in some) / len(some)
        minutes = sum(one["minutes"] for one in some) / len(some)
        lines.append(
            f"| {name} | {size:,}² | {tested:,}² | {n_patches:.3g} | {len(some)} | {_spread(errors)} | "
            f"{_spread(averaged)} | {images:,.0f} | {minutes:.1f} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def page(rows: Sequence[dict[str, Any]], command: str) -> str:
    """What is written as Markdown."""
    said = "\n".join(f"- {name}: {SAID[name]}." for name in dict.fromkeys(one["method"] for one in rows))
    about = (
        f"{rows[0]['images']} test images of test digits, ten classes; {rows[0]['place_noise']} noise glyphs a place. "
        "Training times are those of this machine."
    )
    return f"# Gigapixel MNIST\n\n{table(rows)}\n\n{said}\n\n{about}\n\n    {command}\n"


def runs(options: argparse.Namespace) -> list[tuple[str, ExperimentConfig]]:
    """What is trained, method by method."""
    base = EXPERIMENTS["gigapixel-mnist"].presets[options.preset]
    names = options.methods or (
        ["nested", "flat at 1/8"] if options.compare else ["nested", "flat", "uniform", "oracle"]
    )
    sizes = options.sizes or ([2048, 4096, 8192] if options.compare else [_data(base).image_size])
    found = []
    for size in sizes:
        for name in names:
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                config = METHODS[name](replace(sized(base, size), seed=seed))
                if options.epochs:
                    config = shortened(config, options.epochs)
                if options.test_images:
                    config = replace(config, data=config.data.with_test_images(options.test_images))
                folder = f"{size}-{name.replace(' ', '-').replace('/', '-')}-seed-{seed}"
                found.append((name, replace(config, output=Path(options.runs) / folder)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="without an ending")
    parser.add_argument("--runs", type=Path, default=Path("runs/gigapixel-mnist"))
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[])
    parser.add_argument("--sizes", nargs="*", type=int, default=[], help="pixels a side")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=0, help="the preset's where 0")
    parser.add_argument("--test-images", type=int, default=0, help="the preset's where 0")
    parser.add_argument("--test-sizes", nargs="*", type=int, default=[], help="test nested runs on these as well")
    parser.add_argument("--draws", nargs="*", default=[], help="test nested runs with these as well, as 10x3")
    parser.add_argument("--repeats", type=int, default=5, help="draws a test image")
    parser.add_argument("--compare", action="store_true", help="nested and flat attention in equal time")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training a run, with --compare")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name, config in runs(options):
        if options.compare:
            recorded = config.run_folder / "config.json"
            epochs = (
                json.loads(recorded.read_text())["optim"]["epochs"]  # of the run that goes on
                if recorded.exists()
                else max(3, round(60 * options.minutes / seconds_an_image(config) / len_of_epoch(config)))
            )
            config = shortened(config, epochs)
        for row in rows_of(name, config, options):
            rows.append(row)
            print(table(rows), flush=True)
            write_json(options.output.with_suffix(".json"), {"hardware": hardware(), "rows": rows})
            command = f"python -m bench.gigapixel_mnist{' --compare' if options.compare else ''}"
            write_whole(options.output.with_suffix(".md"), page(rows, command).encode())


def len_of_epoch(config: ExperimentConfig) -> int:
    """Images an epoch trains on."""
    count, batch = int(_data(config).train_images), config.optim.batch_size
    return count - count % batch if count > batch else count


if __name__ == "__main__":
    main()
