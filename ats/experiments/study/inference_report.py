"""`ats study inference`: errors by patches read, and what the stated intervals cover, as JSON and Markdown tables."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress, TimeRemainingColumn

from ats.experiments.console import plain_console
from ats.experiments.markdown import wrap
from ats.experiments.study.inference import InferenceOptions, Measurement, Model, Row, check, measure, read_model, ways
from ats.experiments.study.writing import earlier_rows, markdown_table, write_study

_LABELS = {
    "full": "full model",
    "ordered": "ordered estimate, fixed",
    "unordered": "unordered estimate, fixed",
    "topk": "most probable, fixed",
    "lead": "anytime, lead {:g}",
    "tolerance": "anytime, tolerance {:g}",
}


def study_inference(
    checkpoints: Sequence[Path], options: InferenceOptions, data: Path | None, folder: Path | None
) -> list[Row]:
    """Measure, print the tables and, given a folder, write results/inference.json and .md there.

    The files are written after each model, and models that the folder holds already are not measured again.
    """
    check(options)
    if not checkpoints:
        raise ValueError("name at least one checkpoint, or run's folder, that `ats train` wrote")
    loaded = [read_model(checkpoint) for checkpoint in checkpoints]
    measurement = Measurement(options, tuple(model for model, _ in loaded))
    rows: list[Row] = []
    if folder is not None:
        rows = [Row(**row) for row in earlier_rows(folder, "inference", measurement)]
    console = plain_console()
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(loaded))
        for number, (model, trained) in enumerate(loaded, start=1):
            progress.update(bar, description=escape(model.checkpoint))
            if any(row.model == number for row in rows):
                progress.advance(bar)
                continue
            rows += measure(number, trained, options, data, lambda share: progress.advance(bar, share))
            if folder is not None:
                plain_rows = [row.to_dict() for row in rows]
                write_study(folder, "inference", measurement, plain_rows, markdown(measurement, rows))
    console.print(wrap(markdown(measurement, rows)), soft_wrap=True)
    if folder is not None:
        console.print(f"Written to {folder}", soft_wrap=True)
    return rows


def markdown(measurement: Measurement, rows: Sequence[Row]) -> str:
    """Errors and coverage of each way to predict, the models beside each other."""
    options = measurement.inference
    done = [number for number in range(1, len(measurement.models) + 1) if any(row.model == number for row in rows)]
    by_way = {way: [row for row in rows if (row.way, row.value) == way] for way in ways(options)}
    errors = [["", "patches", *(f"error, model {number}" for number in done), "another class"]]
    for way, group in by_way.items():
        patches = _list([row.patches for row in group], "{:.3g}".format)
        other = _list([row.other_class for row in group], "{:.3f}".format)
        errors.append([_label(*way), patches, *(_error(row) for row in group), other])
    names = [f"{confidence:g}" for confidence in options.confidence]
    coverage = [["", *(f"{float(name):.0%} interval" for name in names)]]
    for way, group in by_way.items():
        if group[0].coverage:
            label = f"{_label(*way)}, {way[1]:g}" if way[0] == "unordered" else _label(*way)
            coverage.append([label, *(_list([row.coverage[name] for row in group], "{:.3f}".format) for name in names)])
    models = [f"{number}. {_name(measurement.models[number - 1])}" for number in done]
    return "\n\n".join([
        "# Ways to predict with a trained model",
        "Written by `ats study inference`, of images that the models were not trained on:",
        "\n".join(models),
        f"Means of {options.draws} draws of every image, ± their standard deviation; `patches` are means too. The last "
        "column is the share of images that get another class than the full model gives them.",
        markdown_table(errors),
        "The share of the full model's class logits that lie in the stated interval:",
        markdown_table(coverage),
    ]) + "\n"  # fmt: skip


def _label(way: str, value: float) -> str:
    return _LABELS[way].format(value)


def _name(model: Model) -> str:
    return f"{model.experiment}, preset {model.preset}, {model.method}, seed {model.seed}: `{model.checkpoint}`"


def _error(row: Row) -> str:
    return f"{row.error:.3f}" if row.way in ("full", "topk") else f"{row.error:.3f} ± {row.error_spread:.3f}"


def _list(values: Sequence[float], form: Callable[[float], str]) -> str:
    """All values, or one where all read the same."""
    shown = [form(value) for value in values]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)
