"""How much of a recipe's training step is spent outside its networks: `python -m bench.recipes`.

The steps are those of `ats train` by the presets "quick", with their batches, networks, estimators and draws, but for
what loads images and changes them at random. All take turns in one run. It prints a short table, and writes nothing.
"""

import argparse
import dataclasses
import os
import statistics

import torch

from ats.experiments import cost
from ats.experiments.config import ExperimentConfig
from ats.experiments.registry import EXPERIMENTS
from bench.bench_training_step import ATTENTION, FEATURES, REST, SAMPLING, VIEW, SplitStep, channels_last_model
from bench.bench_training_step import split_steps as split
from bench.render import table

RECIPES = {
    "colon cancer, ATS-10": ("colon-cancer", 10),
    "colon cancer, ATS-50": ("colon-cancer", 50),
    "Megapixel MNIST, ATS-10": ("megapixel-mnist", 10),
    "speed limits, ATS-5": ("speed-limits", 5),
}


def recipe(experiment: str, n_patches: int) -> ExperimentConfig:
    """The preset "quick" with a number of patches."""
    quick = EXPERIMENTS[experiment].presets["quick"]
    return dataclasses.replace(quick, model=dataclasses.replace(quick.model, n_patches=n_patches))


def step_of(config: ExperimentConfig, batch: int | None = None) -> SplitStep:
    """A step of the recipe on random images; features that are taught beforehand stay as they are."""
    model = channels_last_model(config)
    if config.data.taught_patches:
        model.sampling.feature.requires_grad_(False).eval()
    (image,) = cost.random_images(config, batch=batch or config.optim.batch_size)
    return SplitStep(model, config, image, draws=config.optim.draws)


def shares(rounds: int, batch: int | None = None) -> list[tuple[str, ...]]:
    """A row a recipe: batch and draws, milliseconds a step, and the share of each part."""
    steps = {name: step_of(recipe(*which), batch) for name, which in RECIPES.items()}
    rows: list[tuple[str, ...]] = []
    for name, parts in split(steps, rounds).items():
        step = steps[name]
        whole = [sum(seconds) for seconds in zip(*parts.values(), strict=True)]
        share = {
            part: statistics.median(s / all_of_it for s, all_of_it in zip(seconds, whole, strict=True))
            for part, seconds in parts.items()
        }
        outside = statistics.median(
            1 - (attention + features) / all_of_it
            for attention, features, all_of_it in zip(parts[ATTENTION], parts[FEATURES], whole, strict=True)
        )
        settings = f"{len(step.image)} × {step.draws}"
        numbers = [f"{share[part]:.1%}" for part in (SAMPLING, VIEW, REST)]
        rows.append((name, settings, f"{1000 * statistics.median(whole):.0f}", f"{outside:.1%}", *numbers))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="of each recipe, after one that is not counted")
    parser.add_argument("--batch", type=int, help="images a step, in place of the recipe's own")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, medians of {options.rounds} steps")
    header = ("recipe", "images × draws", "ms a step", "outside the networks", SAMPLING, VIEW, REST)
    print("\n".join(table(header, shares(options.rounds, options.batch))))


if __name__ == "__main__":
    main()
