"""`ats train`: which experiment, by which preset, with which options."""

import argparse
import shlex
from dataclasses import replace

import tyro

from ats.experiments.config import ExperimentConfig
from ats.experiments.console import say
from ats.experiments.options import parse
from ats.experiments.registry import EXPERIMENTS
from ats.experiments.shown_options import shown_for
from ats.experiments.training import train


def run_train(arguments: list[str]) -> None:
    """`ats train EXPERIMENT`: train a model, or go on with a training that stopped."""
    experiment = arguments[0] if arguments else "--help"
    if experiment in ("-h", "--help"):
        print(f"usage: ats train {{{','.join(EXPERIMENTS)}}} [OPTIONS]\n\nats train EXPERIMENT --help lists them.")
        return
    if experiment not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {experiment!r}, expected one of {', '.join(EXPERIMENTS)}")
    # The preset decides what the other options default to, so it is looked for first.
    first = argparse.ArgumentParser(prog=f"ats train {experiment}", add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=ExperimentConfig.preset)
    first.add_argument("--model.method", dest="method", default="")
    found, _ = first.parse_known_args(arguments[1:])
    preset = found.preset
    presets = EXPERIMENTS[experiment].presets
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r} of {experiment}, expected one of {', '.join(presets)}")
    default = presets[preset]
    if found.method not in ("", default.model.method) and default.model.evidence != "none":
        default = replace(default, model=replace(default.model, evidence="none"))  # what only that method can use
    if {"-h", "--help"} & set(arguments):
        default = shown_for(found.method or default.model.method, default)
    config = parse(
        type(default),
        f"ats train {experiment}",
        arguments[1:],
        default=default,
        config=(tyro.conf.AvoidSubcommands,),  # the preset has the experiment's own kind of data
    )
    train(config)
    say(f"Evaluate with: ats evaluate {shlex.quote(str(config.run_folder))}")
