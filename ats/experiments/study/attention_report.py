"""`ats study attention`: what was measured of runs, as a table and as a file."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress, TimeRemainingColumn

from ats._files import write_whole
from ats.experiments.console import plain_console, printable
from ats.experiments.evaluation import evaluate, held_out_data
from ats.experiments.experiment import ExperimentData
from ats.experiments.inputs import on_device
from ats.experiments.markdown import wrap
from ats.experiments.study.attention import AttentionFigures, AttentionOptions, check_knows, map_figures, set_patches
from ats.experiments.study.attention_gradient import attention_parameters, batch_gradients, gradient_signal
from ats.experiments.study.writing import markdown_table, plain
from ats.experiments.trained import TrainedModel, load
from ats.models.classifier import SamplingClassifier


def study_attention(
    runs: Sequence[Path], options: AttentionOptions, folder: Path | None, output: Path | None, device: str = "cpu"
) -> list[AttentionFigures]:
    """Measure, print the table and, given a file, write it there: JSON or Markdown, by its ending.

    Raises:
        ValueError: no run; one whose data have no ground truth, or without attention; a file of another kind.
        FileExistsError: the file is there.
    """
    if not runs:
        raise ValueError("name at least one run's folder, or a checkpoint, that `ats train` wrote")
    _check_output(output)
    loaded = [on_device(load(run), device) for run in runs]
    data = [held_out_data(trained, options.images, folder) for trained in loaded]
    for trained, held_out in zip(loaded, data, strict=True):
        check_knows(trained, held_out)
    found = [measure(*both, options) for both in zip(loaded, data, strict=True)]
    sources = [
        f"{printable(run)}: {figures.images} test images of {held_out.source}, {trained.config.model.label}"
        for run, trained, held_out, figures in zip(runs, loaded, data, found, strict=True)
    ]
    text = markdown(sources, found)
    plain_console().print(wrap(text), soft_wrap=True)
    if output is not None:
        described = [
            {"run": str(run), "experiment": trained.config.experiment, "data": held_out.source}
            | {"model": trained.config.model.label, "figures": figures.to_dict()}
            for run, trained, held_out, figures in zip(runs, loaded, data, found, strict=True)
        ]
        values = {"command": "ats study attention", "options": plain(options), "runs": described}
        content = json.dumps(values, indent=1) + "\n" if output.suffix == ".json" else wrap(text)
        write_whole(output, content.encode("utf-8", "backslashreplace"), overwrite=False)
    return found


def measure(trained: TrainedModel, data: ExperimentData, options: AttentionOptions) -> AttentionFigures:
    """All figures of one run."""
    n_patches = set_patches(trained.model, options.n_patches, trained.config.model.n_patches)
    images = len(data.labels("test")) if options.images is None else options.images
    with _Bar("looking at images", images) as advance:
        figures = map_figures(trained, data, options, n_patches, advance)
    evaluated = evaluate(trained, images=options.images, seed=options.seed, data=data)
    more: dict[str, Any] = {"error": evaluated.error}
    unknown = dict(figures.unknown)
    if reason := _no_gradient(trained, options):
        unknown["signal_to_noise"] = reason
    else:
        with _Bar("comparing gradients", options.batches) as advance:
            how = {"batches": options.batches, "copies": options.copies, "seed": options.seed}
            signal = gradient_signal(batch_gradients(trained, data, **how, advance=advance))
        if signal is None:
            unknown["signal_to_noise"] = "the gradient is the same for every batch and draw: 0, or all is saturated"
        else:
            more |= {"signal_to_noise": signal.ratio, "signal_by_chance": signal.by_chance}
            more |= {"noise_of_draws": signal.of_draws}
    return dataclasses.replace(figures, **more, unknown=unknown)


def _no_gradient(trained: TrainedModel, options: AttentionOptions) -> str:
    """Why the gradient is not measured; empty: it is."""
    if not options.batches:
        return "left out by --batches 0"
    if not isinstance(trained.model, SamplingClassifier):
        return f"{trained.config.model.label} reads every patch: its gradient has no luck of the draw"
    return "" if attention_parameters(trained) else f"the attention of {trained.config.model.label} learns nothing"


def markdown(runs: Sequence[str], found: Sequence[AttentionFigures]) -> str:
    """The figures, a column a run, and why some are missing."""
    rows = [["", *(f"run {number}" for number in range(1, len(found) + 1))]] if len(found) > 1 else [["", "run"]]
    rows += [[label, *(show(figures) for figures in found)] for label, show in _ROWS]
    missing = [
        f"- {_NAMES[name]}: not measured of run {number}, {reason}"
        for number, figures in enumerate(found, 1)
        for name, reason in figures.unknown.items()
    ]
    return "\n\n".join([
        "# Attention that ranks",
        "Written by `ats study attention`; docs/study-attention.md says how to read it.",
        "\n".join(f"{number}. {run}" for number, run in enumerate(runs, 1)),
        markdown_table(rows),
        *(["\n".join(missing)] if missing else []),
    ]) + "\n"  # fmt: skip


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.suffix not in (".json", ".md"):
        raise ValueError(f"--output {output} must be a file that ends in .json or .md")
    if output.exists():
        raise FileExistsError(f"{output} is there already; name another file with --output")


class _Bar:
    """A bar of `total` steps on the terminal, which calling what it is entered as moves on by one."""

    def __init__(self, text: str, total: int) -> None:
        # Where there is no terminal, all that is left of a bar is empty lines.
        console = plain_console(stderr=True)
        columns = *Progress.get_default_columns(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(text, total=total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _of(figures: AttentionFigures, name: str, digits: int = 3) -> str:
    return _number(getattr(figures, name), digits)


def _plain_row(name: str, digits: int = 3) -> Callable[[AttentionFigures], str]:
    return lambda figures: _of(figures, name, digits)


def _targets(figures: AttentionFigures, name: str) -> str:
    value = getattr(figures, name)
    return "–" if value is None else f"{value:.2f} of {figures.targets:.3g}"


def _signal(figures: AttentionFigures) -> str:
    if figures.signal_to_noise is None:
        return "–"
    return f"{figures.signal_to_noise:.2g} ± {figures.signal_by_chance:.1g}"


def _two(name: str) -> Callable[[AttentionFigures], str]:
    """A figure of all cells, and of those on target."""

    def show(figures: AttentionFigures) -> str:
        if getattr(figures, name) is None:
            return _number(None)
        return ", ".join(_of(figures, each, 2) for each in (name, f"{name}_on_target"))

    return show


_ROWS: tuple[tuple[str, Callable[[AttentionFigures], str]], ...] = (
    ("AUC of cells on target", _plain_row("auc")),
    ("AUC of targets against the rest", _plain_row("auc_of_targets")),
    ("attention on target", _plain_row("mass")),
    ("of it, were it uniform", _plain_row("uniform_mass")),
    ("patches a draw, N", lambda figures: f"{figures.n_patches}"),
    ("of the N best cells, on target", _plain_row("best_on_target", 2)),
    ("targets among the N best findings", lambda figures: _targets(figures, "targets_among_best")),
    ("different targets in a draw", lambda figures: _targets(figures, "targets_drawn")),
    ("drawn patches on target", _plain_row("drawn_on_target")),
    ("error with perfect features", _plain_row("oracle_error")),
    ("error of the model, one draw", _plain_row("error")),
    ("gradient: signal to noise", _signal),
    ("of the noise, from the draws", _plain_row("noise_of_draws", 2)),
    (
        "cells beyond 0.9 of the bound: all, on target",
        _two("saturated"),
    ),
    (
        "mean derivative of the bound: all, on target",
        _two("derivative"),
    ),
    ("entropy, nats", _plain_row("entropy", 2)),
    ("entropy of the largest", _plain_row("relative_entropy")),
)
_NAMES = {
    "bound": "saturation",
    "oracle_error": "draws and the error with perfect features",
    "signal_to_noise": "the gradient's signal to noise",
}
