"""`ats study training`: the trainings' figures as JSON, as a Markdown table and as learning curves."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from rich.progress import Progress, TimeRemainingColumn

from ats.experiments.console import plain_console
from ats.experiments.markdown import wrap
from ats.experiments.study.methods import METHODS
from ats.experiments.study.training import CURVE_STEPS, Run, TrainingOptions, check, train
from ats.experiments.study.writing import STYLES, earlier_rows, markdown_table, png, write_study


def study_training(options: TrainingOptions, folder: Path | None) -> list[Run]:
    """Train, print the table and, given a folder, write results/training.json and .md and training.png there.

    The files are written after each training, and trainings that the folder holds already are not done again.
    """
    check(options)
    done: dict[tuple[str, int, int], Run] = {}
    if folder is not None:
        found = (Run(**row) for row in earlier_rows(folder, "training", options))
        done = {(run.formula, run.n_patches, run.seed): run for run in found}
    console = plain_console()
    jobs = [(f, n, seed) for n in options.n_patches for seed in range(options.seeds) for f in options.formulas]
    runs: list[Run] = []
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("training", total=len(jobs) * options.steps)
        for job in jobs:
            formula, n_patches, seed = job
            progress.update(bar, description=f"{METHODS[formula].label}, N = {n_patches}, seed {seed}")
            if job in done:
                progress.advance(bar, options.steps)
            runs.append(done.get(job) or train(options, *job, lambda: progress.advance(bar)))
            if folder is not None:
                write_study(folder, "training", options, [run.to_dict() for run in runs], markdown(runs), plot(runs))
    console.print(wrap(markdown(runs)), soft_wrap=True)
    if folder is not None:
        console.print(f"Written to {folder}", soft_wrap=True)
    return runs


def markdown(runs: Sequence[Run]) -> str:
    """Mean and, over the seeds, standard error of each formula with each number of patches."""
    lines = [["N", "gradient", "test error", "test loss", "training loss", "effective cells", "mass drawn"]]
    for (n, formula), group in _groups(runs).items():
        last = [run.curve[-1] for run in group]
        columns = [[run.test_error for run in group], [run.test_loss for run in group], last]
        lines.append([
            f"{n}",
            METHODS[formula].label,
            *(_mean(values) for values in columns),
            f"{statistics.fmean(run.effective_cells for run in group):.1f}",
            f"{statistics.fmean(run.mass_drawn for run in group):.2f}",
        ])  # fmt: skip
    seeds = len({run.seed for run in runs})
    return (
        f"# Small Megapixel MNIST, by the gradient's formula\n\nWritten by `ats study training`: means over {seeds} "
        "seeds, ± the standard error of the mean. Images, initial weights and order are the same for each formula. "
        f"The training loss is that of the last {CURVE_STEPS} steps; the attention's effective cells, exp(entropy), "
        "and the share of its mass that the draws hold are of the test images.\n\n" + markdown_table(lines) + "\n"
    )


def _groups(runs: Sequence[Run]) -> dict[tuple[int, str], list[Run]]:
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.n_patches, run.formula), []).append(run)
    return groups


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def plot(runs: Sequence[Run]) -> bytes:
    """Learning curves: the mean of the seeds, and each seed thinly; one panel for each number of patches."""
    groups = _groups(runs)
    numbers = sorted({n for n, _ in groups})
    figure, axes = plt.subplots(1, len(numbers), figsize=(4.4 * len(numbers), 4.2), sharey=True, squeeze=False)
    for (n, formula), group in groups.items():
        panel = axes[0, numbers.index(n)]
        steps = [CURVE_STEPS * (i + 0.5) for i in range(len(group[0].curve))]
        color = STYLES[formula]["color"]
        for run in group:
            panel.plot(steps, run.curve, color=color, linewidth=0.5, alpha=0.4)
        mean = [statistics.fmean(values) for values in zip(*(run.curve for run in group), strict=True)]
        marks = {"markersize": 4, "markevery": 3, **STYLES[formula]}
        panel.plot(steps, mean, label=METHODS[formula].label, linewidth=1.6, **marks)
        panel.set_title(f"N = {n}", fontsize=11)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("training loss")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.set_layout_engine("constrained")
    return png(figure)
