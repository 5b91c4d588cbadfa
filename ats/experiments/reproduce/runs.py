"""Run what a table lacks. A run that is complete is left alone, one that was stopped goes on.

Run as a program, with a configuration as JSON on its input, this module completes that one run.
"""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ats._files import read_object, write_json
from ats.experiments.config import ExperimentConfig, differences, to_dict
from ats.experiments.console import plain_console
from ats.experiments.evaluation import evaluate, held_out_data
from ats.experiments.localisation import localise
from ats.experiments.registry import from_dict
from ats.experiments.trained import Method, load
from ats.experiments.training import train

REPEATS = 5
"""Draws an image in testing: the error is the mean over them, that of one draw without its luck."""
DRAWS = 10
"""Patches that are drawn to see whether attention hits."""
_WAYS: Mapping[Method, int] = {"sample": REPEATS, "topk": 1}
"""Draws an image of what is tested with other numbers of patches, by method."""


@dataclass(frozen=True)
class Job:
    """One run of a table: its name for people, its configuration, and other numbers of patches to test it with."""

    name: str
    config: ExperimentConfig
    tested: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a complete run left: training.json, evaluation.json and, where the truth is known, localisation.json; where
    it was tested with other numbers of patches, tested.json: an evaluation of each by draws ("sample") and by the most
    probable cells ("topk")."""

    training: dict[str, Any]
    evaluation: dict[str, Any]
    localisation: dict[str, Any] | None
    tested: dict[str, Any] | None = None


def complete(config: ExperimentConfig, tested: Sequence[int] = ()) -> None:
    """Train, evaluate on the test split once training is over and, where the truth is known, compare attention with it.

    Nothing is chosen on the test split: it is the last epoch that is evaluated, with `tested` patches as well, in the
    precision of the training.
    """
    checkpoint = train(config)
    folder, method = config.run_folder, config.model.method
    wanted = {"evaluation"} | ({"localisation"} if method in ("ats", "mil", "gated-mil") else set())
    wanted = {name for name in wanted if not (folder / f"{name}.json").exists()}
    wanted |= {"tested"} if tested and _tested(folder) is None else set()
    if not wanted:
        return
    trained = load(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
    data = held_out_data(trained, None, config.data.folder)
    repeats = REPEATS if method in ("ats", "uniform") else 1
    with _precision(config, trained.device):
        if "evaluation" in wanted:
            own = evaluate(trained, repeats=repeats, seed=config.seed, data=data)
            write_json(folder / "evaluation.json", own.to_dict())
        if "tested" in wanted:
            found = {
                way: {
                    str(n): evaluate(trained, method=way, n_patches=n, repeats=times, seed=config.seed, data=data)
                    for n in tested
                }
                for way, times in _WAYS.items()
            }
            write_json(
                folder / "tested.json",
                {way: {n: one.to_dict() for n, one in by_number.items()} for way, by_number in found.items()},
            )
        if "localisation" in wanted and data.knows_targets:
            write_json(folder / "localisation.json", localise(trained, data, n_draws=DRAWS, seed=config.seed).to_dict())


def _precision(config: ExperimentConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of a training, for what is evaluated with it."""
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(config.trainer.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def result_of(config: ExperimentConfig) -> Result | None:
    """What a run left, or None where it is not complete.

    Raises:
        ValueError: its folder holds a run with other options.
    """
    folder = config.run_folder
    names = "config", "training", "evaluation", "localisation"
    recorded, training, evaluation, localisation = (read_json(folder / f"{name}.json") for name in names)
    if recorded is None or training is None or evaluation is None:
        return None
    if found := differences(from_dict(recorded), config):
        raise ValueError(
            f"{folder} holds a run with other options ({'; '.join(found)}); name another folder with --output, or "
            "remove that one"
        )
    return Result(training, evaluation, localisation, _tested(folder))


def _tested(folder: Path) -> dict[str, Any] | None:
    """A run's tested.json; None where it has draws alone, as it once had: then it is written anew."""
    found = read_json(folder / "tested.json")
    return found if found and found.keys() == _WAYS.keys() else None


def check_same_data(folder: Path, source: Callable[[], str], *, look: bool) -> str:
    """Note which data the runs of a folder are of, or check that they are the same: results must not be mixed.

    Args:
        folder: of a table's runs by one preset.
        source: finds out which data there is now.
        look: whether to; else the folder's note is believed, where it has one.

    Returns:
        The data's source.

    Raises:
        ValueError: the folder's runs are of other data.
    """
    recorded = read_json(folder / "data.json")
    if recorded is not None and not look:
        return recorded["source"]
    found = source()
    if recorded is None:
        write_json(folder / "data.json", {"source": found})
    elif recorded["source"] != found:
        raise ValueError(
            f"{folder} holds runs on {recorded['source']}, not on {found}; name another folder with --output"
        )
    return found


def run_jobs(jobs: Sequence[Job], gpus: Sequence[int] = ()) -> None:
    """Complete all jobs: one after the other or, on several GPUs, one on each at a time.

    Raises:
        InterruptedRunError: by the user; what was done stays done.
        RuntimeError: a run on a GPU of its own failed.
    """
    console = plain_console()
    missing = [job for job in jobs if not _is_done(job)]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them complete.")
    if len(gpus) <= 1:
        for number, job in enumerate(missing, 1):
            console.print(f"Run {number} of {len(missing)}: {job.name}")
            complete(job.config, job.tested)
        return
    free: queue.Queue[int] = queue.Queue()
    for gpu in gpus:
        free.put(gpu)
    with ThreadPoolExecutor(len(gpus)) as pool:
        futures = {pool.submit(_complete_on_a_gpu, job, free): job for job in missing}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                console.print(f"Done, {number} of {len(missing)}: {futures[future].name}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_done(job: Job) -> bool:
    result = result_of(job.config)
    return result is not None and not (job.tested and result.tested is None)


def _complete_on_a_gpu(job: Job, free: "queue.Queue[int]") -> None:
    gpu = free.get()
    try:
        log = job.config.run_folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            process = subprocess.run(
                [sys.executable, "-m", "ats.experiments.reproduce.runs"],
                input=json.dumps({"config": to_dict(job.config), "tested": job.tested}),
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
        if process.returncode:
            raise RuntimeError(f"{job.name} on GPU {gpu} ended with status {process.returncode}; see {log}")
    finally:
        free.put(gpu)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; remove it to have it made again") from error


if __name__ == "__main__":
    given = json.load(sys.stdin)
    complete(from_dict(given["config"]), given["tested"])
